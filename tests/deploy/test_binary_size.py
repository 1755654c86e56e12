"""One-bit networks fit into a megabyte, with everything that the file needs besides the bits."""

import jax
import numpy as np
import pytest

from qsv.deploy import load_packed, save
from qsv.models import Network, count_parameters
from qsv.quant import AdaptiveBinary, QTensor, Rule, init, leaf_paths, resolve


@pytest.mark.parametrize(("name", "most_bytes"), [("resnet34", 900_000), ("df_resnet56", 700_000)])
def test_a_binary_network_is_smaller_than_a_megabyte(tmp_path, name, most_bytes):
    network, rng = Network(name), np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    # Values in half precision's reach that aren't constant, as training leaves them.
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)
    params = variables["params"]
    plan = resolve([Rule(".*/kernel", AdaptiveBinary()), Rule(".*", None)], params)
    path = tmp_path / "model.safetensors"
    qstate, stats = init(plan, params), variables["batch_stats"]
    size = save(path, network, plan, params, qstate, stats, compact=True, threshold=1 / 3)
    assert path.stat().st_size == size.file_bytes <= most_bytes
    # Nothing but the bits is large.
    assert size.file_bytes < 1.3 * count_parameters(params) / 8
    kernels = [leaf for _, leaf in leaf_paths(load_packed(path).packed_params) if isinstance(leaf, QTensor)]
    assert {leaf.bits for leaf in kernels} == {1}
    assert sum(leaf.codes.size for leaf in kernels) > 0.98 * count_parameters(params)
