"""JAX functions as ONNX graphs, run by onnxruntime: every operation, at sizes unknown to the graph."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax import export, lax
from onnx import TensorProto, helper

from qsv.deploy.onnx.graph import Graph
from qsv.deploy.onnx.lowering import Lowering
from qsv.deploy.onnx.tensors import Tensor, plain, straight
from qsv.frontend.framing import framed
from qsv.models.convolution import conv_general_dilated

KERNEL = np.random.default_rng(1).normal(size=(3, 3, 4, 6)).astype(np.float32)
MATRIX = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32)
ROW = np.arange(4, dtype=np.float32)


def session(make):
    """Of a graph whose input x is [b, t, 4] float32 and whose output y is what `make` gives."""
    graph = Graph()
    graph.bind_axes("x", {"b": 0, "t": 1})
    output = make(graph, Tensor("x", export.symbolic_shape("b, t, 4", constraints=["t >= 6"]), straight(3)))
    graph.append("Identity", [output.name], ["y"])
    model = graph.model(
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * output.rank)],
        metadata={},
    )
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def lowered(function):
    return session(lambda graph, x: plain(graph, Lowering(graph).call(function, x)))


def conv(x, strides=(1, 1), padding=((1, 1), (1, 1)), **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, KERNEL, strides, padding, dimension_numbers=layout, **options)


def image(x):
    """[b, t, 4] -> [b, t, 3, 4]"""
    return x[:, :, None] * jnp.arange(1.0, 4)[:, None]


def convolved(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))


def conv1(x):
    """[b, t, 4] -> [b, t, 6]"""
    layout = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, KERNEL[0], (1,), [(1, 1)], dimension_numbers=layout)


def depthwise(x):
    """As networks call it, where it isn't one operation on a CPU."""
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 4}
    return conv_general_dilated(x[:, :, None], KERNEL[:, :, :1, :4], (1, 1), ((1, 1), (1, 1)), **layout)


def wider(x, frames):
    return jnp.broadcast_to(x, (x.shape[0], frames, x.shape[2]))


def segments(frames):
    return (jnp.arange(frames)[None] // 2 == jnp.arange(3)[:, None]).astype(jnp.float32)


def cumulated(x):
    def step(carry, frame):
        return carry * 0.5 + frame @ MATRIX[:, :4], carry

    last, every = lax.scan(step, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))
    return jnp.concatenate([every.swapaxes(0, 1), last[:, None]], axis=1)


def backwards(x):
    return lax.scan(lambda carry, frame: (carry + frame, None), jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))[0]


