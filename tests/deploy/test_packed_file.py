"""The packed file's format: its documentation suffices to read it, and what is broken or another's is refused."""

import base64
import hashlib
import json
import os
import pickle
import zlib

import numpy as np
import pytest
import safetensors.numpy

from qsv.deploy import load_packed
from qsv.quant import fake_quantize, leaf_paths

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


def contents(path):
    """A file's description, as text, and its flat tensors."""
    flat, whole = {}, path.read_bytes()
    for kind, value in safetensors.deserialize(whole):
        flat[kind] = np.frombuffer(value["data"], NUMPY_TYPES[kind])
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    return zlib.decompress(base64.b64decode(header["__metadata__"]["qsv"])).decode(), flat


def compressed(text):
    return base64.b64encode(zlib.compress(text.encode())).decode()


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
    text, flat = contents(model_file)
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
    text, flat = contents(model_file)
    description = json.loads(text)
    change(description["tensors"])
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
    text, flat = contents(model_file)
    description = json.loads(text)
    text = json.dumps({**description, "format_version": 9})
    model_file.write_bytes(safetensors.numpy.save(flat, {"qsv": compressed(text)}))
    with pytest.raises(ValueError, match="format version 9, this qsv reads 2 and 3; install a newer qsv"):
        load_packed(model_file)


def test_rewriting_alone_is_accepted(model_file):
    rewrite(model_file, lambda tensors, description: None)
    load_packed(model_file)
