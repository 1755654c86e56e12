"""Networks by name: sizes, front ends, descriptions."""

import pytest

from qsv.frontend import KaldiFbank, LogMelSpectrogram, MelSpectrogram, SpeechBrainFbank
from qsv.models import Network, model_names


@pytest.mark.parametrize("name", model_names())
def test_every_network_has_its_usual_front_end_and_survives_json(name):
    network = Network(name, {"embedding_size": 24})
    assert network.embedding_size == 24
    assert network == Network.of_size(name, embedding_size=24) == Network.from_json(network.to_json())
    kinds = {"ge2e": MelSpectrogram, "ecapa_speechbrain": SpeechBrainFbank}
    assert type(network.frontend) is kinds.get(name, KaldiFbank)


def test_networks_of_quality_have_their_usual_front_ends_and_others_are_kept():
    assert Network("dnsmos").frontend == LogMelSpectrogram()
    assert Network("dnsmos_p808").frontend.scale == "decibel"
    assert Network("ecapa").frontend == KaldiFbank(window="hamming")
    assert Network("ecapa", frontend=KaldiFbank()).frontend == KaldiFbank()


def test_widths_go_to_the_argument_of_each_network():
    assert Network.of_size("resnet34", width=8).arguments == {"width": 8}
    assert Network.of_size("ecapa", width=64).arguments == {"channels": 64}
    assert Network.of_size("ge2e", width=16, embedding_size=8).arguments == {"hidden_size": 16, "embedding_size": 8}
    assert Network.of_size("resnet34").arguments == {}


def test_a_width_that_can_not_be_set_is_refused():
    with pytest.raises(ValueError, match="campplus has one width only, got width=8"):
        Network.of_size("campplus", width=8)
    with pytest.raises(ValueError, match="unknown model 'resnet35'"):
        Network.of_size("resnet35")