FUNCTIONS = {
    "arithmetic": lambda x: (x * 2 - ROW) / (jnp.square(x) + 1) + 3 - x**3,
    "neutral": lambda x: (x + jnp.zeros(4)) * jnp.ones(4) - 0.0,
    "less than nothing": lambda x: 0.0 - x,
    "functions": lambda x: jnp.tanh(x) + jnp.exp(-jnp.abs(x)) + lax.rsqrt(1 + x * x) + jnp.log1p(x * x) + jnp.sign(x),
    "trigonometry": lambda x: jnp.sin(x) * jnp.cos(x) + jax.nn.sigmoid(x) + jax.lax.erf(x),
    "rounding": lambda x: jnp.round(x) + jnp.floor(x) + jnp.fmod(x, 0.7) + jnp.clip(x, -0.5, 0.5),
    "choices": lambda x: jnp.where((x > 0) & (x < 1) | (x != x), x, -1.0) + jnp.maximum(x, ROW) + jnp.minimum(x, 0),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "softmax over time": lambda x: jax.nn.softmax(x, axis=1),
    "mean and deviation": lambda x: jnp.concatenate([x.mean(1), jnp.sqrt(x.var(1, ddof=1) + 1e-7)], axis=-1),
    "maximum of all": lambda x: x - jnp.max(x, axis=(1, 2), keepdims=True) + jnp.min(x, axis=1, keepdims=True),
    "sum of what is broadcast": lambda x: jnp.sum(jnp.broadcast_to(x[:, :1], x.shape), axis=1),
    "sum of ones": lambda x: x / jnp.sum(jnp.ones((1, x.shape[1], 1)), axis=1, keepdims=True),
    "transposed": lambda x: x.swapaxes(0, 2) * ROW[:, None, None],
    "transposed twice": lambda x: (x.transpose(2, 0, 1) + 1).transpose(1, 2, 0) * x,
    "flattened": lambda x: x.swapaxes(1, 2).reshape(x.shape[0], -1),
    "folded": lambda x: x.reshape(-1, 2, 2).transpose(0, 2, 1),
    "new axes": lambda x: x[:, None, :, None] + jnp.zeros((2, 1, 3, 1)),
    "axes that go": lambda x: (x[:, :1] * 2)[:, 0],
    "slices": lambda x: x[:, 1:-1, 2:] + x[:, : x.shape[1] - 2, 1:3],
    "every other": lambda x: lax.slice_in_dim(lax.slice_in_dim(x, 0, None, 2, 1), 1, None, 2, 2),
    "a part of what is broadcast": lambda x: wider(x[:, :1], x.shape[1] + 3)[:, : x.shape[1]] * x,
    "padded": lambda x: jnp.pad(x, ((0, 0), (2, x.shape[1]), (1, 0)), constant_values=0.5),
    "reflected": lambda x: jnp.pad(x, ((0, 0), (2, 3), (0, 0)), mode="reflect"),
    "backwards": lambda x: lax.rev(x, (1, 2)),
    "parts": lambda x: jnp.concatenate(jnp.split(x, 2, axis=-1)[::-1], axis=1),
    "joined with what is known": lambda x: jnp.concatenate([x, jnp.zeros((*x.shape[:2], 2))], axis=-1),
    "indexed": lambda x: x[..., np.array([3, 0, -1])],
    "indexed by computed places": lambda x: x[:, jnp.arange(x.shape[1])[:, None] % 3 + np.arange(2)],
    "frames": lambda x: framed(x, x.shape[1] // 2, length=3, shift=1),
    "counted": lambda x: x * jnp.arange(x.shape[1])[:, None] + x.shape[1],
    "converted": lambda x: (x > 0).astype(jnp.float32) + x.astype(jnp.int32).astype(jnp.float32),
    "dense": lambda x: x @ MATRIX + 1,
    "dense after a transposition": lambda x: jnp.tanh(x).swapaxes(0, 1) @ MATRIX,
    "attention": lambda x: jnp.einsum("btc,bsc->bts", x, x) @ x,
    "attention of what lies otherwise": lambda x: jnp.einsum("bct,btd->cbd", jnp.tanh(x).swapaxes(1, 2), conv1(x)),
    "segments": lambda x: segments(x.shape[1]) @ x,
    "segments of what lies otherwise": lambda x: segments(x.shape[1]) @ jnp.tanh(conv1(x)),
    "times a computed matrix": lambda x: jnp.tanh(conv1(x)) @ (jnp.ones((6, 4)) * x.sum((0, 1))),
    "a computed matrix times another": lambda x: jnp.tanh(x[0]).T @ conv1(x)[0],
    "repeated frames of what lies otherwise": lambda x: jnp.repeat(conv1(x), 3, axis=1),
    "frames of an image in a row": lambda x: conv(image(x)).reshape(x.shape[0], -1, 6),
    "spectrum": lambda x: jnp.square(jnp.fft.rfft(x, axis=-1).real) + jnp.square(jnp.fft.rfft(x, n=8).imag)[..., :3],
    "convolution": lambda x: conv(image(x)),
    "convolution with strides": lambda x: conv(image(x), (2, 1), ((0, 1), (2, 0))),
    "dilated convolution": lambda x: conv(image(x), rhs_dilation=(2, 1)),
    "depthwise convolution": depthwise,
    "convolutions": lambda x: jax.nn.relu(conv(jax.nn.relu(conv(image(x)))[..., :4])) @ np.ones((6, 2), np.float32),
    "pooled": lambda x: lax.reduce_window(conv(image(x)), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
    "loop": cumulated,
    "loop without results": backwards,
    "jit in jit": lambda x: jax.jit(jax.checkpoint(jnp.tanh))(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gives_the_same_in_onnx(name):
    run = lowered(FUNCTIONS[name])
    for batch, frames in ((2, 6), (1, 9)):
        x = np.random.default_rng(0).normal(size=(batch, frames, 4)).astype(np.float32)
        expected = np.asarray(FUNCTIONS[name](jnp.asarray(x)))
        (found,) = run.run(None, {"x": x})
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_depthwise_convolution_is_one_operation():
    operations = []

    def make(graph, x):
        output = plain(graph, Lowering(graph).call(depthwise, x))
        operations.extend(node.op_type for node in graph._nodes)
        return output

    session(make)
    assert operations.count("Conv") == 1
    assert not {"Mul", "Add"} & set(operations)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.repeat(conv1(x), 3, axis=1),
        lambda x: segments(x.shape[1]) @ conv1(x),
    ],
)
def test_what_has_channels_first_is_not_transposed(function):
    operations = []

    def make(graph, x):
        output = Lowering(graph).call(function, x)
        operations.extend(node.op_type for node in graph._nodes)
        assert output.order == (0, 2, 1)
        return plain(graph, output)

    session(make)
    # The input's, and that of the small matrix of segments.
    assert operations.count("Transpose") <= 2 and "Einsum" not in operations


@pytest.mark.parametrize(
    "expression",
    [
        lambda t: t,
        lambda t: (t + 1) // 2,
        lambda t: 1 + (t - 20) // 8,
        lambda t: -t % 5,
        lambda t: 3 * t * t - t // 3,
        lambda t: jax.core.max_dim(1, t - 7),
        lambda t: jax.core.min_dim(9, 2 * t),
    ],
)
def test_sizes_are_computed_as_python_computes_them(expression):
    def size(graph, x):
        return Tensor(graph.add("Cast", graph.size(expression(x.shape[1])), to=TensorProto.FLOAT), (), ())

    run = session(size)
    for frames in (6, 7, 19, 20, 28):
        assert run.run(None, {"x": np.zeros((1, frames, 4), np.float32)})[0] == expression(frames)


def test_constants_are_stored_once_and_in_half_precision_where_that_is_exact():
    halves, thirds = np.arange(100, dtype=np.float32) / 2, np.arange(100, dtype=np.float32) / 3

    def make(graph, x):
        for values in (halves, thirds, halves.copy()):
            assert graph.constant(values) == graph.constant(values)
        total = graph.add("Add", graph.constant(halves), graph.constant(thirds))
        graph.total_bytes = sum(len(tensor.raw_data) for tensor in graph._initializers)
        assert graph.total_bytes < 100 * (2 + 4) + 50
        return Tensor(total, (100,), (0,))

    np.testing.assert_array_equal(session(make).run(None, {"x": np.zeros((1, 6, 4), np.float32)})[0], halves + thirds)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.sort(x, axis=1), "no ONNX operation is known for JAX's 'sort'"),
        (lambda x: jnp.fft.fft(x).real, "fft of type"),
        (lambda x: lax.conv_transpose(image(x), KERNEL, (2, 2), "SAME"), "a transposed convolution"),
        (lambda x: convolved(x, x[:1, :4]), "a kernel that depends on the input"),
        (lambda x: x[jnp.arange(2), jnp.arange(2)], "gather with"),
        (lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0))), "pad between elements"),
    ],
)
def test_what_onnx_or_we_do_not_know_is_named(function, message):
    with pytest.raises(NotImplementedError, match=message):
        lowered(function)
