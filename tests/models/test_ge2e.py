"""The GE2E encoder: its LSTM by hand, its choice of windows, and a network without batch statistics all through."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.deploy import Embedder, load, save
from qsv.frontend import MelSpectrogram
from qsv.models import GE2E, Network, count_parameters
from qsv.models.ge2e import lstm
from qsv.quant import Rule, Uniform, fake_quantize, init, resolve
from qsv.training import (
    Classification,
    MarginSoftmax,
    Optimizer,
    Task,
    TrainState,
    data_mesh,
    learning_rate_schedule,
    make_train_step,
    margin_schedule,
    put_batch,
    put_replicated,
    recalibrate_batch_stats,
)

TINY = {"hidden_size": 8, "num_layers": 2, "embedding_size": 6, "window_frames": 16, "hop_frames": 7}


@pytest.fixture
def network():
    return Network("ge2e", TINY, MelSpectrogram(num_mels=10))


def louder(variables):
    """Larger weights than fresh ones, so that windows differ enough to tell them apart."""
    return jax.tree.map(lambda leaf: 2 * leaf + 0.1 * jax.random.normal(jax.random.key(5), leaf.shape), variables)


def test_size_is_the_published_one():
    shapes = jax.eval_shape(GE2E().init, jax.random.key(0), jnp.zeros((1, 160, 40)))
    # Resemblyzer's 1,423,616 with one bias a layer in place of two.
    assert count_parameters(shapes["params"]) == 1_423_616 - 3 * 1024


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_lstm_by_hand():
    """One unit, two frames, two layers."""
    kernels = [(0.5, -0.3, 0.8, 0.2), (1.0, 0.4, -0.6, 0.7)]
    recurrents = [(0.1, 0.2, -0.4, 0.3), (-0.2, 0.5, 0.9, 0.1)]
    biases = [(0.0, 1.0, 0.1, -0.1), (0.2, -0.5, 0.0, 0.3)]
    hidden, cell = [0.0, 0.0], [0.0, 0.0]
    for x in (0.7, -1.2):
        for layer in range(2):
            i, f, g, o = (
                x * w + hidden[layer] * u + b
                for w, u, b in zip(kernels[layer], recurrents[layer], biases[layer], strict=True)
            )
            cell[layer] = sigmoid(f) * cell[layer] + sigmoid(i) * math.tanh(g)
            hidden[layer] = x = sigmoid(o) * math.tanh(cell[layer])
    layers = [
        (jnp.array([w]), jnp.array([u]), jnp.array(b)) for w, u, b in zip(kernels, recurrents, biases, strict=True)
    ]
    out = lstm(jnp.array([0.7, -1.2]).reshape(2, 1, 1), layers)
    np.testing.assert_allclose(out, [[hidden[1]]], rtol=1e-6)


def sample_windows(num_samples, *, shift, window, hop, coverage):
    """First frames of the windows of an utterance, by the published rule on samples."""
    frames = math.ceil((num_samples + 1) / shift)
    starts = list(range(0, max(1, frames - window + hop + 1), hop))
    if len(starts) > 1 and (num_samples - starts[-1] * shift) / (window * shift) < coverage:
        starts.pop()
    return starts


@pytest.mark.parametrize(("window", "hop", "coverage"), [(16, 7, 0.75), (12, 1, 1.0), (15, 2, 0.8), (25, 9, 0.28)])
def test_windows_are_those_of_the_rule_on_samples(window, hop, coverage):
    shift, tail, lengths = 10, 2, np.arange(1, 351)
    model = GE2E(4, 1, 5, window, hop, coverage, tail)
    num_frames = 1 + lengths // shift + tail
    features = jax.random.normal(jax.random.key(0), (1, int(num_frames.max()), 3))
    variables = louder(jax.jit(model.init)(jax.random.key(1), features))
    mask = np.arange(features.shape[1]) < num_frames[:, None]
    everywhere = jnp.where(mask[..., None], jnp.broadcast_to(features, (len(lengths), *features.shape[1:])), 0)
    embeddings = jax.jit(model.apply)(variables, everywhere, mask)
    # Every window alone: an utterance of one window has no other.
    alone = GE2E(4, 1, 5, window, window, 1.0, 0)
    padded = np.pad(np.asarray(everywhere), ((0, 0), (0, window), (0, 0)))
    starts = [sample_windows(n, shift=shift, window=window, hop=hop, coverage=coverage) for n in lengths]
    pieces = np.stack([padded[row, s : s + window] for row, some in enumerate(starts) for s in some])
    parts = np.split(np.asarray(alone.apply(variables, pieces)), np.cumsum([len(some) for some in starts])[:-1])
    means = np.stack([part.mean(axis=0) for part in parts])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    np.testing.assert_allclose(model.apply(variables, everywhere[-1:]), expected[-1:], atol=1e-5)


@pytest.mark.parametrize("frames", [5, 40])
def test_padding_never_changes_an_embedding(frames):
    model = GE2E(**TINY)
    features = jax.random.normal(jax.random.key(0), (2, frames, 10))
    variables = louder(jax.jit(model.init)(jax.random.key(1), features))
    alone = jax.jit(model.apply)(variables, features)
    padded = jnp.pad(features, ((0, 0), (0, 33), (0, 0)), constant_values=3.0)
    mask = jnp.broadcast_to(jnp.arange(frames + 33) < frames, (2, frames + 33))
    np.testing.assert_allclose(model.apply(variables, padded, mask), alone, atol=1e-5)
    assert np.abs(model.apply(variables, padded) - alone).max() > 1e-2
    np.testing.assert_allclose(jnp.linalg.norm(alone, axis=1), 1.0, rtol=1e-5)


def test_network_embeds_padded_waveforms_like_single_ones(network):
    variables = louder(network.init(jax.random.key(0)))
    waveform = 0.1 * jax.random.normal(jax.random.key(1), (4, 9000)) * jnp.linspace(0.05, 1, 9000)
    lengths = jnp.array([9000, 7777, 4000, 400])
    together = network.embed(variables, waveform, lengths)
    for row, length in enumerate(lengths):
        alone = network.embed(variables, waveform[row : row + 1, :length])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_gradients_are_finite_and_reach_every_parameter(scale):
    model = GE2E(**TINY)
    features = scale * jax.random.normal(jax.random.key(0), (3, 30, 10))
    variables = jax.jit(model.init)(jax.random.key(1), features)
    assert np.all(np.isfinite(model.apply(variables, features)))
    direction = jax.random.normal(jax.random.key(2), (3, 6))
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(model.apply(v, features) * direction)))(variables)
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf))
        assert scale == 0 or np.any(np.asarray(leaf) != 0)


def test_bfloat16_computation_keeps_float32_parameters_and_embeddings():
    features = jax.random.normal(jax.random.key(0), (2, 40, 10))
    model = GE2E(**TINY, dtype=jnp.bfloat16)
    variables = jax.jit(model.init)(jax.random.key(1), features)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    narrow, wide = model.apply(variables, features), GE2E(**TINY).apply(variables, features)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.03)
    assert np.any(np.asarray(narrow != wide))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size must be positive"),
        ("hop_frames", 17, r"hop_frames must be in 1\.\.16"),
        ("min_coverage", 1.5, "min_coverage"),
        ("tail_frames", -1, "tail_frames"),
    ],
)
def test_bad_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        GE2E(**{**TINY, field: value}).init(jax.random.key(0), jnp.zeros((1, 16, 10)))


def test_a_rule_for_kernels_covers_every_matrix(network):
    params = network.init(jax.random.key(0))["params"]
    plan = resolve([Rule(".*/kernel", Uniform(bits=2)), Rule(".*", None)], params)
    assert sorted(plan.quantized) == [
        "embedding/kernel",
        *(f"lstm{layer}/{part}/kernel" for layer in (1, 2) for part in ("hidden", "input")),
    ]
    quantized = fake_quantize(plan, params, init(plan, params))
    for leaf in jax.tree.leaves(quantized):
        assert leaf.ndim < 2 or len(np.unique(leaf)) <= 4


def make_state(network):
    """(task, state, batch) of a training with 4-bit kernels."""
    variables = network.init(jax.random.key(0))
    plan = resolve([Rule(".*/kernel", Uniform(bits=4)), Rule(".*", None)], variables["params"])
    learning_rate = learning_rate_schedule("cosine", peak=0.01, final=1e-4, num_steps=20)
    transformation = Optimizer("adamw").transformation(learning_rate)
    loss = MarginSoftmax(3, scale=8.0)
    task = Task(
        network=network,
        objective=Classification(loss, margin_schedule(final=0.0, rise_start=0, rise_end=1)),
        plan=plan,
        learning_rate=learning_rate,
        transformation=transformation,
    )
    state = TrainState.create(
        params=variables["params"],
        head=loss.init(jax.random.key(1), network.embedding_size),
        batch_stats=variables["batch_stats"],
        transformation=transformation,
        seed=3,
        qstate=init(plan, variables["params"]),
    )
    label = np.arange(8, dtype=np.int32) % 3
    phase = np.arange(4800) * (0.05 + 0.1 * label[:, None])
    waveform = (6000 * np.sin(phase)).astype(np.int16)
    return task, state, {"waveform": waveform, "label": label}


def test_training_without_batch_statistics_learns_on_one_device_as_on_four(network):
    losses, states = {}, {}
    for devices in (1, 4):
        task, state, batch = make_state(network)
        mesh = data_mesh(jax.devices()[:devices])
        step, state = make_train_step(task, mesh), put_replicated(state, mesh)
        losses[devices] = []
        for _ in range(20 if devices == 1 else 1):
            state, metrics = step(state, put_batch(batch, mesh))
            losses[devices].append(float(metrics["train/loss"]))
            states.setdefault(devices, jax.tree.map(np.asarray, state.params))
        assert state.batch_stats == {}
    assert losses[1][-1] < 0.8 * losses[1][0]
    assert losses[4][0] == pytest.approx(losses[1][0], rel=1e-5)
    for one, four in zip(jax.tree.leaves(states[1]), jax.tree.leaves(states[4]), strict=True):
        np.testing.assert_allclose(four, one, atol=1e-4)


def test_recalibration_and_packed_file_take_empty_statistics(network, tmp_path):
    variables = jax.device_get(louder(network.init(jax.random.key(0))))
    params = variables["params"]
    assert variables["batch_stats"] == {}
    assert recalibrate_batch_stats(network, params, {}, [jnp.zeros((2, 4800))]) == {}
    plan = resolve([Rule(".*/kernel", Uniform(bits=4)), Rule(".*", None)], params)
    qstate = init(plan, params)
    report = save(tmp_path / "model", network, plan, params, qstate, {})
    assert not any(row.path.startswith("batch_stats") for row in report.rows)
    loaded = load(tmp_path / "model")
    assert loaded.network == network and loaded.variables["batch_stats"] == {}
    served = Embedder(network, {"params": fake_quantize(plan, params, qstate), "batch_stats": {}})
    waveform = np.random.default_rng(0).normal(scale=0.05, size=9000)
    np.testing.assert_array_equal(loaded(waveform, 16000), served(waveform, 16000))
