"""Traces against the dense Hessian, and the rule that stops them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.precision import StoppingRule, TraceEstimate, hessian_traces, hessian_vector_product, largest_relative_error
from qsv.training import data_mesh


@pytest.fixture(scope="module")
def network(smooth_network):
    """Parameters, batches and the loss of a classification."""
    params, inputs, labels, outputs = smooth_network

    def loss(params, batch):
        logits = outputs(params, batch["x"])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch["y"]])

    return params, [{"x": x, "y": y} for x, y in zip(inputs, labels, strict=True)], loss


PATHS = ("first/kernel", "second/kernel", "third/kernel")


def dense_traces(params, batches, loss):
    def mean_loss(kernels):
        changed = {name: {**leaves, "kernel": kernels[name]} for name, leaves in params.items()}
        return sum(loss(changed, batch) for batch in batches) / len(batches)

    kernels = {name: leaves["kernel"] for name, leaves in params.items()}
    hessian = jax.hessian(mean_loss)(kernels)
    return {
        f"{name}/kernel": float(jnp.trace(hessian[name][name].reshape(kernel.size, kernel.size)))
        for name, kernel in kernels.items()
    }


def test_products_are_those_of_the_dense_hessian(network):
    params, batches, loss = network
    vector = jax.tree.map(lambda leaf: jnp.ones_like(leaf) * 0.1, params)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    dense = jax.hessian(lambda at: loss(unflatten(at), batches[0]))(flat)
    found = jax.flatten_util.ravel_pytree(hessian_vector_product(loss, params, vector, batches[0]))[0]
    np.testing.assert_allclose(found, dense @ jax.flatten_util.ravel_pytree(vector)[0], rtol=1e-4, atol=1e-6)


def test_traces_are_within_their_standard_errors(network):
    params, batches, loss = network
    expected = dense_traces(params, batches, loss)
    rule = StoppingRule(0.15, max_probes=2000)
    found = hessian_traces(loss, params, batches, PATHS, key=jax.random.key(0), rule=rule)
    assert list(found) == list(PATHS)
    for path, estimate in found.items():
        assert abs(estimate.trace - expected[path]) < 3.5 * estimate.standard_error, path
        assert estimate.standard_error <= 0.15 * abs(estimate.trace)
        assert estimate.weights == params[path.split("/")[0]]["kernel"].size
    assert 8 < found[PATHS[0]].probes < 2000


def test_the_standard_error_is_that_of_repeated_estimates(network):
    params, batches, loss = network
    rule = StoppingRule(1e-9, min_probes=30, max_probes=30)
    keys = [jax.random.key(seed) for seed in range(40)]
    runs = [hessian_traces(loss, params, batches[:1], PATHS, key=key, rule=rule) for key in keys]
    for path in PATHS:
        spread = np.std([run[path].trace for run in runs], ddof=1)
        assert spread == pytest.approx(np.mean([run[path].standard_error for run in runs]), rel=0.35)


def test_devices_share_a_batch(network):
    params, batches, loss = network
    options = {"key": jax.random.key(0), "rule": StoppingRule(min_probes=4, max_probes=4)}
    alone = hessian_traces(loss, params, batches, PATHS, **options)
    shared = hessian_traces(loss, params, batches, PATHS, mesh=data_mesh(), **options)
    for path in PATHS:
        assert shared[path].trace == pytest.approx(alone[path].trace, rel=1e-4)


def test_probes_are_the_same_however_many_are_computed_together(network):
    params, batches, loss = network
    alone, together = (
        hessian_traces(
            loss,
            params,
            batches,
            PATHS,
            key=jax.random.key(0),
            rule=StoppingRule(1e-9, min_probes=10, max_probes=10, probes_together=count),
        )
        for count in (1, 4)
    )
    for path in PATHS:
        assert together[path].probes == 10
        assert together[path].trace == pytest.approx(alone[path].trace, rel=1e-5)
        assert together[path].standard_error == pytest.approx(alone[path].standard_error, rel=1e-4)


def test_probes_stop_when_all_layers_are_sure(network):
    params, batches, loss = network
    seen = []
    hessian_traces(
        loss,
        params,
        batches,
        PATHS,
        key=jax.random.key(0),
        rule=StoppingRule(0.2, min_probes=3, probes_together=1),
        report=lambda probes, estimates: seen.append((probes, largest_relative_error(estimates))),
    )
    assert [probes for probes, _ in seen] == list(range(2, len(seen) + 2))
    assert seen[-1][1] <= 0.2 < seen[-2][1]


def test_small_traces_count_as_a_share_of_the_largest():
    estimates = {"a": TraceEstimate(10.0, 1.0, 5, 4), "b": TraceEstimate(1e-6, 1e-3, 5, 4)}
    assert largest_relative_error(estimates, floor=1e-3) == pytest.approx(0.1)
    assert largest_relative_error(estimates, floor=0.0) == pytest.approx(1000)
    assert largest_relative_error({"a": TraceEstimate(0.0, 0.0, 5, 4)}) == 0
    assert TraceEstimate(-3.0, 1.0, 5, 4).mean_trace == 0 and estimates["a"].mean_trace == 2.5


def test_a_loss_that_overflows_names_the_layer(network):
    params, batches, _ = network

    def overflowing(params, batch):
        return jnp.sum(jnp.exp(100 * params["second"]["kernel"] ** 2) * 1e30) + jnp.sum(params["first"]["kernel"] ** 2)

    with pytest.raises(FloatingPointError, match="second/kernel"):
        hessian_traces(overflowing, params, batches, PATHS, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "at least one batch"),
        ({"paths": ()}, "at least one layer"),
        ({"paths": ("fourth/kernel",)}, "fourth/kernel.* no leaves"),
    ],
)
def test_wrong_arguments(network, changes, message):
    params, batches, loss = network
    arguments = {"batches": batches, "paths": PATHS, "key": jax.random.key(0)} | changes
    with pytest.raises(ValueError, match=message):
        hessian_traces(loss, params, arguments.pop("batches"), arguments.pop("paths"), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative_error": 0.0}, "relative_error must be positive"),
        ({"min_probes": 1}, "2 <= min_probes"),
        ({"max_probes": 3}, "2 <= min_probes"),
        ({"probes_together": 0}, "probes_together must be at least 1"),
    ],
)
def test_wrong_rules(options, message):
    with pytest.raises(ValueError, match=message):
        StoppingRule(**options)
