"""Saving packed files: what is read back has the same bits, and what could not be read back isn't written."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qsv.deploy import describe_plan, file_report, is_packed, load_packed, save_packed
from qsv.models.network import Network
from qsv.quant import KMeans, QTensor, Rule, Uniform, fake_quantize, init, leaf_paths, quantize, resolve


def assert_trees_have_the_same_bits(left, right):
    left, right = leaf_paths(left), leaf_paths(right)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, one), (_, other) in zip(left, right, strict=True):
        assert isinstance(one, QTensor) == isinstance(other, QTensor), path
        if isinstance(one, QTensor):
            assert (one.bits, one.shape, one.dtype) == (other.bits, other.shape, other.dtype), path
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path


def test_round_trip_is_bit_exact(trained, model_file):
    model = load_packed(model_file)
    assert_trees_have_the_same_bits(model.packed_params, trained.packed)
    assert_trees_have_the_same_bits(model.batch_stats, trained.variables["batch_stats"])
    assert model.network == trained.network
    assert model.threshold == 0.25
    assert model.provenance == {"run": "tiny", "eer_percent": 1.5}
    assert model.plan_description == describe_plan(trained.plan)
    # What runs on the device is what was trained and measured.
    trained_weights = fake_quantize(trained.plan, trained.variables["params"], trained.qstate)
    assert_trees_have_the_same_bits(model.variables()["params"], trained_weights)


def test_float_file_has_the_same_format(trained, tmp_path):
    variables = trained.variables
    size = save_packed(tmp_path / "float", trained.network, variables["params"], variables["batch_stats"])
    model = load_packed(tmp_path / "float")
    assert_trees_have_the_same_bits(model.packed_params, variables["params"])
    assert (tmp_path / "float").stat().st_size == size
    assert model.threshold is None
    assert model.plan_description == model.provenance == {}


def test_bfloat16_weights(trained, tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trained.variables["params"])
    plan = resolve([Rule("stage1.*/kernel", Uniform(bits=5)), Rule(".*", None)], params)
    packed = quantize(plan, params, init(plan, params))
    save_packed(tmp_path / "file", trained.network, packed, trained.variables["batch_stats"])
    model = load_packed(tmp_path / "file")
    assert_trees_have_the_same_bits(model.packed_params, packed)
    assert model.variables()["params"]["stem"]["conv"]["kernel"].dtype == jnp.float32


def test_saving_twice_gives_the_same_bytes(trained, tmp_path):
    for name in ("one", "two"):
        save_packed(
            tmp_path / name,
            trained.network,
            trained.packed,
            trained.variables["batch_stats"],
            provenance={"b": 1, "a": [1, 2]},
        )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_plan_description_leaves_out_defaults(trained):
    texts = describe_plan(trained.plan)
    assert texts["stem/conv/kernel"] == "KMeans(bits=2)"
    assert texts["embedding/kernel"] == "Uniform(bits=8, channel_axes=(-1,))"
    assert "embedding/bias" not in texts


def test_scalars_of_metrics_are_noted(trained, tmp_path):
    statistics = trained.variables["batch_stats"]
    notes = {"eer_percent": np.float32(1.5), "step": jnp.int32(7), "pair": (1, 2)}
    save_packed(tmp_path / "file", trained.network, trained.packed, statistics, provenance=notes)
    assert load_packed(tmp_path / "file").provenance == {"eer_percent": 1.5, "step": 7, "pair": [1, 2]}


def test_full_disk_names_file_and_bytes(trained, model_file, monkeypatch):
    before = model_file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*model\.qsv needs [\d,]+ bytes") as caught:
        save_packed(model_file, trained.network, trained.packed, trained.variables["batch_stats"])
    assert caught.value.errno == errno.ENOSPC
    assert model_file.read_bytes() == before
    assert os.listdir(model_file.parent) == [model_file.name]


def with_leaf(tree, leaf):
    return {**tree, "embedding": {**tree["embedding"], "bias": leaf}}


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.zeros(15, np.float32), r"embedding/bias has shape \(15,\), resnet18 needs \(16,\)"),
        (np.full(16, np.nan, np.float32), "embedding/bias holds NaN"),
        (np.zeros(16, np.int32), "embedding/bias is int32"),
        (np.zeros(16, np.float64), "embedding/bias is float64"),
        ({"a/b": np.zeros(1, np.float32)}, "without '/' and ':', got 'a/b'"),
        ({"more": np.zeros(1, np.float32)}, "1 missing.*1 unexpected"),
    ],
)
def test_saving_refuses_other_parameters(trained, tmp_path, leaf, message):
    params = with_leaf(trained.variables["params"], leaf)
    with pytest.raises(ValueError, match=message):
        save_packed(tmp_path / "file", trained.network, params, trained.variables["batch_stats"])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": float("nan")}, "threshold must be finite"),
        ({"provenance": {"path": object()}}, "must be JSON values"),
        ({"provenance": {"eer": float("inf")}}, "must be JSON values"),
    ],
)
def test_saving_refuses_what_is_not_json(trained, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        save_packed(tmp_path / "file", trained.network, trained.packed, trained.variables["batch_stats"], **options)


def test_saving_refuses_arguments_that_could_not_be_read_back(trained, tmp_path):
    network = Network("resnet18", {**trained.network.arguments, "activation": jax.nn.relu}, trained.network.frontend)
    with pytest.raises(ValueError, match="must be JSON values"):
        save_packed(tmp_path / "file", network, trained.packed, trained.variables["batch_stats"])


def test_saving_refuses_a_description_that_forgets_something(trained, tmp_path, monkeypatch):
    fields = {**trained.network.to_json(), "frontend": {"kind": "kaldi_fbank"}}
    monkeypatch.setattr(Network, "to_json", lambda network: fields)
    with pytest.raises(ValueError, match="can't be read back"):
        save_packed(tmp_path / "file", trained.network, trained.packed, trained.variables["batch_stats"])
    assert not os.listdir(tmp_path)


def test_a_packed_file_is_told_from_others(trained, tmp_path):
    path = tmp_path / "file"
    save_packed(path, trained.network, trained.packed, trained.variables["batch_stats"])
    assert is_packed(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert is_packed(path)  # Damaged, which is for load_packed to say.
    safetensors.numpy.save_file({"a": np.zeros(3)}, path)
    assert not is_packed(path)
    for other in (b"", b"PK\x03\x04 a zip file, of course", bytes(8), (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(other)
        assert not is_packed(path)


def test_resnet34_of_4_bits_is_7_5_times_smaller(tmp_path):
    network = Network("resnet34")
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    plan = resolve([Rule(".*/kernel", KMeans(bits=4)), Rule(".*", None)], values["params"])

    def pack(path, leaf):
        if plan[path] is None:
            return leaf
        codes = rng.integers(0, 16, leaf.shape, np.uint8)
        return QTensor(codes, np.linspace(-1, 1, 16, dtype="f"), np.float32(1), 4, leaf.shape, "float32")

    packed = jax.tree.unflatten(
        jax.tree.structure(values["params"]),
        [pack(path, leaf) for path, leaf in leaf_paths(values["params"])],
    )
    path = tmp_path / "resnet34.qsv"
    size = save_packed(
        path, network, packed, values["batch_stats"], plan_description=describe_plan(plan), threshold=0.5
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(values["params"]))
    assert parameters == 6_634_336
    assert size == path.stat().st_size <= 4 * parameters / 7.5
    report = file_report(path)
    assert report.compression_ratio == 4 * parameters / size
    assert_trees_have_the_same_bits(load_packed(path).packed_params, packed)
