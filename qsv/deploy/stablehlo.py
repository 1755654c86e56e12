"""Export of a packed file to StableHLO, for what runs JAX's compiler and for those that take its programs."""

import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from qsv.data.file_error import FileError
from qsv.deploy.atomic_write import write_atomically
from qsv.deploy.packed_file import PackedModel
from qsv.deploy.packed_tensor import pack_on_host
from qsv.deploy.symbolic_shapes import features_shape, waveform_shape
from qsv.models import quantized_activations
from qsv.models.convolution import portable_convolutions
from qsv.quant import QTensor, leaf_paths, unpack_bits, with_leaves

PLATFORMS = ("cpu", "cuda", "tpu")

_MAGIC = b"qsv-stablehlo-1 "


def to_stablehlo(model: PackedModel, *, waveform: bool = True, platforms: Sequence[str] = PLATFORMS) -> export.Exported:
    """The network of a packed file as an exported JAX function, whose program is StableHLO.

    It takes [batch, samples] float32 in [-1, 1], or [batch, frames, features] float32, of any batch and length, and
    gives [batch, embedding_size] float32, not length normalised. Quantized weights are bit-packed constants that the
    program unpacks whenever it runs, in a fraction of the time that the network takes; quantized activations are
    computed in float on their levels.

    Args:
        model: from `qsv.deploy.load_packed`.
        waveform: whether the front end is part of it.
        platforms: that the program is for, as JAX calls them.
    """
    network = model.network

    def embed(features: jax.Array) -> Any:
        variables = {"params": _unpacked(model.packed_params), "batch_stats": _floats(model.batch_stats)}
        with quantized_activations(model.activations):
            return network.module().apply(variables, features)

    def embed_waveform(samples: jax.Array) -> Any:
        return embed(network.frontend(samples)[0])

    if waveform:
        shape = waveform_shape(network.frontend, network_follows=True)
    else:
        shape = features_shape(network.frontend.num_features)
    made = export.export(jax.jit(embed_waveform if waveform else embed), platforms=tuple(platforms))
    with portable_convolutions():
        return made(jax.ShapeDtypeStruct(shape, np.float32))


def export_stablehlo(path: str | os.PathLike[str], model: PackedModel, *, waveform: bool = True) -> int:
    """Write `to_stablehlo` of a model, sealed and atomically; returns the bytes of the file.

    The seal is at the end, so that `jax.export.deserialize` reads the file as well.
    """
    data = bytes(to_stablehlo(model, waveform=waveform).serialize())
    data += _seal(data)
    write_atomically(path, data)
    return len(data)


def load_stablehlo(path: str | os.PathLike[str]) -> export.Exported:
    """What `export_stablehlo` wrote; its `call` is a JAX function.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is damaged, of something else, or of another JAX whose exports this one can't read.
    """
    content = pathlib.Path(path).read_bytes()
    data, seal = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
    if seal != _seal(data):
        if seal.startswith(_MAGIC):
            raise FileError(path, "is damaged: its content has changed since it was written")
        raise FileError(path, "holds no exported JAX function that qsv wrote, or is truncated or damaged")
    try:
        return export.deserialize(bytearray(data))
    except Exception as error:  # The reader fails in many ways.
        raise FileError(
            path, f"holds no exported JAX function that JAX {jax.__version__} can read ({error})"
        ) from error


def _seal(data: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(data).digest()


_SEAL_BYTES = len(_seal(b""))


def _unpacked(params: Any) -> Any:
    """Float parameters, computed from bit-packed constants."""
    return with_leaves(params, {path: _value(leaf) for path, leaf in leaf_paths(params)})


def _value(leaf: Any) -> jax.Array:
    if not isinstance(leaf, QTensor):
        return jnp.asarray(leaf, jnp.float32)
    # The barrier keeps the compiler from unpacking while it compiles, which it does slowly.
    packed = lax.optimization_barrier(jnp.asarray(pack_on_host(np.asarray(leaf.codes), bits=leaf.bits)))
    codes = unpack_bits(packed, bits=leaf.bits, shape=leaf.shape)
    whole = QTensor(codes, jnp.asarray(leaf.codebook), jnp.asarray(leaf.scale), leaf.bits, leaf.shape, leaf.dtype)
    return whole.dequantize().astype(jnp.float32)


def _floats(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
