import base64
import errno
import hashlib
import json
import os
import pickle
import zlib

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


NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1"}


def read_by_documentation(path):
    """The file's tensors, description and digest, with nothing but the format's documentation."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert list(metadata) == ["qsv"]
    text = zlib.decompress(base64.b64decode(metadata["qsv"])).decode()
    description = json.loads(text)
    digest = hashlib.sha256(text.replace(description["sha256"], "").encode())
    flat = {}
    for name, entry in sorted(header.items()):
        first, last = (8 + size + offset for offset in entry["data_offsets"])
        digest.update(json.dumps([name, entry["shape"]], separators=(",", ":")).encode())
        digest.update(data[first:last])
        assert entry["dtype"] == name
        flat[name] = np.frombuffer(data[first:last], NUMPY_TYPES[name])
    tensors, used = {}, dict.fromkeys(flat, 0)
    for name, dtype, shape, *value in description.pop("tensors"):
        if value:
            tensors[name] = np.full(shape, value[0], NUMPY_TYPES[dtype])
            continue
        first = used[dtype]
        used[dtype] += int(np.prod(shape))
        tensors[name] = flat[dtype][first : used[dtype]].reshape(shape)
    return tensors, description, digest.hexdigest()


def rewrite(path, change):
    """Replace a file by a changed one with a right digest: what another program might write."""
    tensors, description, _ = read_by_documentation(path)
    change(tensors, description)
    names = {"float32": "F32", "float16": "F16", "uint8": "U8", "float64": "F64"}
    index = [[name, names[array.dtype.name], list(array.shape)] for name, array in tensors.items()]
    description = {"tensors": index, **description, "sha256": ""}
    flat = {}
    for array in tensors.values():
        kind = names[array.dtype.name]
        flat[kind] = np.append(flat.get(kind, np.zeros(0, array.dtype)), array)
    write_with_digest(path, description, flat)


def write_with_digest(path, description, flat):
    text = json.dumps(description)
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(flat.items()):
        digest.update(json.dumps([name, list(array.shape)], separators=(",", ":")).encode())
        digest.update(array.tobytes())
    text = text.replace('"sha256": ""', f'"sha256": "{digest.hexdigest()}"')
    path.write_bytes(safetensors.numpy.save(flat, {"qsv": compressed(text)}))


def compressed(text):
    return base64.b64encode(zlib.compress(text.encode())).decode()


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


def test_documentation_suffices_to_read_the_file(trained, model_file):
    tensors, description, digest = read_by_documentation(model_file)
    assert digest == description["sha256"]
    assert (description["format"], description["format_version"]) == ("qsv-packed", 2)
    weights = dict(leaf_paths(fake_quantize(trained.plan, trained.variables["params"], trained.qstate)))
    assert set(description["quantized"]) == set(trained.plan.quantized)
    for path, fields in description["quantized"].items():
        codes, codebook, scale = (tensors[f"params/{path}:{part}"] for part in ("codes", "codebook", "scale"))
        stream = int.from_bytes(codes.tobytes(), "little")
        bits, shape = fields["bits"], fields["shape"]
        numbers = [(stream >> (i * bits)) & (2**bits - 1) for i in range(min(np.prod(shape), 50))]
        if codebook.ndim == scale.ndim + 1 == 1:
            decoded = codebook[numbers] * scale
            np.testing.assert_array_equal(decoded, np.ravel(weights[path])[:50])
    np.testing.assert_array_equal(tensors["params/embedding/bias"], weights["embedding/bias"])


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


def test_every_flipped_bit_is_refused(model_file):
    whole = model_file.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    data_step = (len(whole) - header_end) // 200
    places = [*range(8), *range(8, header_end, 11), *range(header_end, len(whole), data_step), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        model_file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.qsv: "):
            load_packed(model_file)


def test_flipped_codes_tables_and_threshold_are_named_damage(model_file):
    whole = model_file.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:header_end])
    variants = []
    for kind in ("U8", "F32"):
        damaged = bytearray(whole)
        damaged[header_end + header[kind]["data_offsets"][0]] ^= 1
        variants.append(bytes(damaged))
    flat = {kind: np.frombuffer(value["data"], NUMPY_TYPES[kind]) for kind, value in safetensors.deserialize(whole)}
    text = zlib.decompress(base64.b64decode(header["__metadata__"]["qsv"])).decode()
    assert '"threshold":0.25' in text
    metadata = {"qsv": compressed(text.replace('"threshold":0.25', '"threshold":0.35'))}
    variants.append(safetensors.numpy.save(flat, metadata))
    for variant in variants:
        model_file.write_bytes(variant)
        with pytest.raises(ValueError, match="SHA-256 doesn't match"):
            load_packed(model_file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop(), "the F32 tensor has .* values, its description names|1 missing"),
        (
            lambda index: index.append(["params/more:codes", "F32", [5]]),
            "params/more:codes of shape .5,. lies past the end",
        ),
        (
            lambda index: index.append(["params/more:codes", "BF16", [5]]),
            "params/more:codes of shape .5,. lies past the end",
        ),
        (lambda index: index.append(["params/more:codes", "F32", [-5]]), "params/more:codes is described twice or as"),
        (lambda index: index.append(["params/more:codes", "I8", [5]]), "params/more:codes is described twice or as"),
        (lambda index: index.append(index[0]), "is described twice"),
        (lambda index: index.append(["params/more", "F32", [2**20, 2**20], 0.5]), "1 unexpected.*params/more"),
        (lambda index: index[0].append(float("nan")), r"model\.qsv: "),
    ],
)
def test_an_index_that_does_not_fit_is_refused(model_file, change, message):
    whole = model_file.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    description = json.loads(zlib.decompress(base64.b64decode(header["__metadata__"]["qsv"])))
    change(description["tensors"])
    flat = {kind: np.frombuffer(value["data"], NUMPY_TYPES[kind]) for kind, value in safetensors.deserialize(whole)}
    write_with_digest(model_file, {**description, "sha256": ""}, flat)
    with pytest.raises(ValueError, match=message):
        load_packed(model_file)


def test_a_description_that_inflates_without_end_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(safetensors.numpy.save({"F32": np.zeros(3, np.float32)}, {"qsv": compressed(" " * 2**27)}))
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match="bomb.safetensors: its description is cut off, or longer than"):
        load_packed(path)


def test_truncated_and_extended_files_are_refused(model_file):
    whole = model_file.read_bytes()
    for length in (0, 4, 8, 9, 1000, len(whole) // 2, len(whole) - 1):
        model_file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.qsv: isn't a whole safetensors file"):
            load_packed(model_file)
    model_file.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="isn't a whole safetensors file"):
        load_packed(model_file)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_packed(tmp_path / "absent")


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("pickle-was-run",))


def test_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(ValueError, match=r"model\.pkl: isn't a whole safetensors file"):
        load_packed(path)
    assert not (tmp_path / "pickle-was-run").exists()


def test_other_safetensors_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}):
        path.write_bytes(safetensors.numpy.save({"weight": np.zeros(3, np.float32)}, metadata))
        with pytest.raises(ValueError, match="without the metadata 'qsv'"):
            load_packed(path)
    for text in ("[]", "{", "1", '{"format": "something"}', "[" * 100_000):
        path.write_bytes(safetensors.numpy.save({"F32": np.zeros(3, np.float32)}, {"qsv": compressed(text)}))
        with pytest.raises(ValueError, match=r"other\.safetensors: "):
            load_packed(path)


def set_field(*keys, value):
    def change(tensors, description):
        for key in keys[:-1]:
            description = description[key]
        description[keys[-1]] = value

    return change


def remove(name):
    return lambda tensors, description: tensors.pop(name)


def add(name, array):
    return lambda tensors, description: tensors.update({name: array})


STEM = "stem/conv/kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("format", value="other"), "expected format 'qsv-packed', got 'other'"),
        (set_field("format_version", value=4), "format version 4.*newer qsv"),
        (set_field("format_version", value=3), "lacks 'activations'"),
        (lambda tensors, description: description.pop("threshold"), "lacks 'threshold'"),
        (set_field("network", "name", value="resnet7"), "unknown model 'resnet7'"),
        (set_field("network", "arguments", "width", value=5), r"has shape .*, resnet18 needs"),
        (set_field("network", "arguments", "width", value="wide"), r"model\.qsv: "),
        (set_field("network", "arguments", "heads", value=2), "heads"),
        (set_field("network", "frontend", "dither", value=1.0), "unknown front end fields"),
        (set_field("quantized", STEM, "bits", value=3), r"needs \[14\] bytes of 3-bit codes"),
        (set_field("quantized", STEM, "shape", value=[36]), r"shape \(36,\), resnet18 needs \(3, 3, 1, 4\)"),
        (set_field("quantized", STEM, "shape", value=[37]), r"shape \(37,\), resnet18 needs \(3, 3, 1, 4\)"),
        (
            set_field("quantized", "more", value={"bits": 1, "shape": [], "dtype": "float32"}),
            "1 unexpected.*params/more",
        ),
        (lambda tensors, description: description["quantized"].pop(STEM), "1 missing.*stem/conv/kernel"),
        (remove(f"params/{STEM}:codebook"), "lacks its codebook"),
        (remove("params/embedding/bias"), "1 missing.*embedding/bias"),
        (remove("batch_stats/stem/norm/mean"), "1 missing.*stem/norm/mean"),
        (add("params/extra", np.zeros(2, np.float32)), "1 unexpected.*params/extra"),
        (add("params/extra:codes", np.zeros(2, np.uint8)), "doesn't name.*extra:codes"),
        (add("params/embedding/bias", np.zeros(15, np.float32)), r"embedding/bias has shape \(15,\)"),
        (add("params/embedding/bias", np.zeros(16, np.uint8)), "embedding/bias is uint8"),
        (
            add("params/embedding/bias", np.zeros(16, np.float64)),
            "F64 is F64 .16., expected flat tensors called by their types",
        ),
        (add("params/embedding/bias", np.full(16, np.nan, np.float32)), "embedding/bias holds NaN"),
    ],
)
def test_consistent_files_of_something_else_are_refused(model_file, change, message):
    rewrite(model_file, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_packed(model_file)
    assert "model.qsv: " in str(caught.value)


def test_a_newer_format_is_named_before_its_digest_is_judged(model_file):
    whole = model_file.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    description = json.loads(zlib.decompress(base64.b64decode(header["__metadata__"]["qsv"])))
    flat = {kind: np.frombuffer(value["data"], NUMPY_TYPES[kind]) for kind, value in safetensors.deserialize(whole)}
    text = json.dumps({**description, "format_version": 9})
    model_file.write_bytes(safetensors.numpy.save(flat, {"qsv": compressed(text)}))
    with pytest.raises(ValueError, match="format version 9, this qsv reads 2 and 3; install a newer qsv"):
        load_packed(model_file)


def test_rewriting_alone_is_accepted(model_file):
    rewrite(model_file, lambda tensors, description: None)
    load_packed(model_file)


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
