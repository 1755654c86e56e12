"""Gauss-Newton traces against dense matrices, and against those of the Hessian where the two are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models import Network
from qsv.precision import (
    OutputLoss,
    StoppingRule,
    cosine_root,
    embedding_drift,
    embedding_loss,
    gauss_newton_traces,
    hessian_traces,
    softmax_root,
)
from qsv.quant import leaf_paths
from qsv.training import data_mesh

PATHS = ("first/kernel", "second/kernel", "third/kernel")


def losses_of_one_example(outputs, targets):
    """(name, root, loss of an output vector)."""
    return {
        "cosine": (cosine_root, lambda out: 1 - out @ targets / jnp.linalg.norm(out) / jnp.linalg.norm(targets)),
        "softmax": (softmax_root, lambda out: -jax.nn.log_softmax(out)[1]),
    }


@pytest.mark.parametrize("name", ["cosine", "softmax"])
def test_a_root_is_that_of_the_hessian_in_the_outputs(name):
    out = jnp.asarray([0.3, -1.2, 0.8])
    root, loss = losses_of_one_example(None, out)[name]
    matrix = jax.vmap(lambda sign: root(out[None], sign[None])[0])(jnp.eye(3)).T
    np.testing.assert_allclose(matrix @ matrix.T, jax.hessian(loss)(out), atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "softmax"])
def test_traces_are_those_of_the_dense_matrix(smooth_network, name):
    params, batches, _, outputs = smooth_network
    whole = jnp.concatenate(batches)
    kernels = {name: leaves["kernel"] for name, leaves in params.items()}

    def of_kernels(kernels, x):
        return outputs({name: {**params[name], "kernel": kernel} for name, kernel in kernels.items()}, x[None])[0]

    expected = dict.fromkeys(kernels, 0.0)
    for x in whole:
        out = of_kernels(kernels, x)
        curvature = jax.hessian(losses_of_one_example(None, out)[name][1])(out)
        jacobians = jax.jacobian(of_kernels)(kernels, x)
        for layer, jacobian in jacobians.items():
            flat = jacobian.reshape(len(out), -1)
            expected[layer] += float(jnp.trace(flat.T @ curvature @ flat)) / len(whole)
    loss = OutputLoss(outputs, losses_of_one_example(None, whole[0])[name][0])
    rule = StoppingRule(0.02, max_probes=3000)
    found = gauss_newton_traces(loss, params, batches, PATHS, key=jax.random.key(0), rule=rule)
    assert list(found) == list(PATHS)
    for path, estimate in found.items():
        assert abs(estimate.trace - expected[path.split("/")[0]]) < 3.5 * estimate.standard_error, path
        assert estimate.standard_error <= 0.02 * estimate.trace and estimate.weights == kernels[path[:-7]].size


def test_devices_share_a_batch_without_noise_between_them(smooth_network):
    params, batches, _, outputs = smooth_network
    loss = OutputLoss(outputs, softmax_root)
    options = {"key": jax.random.key(0), "rule": StoppingRule(1e-9, min_probes=400, max_probes=400)}
    alone = gauss_newton_traces(loss, params, batches[:1], PATHS, **options)
    shared = gauss_newton_traces(loss, params, batches[:1], PATHS, mesh=data_mesh(), **options)
    for path in PATHS:
        error = np.hypot(alone[path].standard_error, shared[path].standard_error)
        assert abs(shared[path].trace - alone[path].trace) < 3.5 * error
        assert shared[path].standard_error < alone[path].standard_error


@pytest.mark.parametrize("meshed", [False, True])
def test_the_drift_of_embeddings_has_the_hessian_of_its_loss_sooner(meshed):
    network = Network("resnet10", {"width": 4, "embedding_size": 8})
    variables = network.init(jax.random.key(0))
    waveform = np.random.default_rng(0).normal(0, 0.1, (4, 4000)).astype(np.float32)
    paths = [path for path, _ in leaf_paths(variables["params"]) if path.endswith("/kernel")]
    mesh = data_mesh() if meshed else None
    rule = StoppingRule(1e-9, min_probes=64, max_probes=64)
    arguments = (variables["params"], [waveform], paths)
    hessian = hessian_traces(
        embedding_loss(network, variables), *arguments, key=jax.random.key(0), rule=rule, mesh=mesh
    )
    found = gauss_newton_traces(
        embedding_drift(network, variables["batch_stats"]), *arguments, key=jax.random.key(1), rule=rule, mesh=mesh
    )
    for path in paths:
        error = np.hypot(hessian[path].standard_error, found[path].standard_error)
        assert abs(hessian[path].trace - found[path].trace) < 4 * error, path
    ratios = [found[path].standard_error / hessian[path].standard_error for path in paths]
    assert np.median(ratios) < 0.7


def test_wrong_arguments(smooth_network):
    params, batches, _, outputs = smooth_network
    loss = OutputLoss(outputs, softmax_root)
    with pytest.raises(ValueError, match="at least one batch"):
        gauss_newton_traces(loss, params, [], PATHS, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no leaves"):
        gauss_newton_traces(loss, params, batches, ("fourth",), key=jax.random.key(0))
    infinite = OutputLoss(lambda params, x: 1e30 * outputs(params, x), lambda out, signs: 1e30 * signs)
    with pytest.raises(FloatingPointError, match="curvature of first/kernel"):
        gauss_newton_traces(infinite, params, batches, PATHS, key=jax.random.key(0))
