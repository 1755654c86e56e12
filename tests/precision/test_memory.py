"""Memory of an inference, counted by hand."""

import jax
import pytest

from qsv.models import Network, count_parameters
from qsv.precision import inference_memory


@pytest.fixture(scope="module")
def variables():
    return Network.of_size("dnsmos").init(jax.random.key(0))


def test_five_seconds_of_the_quality_network_by_hand(variables):
    network = Network.of_size("dnsmos")
    parameters = count_parameters(variables["params"])
    memory = inference_memory(network, variables, weight_bytes=4 * parameters, map_bits=32, seconds=5.0)
    maps = [251 * 120 * 32, 125 * 60 * 32, 62 * 30 * 32, 31 * 15 * 64]
    assert memory.values == sum(maps)
    assert memory.maps == 4 * sum(maps)
    # The second convolution takes the pooled output of the first: the first has more to hold.
    assert memory.peak == 4 * (251 * 120 + maps[0])
    assert memory.total == 4 * (parameters + sum(maps))


def test_binary_maps_and_8_bit_weights_take_25_times_less(variables):
    """The published ratio, from this accounting: 45,344 weights in 8 bits, 353 biases in float32."""
    network = Network("dnsmos", {"maps": "binary"})
    whole = inference_memory(network, variables, weight_bytes=4 * 45_697, map_bits=32, seconds=5.0)
    small = inference_memory(network, variables, weight_bytes=45_344 + 4 * 353, map_bits=1, seconds=5.0)
    assert whole.total / small.total == pytest.approx(25.7, abs=0.05)
    # The input stays float32, which the layer after it holds beside its own output.
    assert small.peak == (32 * 251 * 120 + 251 * 120 * 32) // 8


def test_a_network_without_convolutions_is_refused():
    network = Network("ge2e", {"hidden_size": 4, "num_layers": 1, "embedding_size": 4})
    with pytest.raises(ValueError, match="ge2e has no convolutions"):
        inference_memory(network, network.init(jax.random.key(0)), weight_bytes=1, map_bits=1, seconds=1.0)
