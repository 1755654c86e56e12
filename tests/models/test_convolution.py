"""The convolution equals XLA's, in value and every derivative, and keeps no patches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qsv.models import convolution
from qsv.models.convolution import conv_general_dilated, portable_convolutions

pytestmark = pytest.mark.usefixtures("optimized_programs")

LAYOUT = ("NHWC", "HWIO", "NHWC")
CASES = [
    ((3, 3), (1, 1), ((1, 1), (1, 1))),
    ((3, 3), (2, 2), ((1, 1), (1, 1))),
    ((1, 1), (2, 2), ((0, 0), (0, 0))),
    ((3, 2), (2, 1), ((0, 2), (1, 0))),
]


@pytest.fixture(autouse=True)
def narrow_layers_take_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "MIN_CHANNELS", 1)


def operands(size=(3, 3), dtype=jnp.float32, batch=4, channels=3, features=5):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, 10, 7, channels)), dtype)
    return images, jnp.asarray(rng.standard_normal((*size, channels, features)), dtype)


def depthwise_operands(size=(3, 3), dtype=jnp.float32, batch=4, channels=3):
    return operands(size, dtype, batch, channels)[0], operands(size, dtype, batch, 1, channels)[1]


def loss(function, strides=(1, 1), padding=((1, 1), (1, 1))):
    """Of a depthwise convolution where the kernel's is one."""

    def value(images, kernel):
        groups = images.shape[-1] // kernel.shape[2]
        return jnp.sum(
            jnp.sin(function(images, kernel, strides, padding, dimension_numbers=LAYOUT, feature_group_count=groups))
        )

    return value


def assert_close(ours, theirs, relative=2e-6):
    def compare(a, b):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert jnp.max(jnp.abs(a - b)) <= relative * jnp.max(jnp.abs(b))

    jax.tree.map(compare, ours, theirs)


def has_rule(function, *args) -> bool:
    return "custom_jvp_call" in str(jax.make_jaxpr(function)(*args))


@pytest.mark.parametrize(("size", "strides", "padding"), CASES)
@pytest.mark.parametrize("batch", [4, 3])
@pytest.mark.parametrize("operands", [operands, depthwise_operands])
def test_value_and_gradients_equal_xla(operands, size, strides, padding, batch):
    args = operands(size, batch=batch)
    ours, theirs = (loss(f, strides, padding) for f in (conv_general_dilated, lax.conv_general_dilated))
    assert has_rule(ours, *args)
    gradients = [jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*args) for f in (ours, theirs)]
    assert_close(*gradients)


@pytest.mark.parametrize("operands", [operands, depthwise_operands])
def test_float64(operands):
    with jax.enable_x64(True):
        args = operands(dtype=jnp.float64)
        ours, theirs = (jax.grad(loss(f), (0, 1))(*args) for f in (conv_general_dilated, lax.conv_general_dilated))
        assert_close(ours, theirs, 1e-14)


@pytest.mark.parametrize(("size", "strides", "padding"), CASES)
@pytest.mark.parametrize("operands", [operands, depthwise_operands])
def test_forward_mode_and_hessian_vector_product(operands, size, strides, padding):
    args = operands(size)
    tangents = jax.tree.map(jnp.cos, args)
    both = [loss(f, strides, padding) for f in (conv_general_dilated, lax.conv_general_dilated)]
    assert_close(*(jax.jvp(f, args, tangents) for f in both), 1e-5)
    assert_close(*(jax.jit(lambda f=f: jax.jvp(jax.grad(f, (0, 1)), args, tangents)[1])() for f in both), 1e-5)


