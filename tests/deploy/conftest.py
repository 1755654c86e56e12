import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from qsv.deploy import describe_plan, save_packed
from qsv.frontend import KaldiFbank
from qsv.models.network import Network
from qsv.quant import AdditivePowerOfTwo, KMeans, Plan, PowerOfTwo, Rule, Uniform, init, quantize, resolve


@dataclasses.dataclass(frozen=True)
class Trained:
    """A tiny network with a mixed plan, as training would leave it."""

    network: Network
    variables: dict[str, Any]
    plan: Plan
    qstate: dict[str, Any]
    packed: Any


@pytest.fixture(scope="session")
def trained() -> Trained:
    network = Network("resnet18", {"width": 4, "embedding_size": 16}, KaldiFbank(num_mels=40))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    # Fresh statistics are all zero or one, which would hide a mix-up.
    variables = {
        "params": jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f") / 5, shapes["params"]),
        "batch_stats": jax.tree.map(lambda leaf: rng.uniform(0.5, 2, leaf.shape).astype("f"), shapes["batch_stats"]),
    }
    policy = [
        Rule("embedding/kernel", Uniform(bits=8, channel_axes=(-1,))),
        Rule("stage1_block1/conv1/conv/kernel", PowerOfTwo(bits=4)),
        Rule("stage1_block1/conv2/conv/kernel", AdditivePowerOfTwo(bits=4, normalization="restore")),
        Rule("stage1_block2/conv1/conv/kernel", Uniform(bits=3)),
        Rule("stem/conv/kernel", KMeans(bits=2)),
        Rule(".*", None),
    ]
    plan = resolve(policy, variables["params"])
    qstate = init(plan, variables["params"])
    return Trained(network, variables, plan, qstate, quantize(plan, variables["params"], qstate))


@pytest.fixture(scope="session")
def model_bytes(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("packed") / "model.qsv"
    save_packed(
        path,
        trained.network,
        trained.packed,
        trained.variables["batch_stats"],
        plan_description=describe_plan(trained.plan),
        threshold=0.25,
        provenance={"run": "tiny", "eer_percent": 1.5},
    )
    return path.read_bytes()


@pytest.fixture
def model_file(model_bytes: bytes, tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "model.qsv"
    path.write_bytes(model_bytes)
    return path
