"""What onnxruntime is told about the processor."""

import onnxruntime
import pytest

from qsv.deploy.runtime import backends
from qsv.deploy.runtime.model_file import read_sealed

WITHOUT = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse4_1 avx avx2 avx512f avx512bw\n\nprocessor\t: 1\n"
)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (WITHOUT, True),
        (WITHOUT.replace("avx512bw", "avx512_vnni"), False),
        (WITHOUT.replace("avx512f", "avx_vnni"), False),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", False),
        ("", False),
    ],
    ids=["avx2", "avx512_vnni", "avx_vnni", "arm", "empty"],
)
def test_sums_saturate_on_x86_without_vnni(tmp_path, cpuinfo, expected):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert backends.saturates(tmp_path / "cpuinfo") is expected
    assert not backends.saturates(tmp_path / "none")


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [(WITHOUT, True), (WITHOUT.replace("avx2", "avx_vnni"), False)],
    ids=["avx2", "avx_vnni"],
)
def test_kernels_are_made_unsigned_only_where_sums_saturate(exported, tmp_path, monkeypatch, cpuinfo, expected):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(backends, "_CPUINFO", tmp_path / "cpuinfo")
    seen = {}

    def spied(_, key, value):
        seen[key] = value

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", spied)
    backends.make_runner(exported.onnx, read_sealed(exported.onnx).data, backend="onnxruntime", threads=1)
    assert seen == ({"session.x64quantprecision": "1"} if expected else {})
