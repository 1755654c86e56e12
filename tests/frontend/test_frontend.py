"""Front ends written to files and read back."""

import pytest

from qsv.frontend import KaldiFbank, MelSpectrogram, SpeechBrainFbank, frontend_from_json, frontend_to_json


@pytest.mark.parametrize(
    "frontend",
    [
        KaldiFbank(),
        KaldiFbank(window="hamming", num_mels=40),
        MelSpectrogram(),
        MelSpectrogram(target_dbfs=None),
        SpeechBrainFbank(num_mels=40, dynamic_range_db=60.0),
    ],
)
def test_json_round_trip(frontend):
    assert frontend_from_json(frontend_to_json(frontend)) == frontend


def test_unknown_kinds_and_fields_are_refused():
    fields = frontend_to_json(KaldiFbank())
    with pytest.raises(ValueError, match="unknown front end fields .'colour'"):
        frontend_from_json({**fields, "colour": "red"})
    with pytest.raises(ValueError, match="unknown front end 'wavelet'"):
        frontend_from_json({**fields, "kind": "wavelet"})