@pytest.mark.parametrize("operands", [operands, depthwise_operands])
def test_vmap_of_gradient(operands):
    images, kernel = operands()
    kernels = jnp.stack([kernel, 2 * kernel])
    ours, theirs = (
        jax.vmap(jax.grad(loss(f), 1), (None, 0))(images, kernels)
        for f in (conv_general_dilated, lax.conv_general_dilated)
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("operands", [operands, depthwise_operands])
def test_sharded_batch(operands, manual):
    images, kernel = operands()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()
    gradient = jax.grad(loss(conv_general_dilated), 1)
    if manual:
        gradient = jax.shard_map(gradient, mesh=mesh, in_specs=(split, whole), out_specs=whole)
    step = jax.jit(gradient)
    ours = step(jax.device_put(images, NamedSharding(mesh, split)), jax.device_put(kernel, NamedSharding(mesh, whole)))
    assert_close(ours, jax.grad(loss(lax.conv_general_dilated), 1)(images, kernel))


@pytest.mark.parametrize("operands", [operands, depthwise_operands])
def test_shard_map_sums_over_devices_once_not_per_step(operands):
    images, kernel = operands(batch=16)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    specs = (PartitionSpec("data"), PartitionSpec())
    gradient = jax.shard_map(
        jax.grad(loss(conv_general_dilated), 1), mesh=mesh, in_specs=specs, out_specs=PartitionSpec()
    )
    text = jax.jit(gradient).lower(images, kernel).as_text()
    loops = text.split("stablehlo.while")[1:]
    assert loops
    assert "all_reduce" not in text[: text.rindex("stablehlo.while")]


@pytest.mark.parametrize("operands", [operands, depthwise_operands])
def test_portable_convolutions_are_xlas(operands):
    args = operands()
    with portable_convolutions():
        assert not has_rule(loss(conv_general_dilated), *args)
        portable = loss(conv_general_dilated)(*args)
    assert portable == loss(lax.conv_general_dilated)(*args)
    assert has_rule(loss(conv_general_dilated), *args)


def test_backward_pass_holds_no_patches_of_the_batch():
    images, kernel = operands(batch=64, channels=16, features=16)
    compiled = jax.jit(jax.grad(loss(conv_general_dilated), 1)).lower(images, kernel).compile()
    patches_bytes = 9 * images.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < patches_bytes / 2


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"precision": lax.Precision.HIGHEST},
        {"padding": ((-1, 1), (1, 1))},
    ],
)
def test_unsupported_options_are_xlas(options):
    images, kernel = operands()
    arguments = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "dimension_numbers": LAYOUT} | options
    assert not has_rule(lambda x, w: conv_general_dilated(x, w, **arguments), images, kernel)
    ours, theirs = (f(images, kernel, **arguments) for f in (conv_general_dilated, lax.conv_general_dilated))
    np.testing.assert_array_equal(ours, theirs)


def test_other_dtypes_layouts_groups_and_narrow_layers_are_xlas(monkeypatch):
    images, kernel = operands(channels=4, features=4)
    low = images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    assert not has_rule(loss(conv_general_dilated), *low)
    assert jax.grad(loss(conv_general_dilated), 1)(*low).dtype == jnp.bfloat16
    pad = ((1, 1), (1, 1))
    first = conv_general_dilated(images.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), pad)
    assert first.shape == (4, 4, 10, 7)

    def grouped(x, w):
        return conv_general_dilated(x, w, (1, 1), pad, dimension_numbers=LAYOUT, feature_group_count=2)

    assert not has_rule(grouped, images, kernel[:, :, :2])
    monkeypatch.setattr(convolution, "MIN_CHANNELS", 5)
    assert not has_rule(loss(conv_general_dilated), images, kernel)


def test_other_backends_are_xlas(monkeypatch):
    args = operands()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not has_rule(loss(conv_general_dilated), *args)


def test_serves_flax():
    images, _ = operands()
    ours, theirs = (nn.Conv(5, (3, 3), 2, padding=1, conv_general_dilated=f) for f in (conv_general_dilated, None))
    parameters = theirs.init(jax.random.key(0), images)
    assert has_rule(ours.apply, parameters, images)
    np.testing.assert_array_equal(ours.apply(parameters, images), theirs.apply(parameters, images))
