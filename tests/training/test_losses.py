"""The margin softmax against a plain computation with angles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.training import MarginSoftmax


def by_angles(embeddings, kernel, labels, margin, scale):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    directions = kernel / np.linalg.norm(kernel, axis=0)
    angle = np.arccos(np.clip(unit @ directions, -1, 1))
    angle[np.arange(len(labels)), labels] += margin
    logits = scale * np.cos(angle)
    return np.mean([-row[label] + np.log(np.exp(row).sum()) for row, label in zip(logits, labels, strict=True)])


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 4)), rng.normal(size=(4, 3)), np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
def test_equals_the_definition(example, margin):
    embeddings, kernel, labels = example
    # Angles beyond pi - margin follow another branch; these examples are nearer.
    loss, _ = MarginSoftmax(3, scale=4.0)(jnp.array(embeddings), jnp.array(kernel), jnp.array(labels), margin)
    assert float(loss) == pytest.approx(by_angles(embeddings, kernel, labels, margin, 4.0), rel=1e-5)


def test_beyond_pi_minus_margin_the_target_falls_linearly():
    loss = MarginSoftmax(2, scale=1.0)
    kernel = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    embedding = jnp.array([[-1.0, 0.0]])  # opposite to its class
    value, _ = loss(embedding, kernel, jnp.array([0]), 0.3)
    target = -1.0 - 1 - np.cos(np.pi - 0.3)
    expected = -target + np.log(np.exp(target) + np.exp(0.0))
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_accuracy_is_without_margin(example):
    embeddings, kernel, labels = example
    cosine = (embeddings @ kernel) / np.linalg.norm(kernel, axis=0)
    _, accuracy = MarginSoftmax(3)(jnp.array(embeddings), jnp.array(kernel), jnp.array(labels), 0.5)
    assert float(accuracy) == pytest.approx(np.mean(cosine.argmax(axis=1) == labels))


def test_the_nearest_sub_center_counts():
    kernel = jnp.array([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])  # class 0: +-x, class 1: +-y
    loss = MarginSoftmax(2, scale=1.0, sub_centers=2)
    for x in (1.0, -1.0):
        value, accuracy = loss(jnp.array([[x, 0.0]]), kernel, jnp.array([0]), 0.0)
        assert float(value) == pytest.approx(-1 + np.log(np.e + 1), rel=1e-5)
        assert accuracy == 1


def test_inter_top_k_penalises_the_nearest_others_only():
    angles = np.array([0.5, 0.7, 1.5])
    kernel = jnp.array([np.cos(angles), np.sin(angles)])
    loss = MarginSoftmax(3, scale=1.0, top_k=1, top_k_margin=0.1)
    value, _ = loss(jnp.array([[1.0, 0.0]]), kernel, jnp.array([0]), 0.0)
    logits = np.cos([0.5, 0.6, 1.5])
    assert float(value) == pytest.approx(-logits[0] + np.log(np.exp(logits).sum()), rel=1e-5)


def test_gradient_is_finite_at_and_opposite_to_a_class_direction():
    kernel = jnp.array([[1.0, 0.0], [0.0, 1.0]])

    def value(embedding):
        return MarginSoftmax(2)(embedding, kernel, jnp.array([0, 0, 0]), 0.2)[0]

    gradient = jax.grad(value)(jnp.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 0.0]]))
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_speakers": 1}, "at least two"),
        ({"num_speakers": 3, "scale": 0.0}, "positive"),
        ({"num_speakers": 3, "top_k": 3}, "top_k"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        MarginSoftmax(**options)
