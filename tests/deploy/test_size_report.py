import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.deploy import describe_plan, file_report, load_packed, save, size_report
from qsv.quant import QTensor, Rule, StaticBinary, init, resolve


@pytest.fixture
def packed():
    kernel = QTensor(
        np.zeros((3, 3, 5), np.uint8), np.arange(8, dtype=np.float32), np.float32(1), 3, (3, 3, 5), "float32"
    )
    return {
        "conv": {"kernel": kernel, "bias": np.arange(5, dtype=np.float32)},
        "scalar": jnp.zeros((), jnp.bfloat16),
    }


def test_bytes_worked_by_hand(packed):
    # A constant is one number of the description.
    statistics = {"mean": np.arange(5, dtype=np.float32), "var": np.ones(5, np.float32)}
    report = size_report(packed, {"norm": statistics})
    rows = {row.path: row for row in report.rows}
    kernel = rows["params/conv/kernel"]
    # 45 codes of 3 bits are 135 bits; eight levels and a scale of four bytes each.
    assert (kernel.code_bytes, kernel.table_bytes, kernel.float_bytes) == (17, 36, 0)
    assert (kernel.bits, kernel.shape, kernel.scheme, kernel.stored_bytes) == (3, (3, 3, 5), "3-bit", 53)
    assert (rows["params/scalar"].float_bytes, rows["params/scalar"].scheme) == (2, "bfloat16")
    assert [row.path for row in report.rows][-2:] == ["batch_stats/norm/mean", "batch_stats/norm/var"]
    assert rows["batch_stats/norm/var"].float_bytes == 0
    assert (report.code_bytes, report.table_bytes, report.float_bytes) == (17, 36, 20 + 2 + 20)
    assert report.stored_bytes == 95
    assert report.num_parameters == 45 + 5 + 1
    assert report.float32_bytes == 204
    assert report.compression_ratio == 204 / 95
    assert report.file_bytes is report.header_bytes is None


def test_ratio_is_of_the_file_where_there_is_one(packed):
    report = size_report(packed, {}, file_bytes=200)
    assert report.header_bytes == 200 - 75
    assert report.compression_ratio == 204 / 200


def test_file_report_accounts_for_every_byte(trained, model_file):
    report = file_report(model_file)
    whole = model_file.read_bytes()
    assert report.file_bytes == len(whole)
    assert report.header_bytes == 8 + int.from_bytes(whole[:8], "little")
    model = load_packed(model_file)
    packed = size_report(model.packed_params, model.batch_stats, plan_description=describe_plan(trained.plan))
    assert report.rows == packed.rows
    assert len(report.rows) == len(jax.tree.leaves(trained.variables))


def test_constant_tables_are_part_of_the_header(trained, tmp_path):
    params = trained.variables["params"]
    plan = resolve([Rule(".*/kernel", StaticBinary("one", channel_axes=(-1,))), Rule(".*", None)], params)
    file = tmp_path / "binary.qsv"
    size = save(file, trained.network, plan, params, init(plan, params), trained.variables["batch_stats"])
    assert size.header_bytes == 8 + int.from_bytes(file.read_bytes()[:8], "little")
    # Scales are all one; the two levels are not.
    rows = {row.path: row for row in size.rows}
    assert rows["params/stem/conv/kernel"].table_bytes == 8
    assert file_report(file).header_bytes == size.header_bytes


def test_the_table_has_every_row_and_the_totals(packed):
    report = size_report(packed, {}, plan_description={"conv/kernel": "KMeans(bits=3)"}, file_bytes=2000)
    markdown = report.to_markdown().splitlines()
    assert markdown[0].count("|") == markdown[1].count("|") == markdown[2].count("|") == 8
    assert "| params/conv/kernel | 3x3x5 | KMeans(bits=3) | 3 | 17 | 36 | 0 |" in markdown
    assert sum("params/" in line for line in markdown) == 3
    assert markdown[-1] == report.summary()
    assert report.summary() == (
        "17 code + 36 table + 22 float + 1,925 header = 2,000 bytes; "
        "51 parameters take 204 bytes in float32, 0.10 times as many"
    )
