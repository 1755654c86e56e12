"""Two processes of two devices train as one of four does: in float64, where rounding doesn't grow into a difference."""

import json
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

STEPS = 50
PROGRAM = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
index, count, port, split = map(int, sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 4 // count)
jax.config.update("jax_enable_x64", True)
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
from qsv.models import Network
from qsv.quant import Rule, resolve
from qsv.training import (Classification, MarginSoftmax, Optimizer, Task, TrainState, data_mesh,
    learning_rate_schedule, make_train_step, margin_schedule, put_batch, put_state)

network = Network("resnet10", {"width": 2, "embedding_size": 8})
variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), network.init(jax.random.key(0)))
rate = learning_rate_schedule("constant", peak=0.02, final=0.02, num_steps=1)
loss = MarginSoftmax(5, scale=8.0)
margin = margin_schedule(final=0.2, rise_start=2, rise_end=5)
task = Task(network=network, objective=Classification(loss, margin, "data" if split else None),
    plan=resolve([Rule(".*", None)], variables["params"]), learning_rate=rate,
    transformation=Optimizer().transformation(rate), dtype="float64", split_head=bool(split))
head = loss.init(jax.random.key(1), 8).astype(jnp.float64)
state = TrainState.create(params=variables["params"], head=loss.padded(head) if split else head,
    batch_stats=variables["batch_stats"], transformation=task.transformation, seed=0)
mesh = data_mesh()
step, state = make_train_step(task, mesh), put_state(state, mesh, split_head=bool(split))
losses = []
for number in range(STEPS):
    rng = np.random.default_rng(number)
    label = rng.integers(0, 5, 8).astype(np.int32)
    tones = 0.2 * np.sin(np.arange(3200) * (0.02 + 0.02 * label[:, None]))
    batch = {"waveform": tones + 0.02 * rng.normal(size=tones.shape), "label": label}
    rows = slice(index * 8 // count, (index + 1) * 8 // count)
    state, metrics = step(state, put_batch({name: own[rows] for name, own in batch.items()}, mesh))
    losses.append(float(metrics["train/loss"]))
print(json.dumps(losses))
""".replace("STEPS", str(STEPS))


def losses(count, split):
    with socket.socket() as own:
        own.bind(("localhost", 0))
        port = own.getsockname()[1]
    root = pathlib.Path(__file__).parents[2]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(index), str(count), str(port), str(int(split))],
            cwd=root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(count)
    ]
    found = []
    for process in started:
        output, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]
        found.append(json.loads(output.splitlines()[-1]))
    assert all(own == found[0] for own in found)
    return found[0]


@pytest.mark.parametrize("split", [False, True])
def test_fifty_steps_are_the_same(split):
    one, two = losses(1, split), losses(2, split)
    assert len(one) == STEPS and one[-1] < 0.7 * one[0]
    np.testing.assert_allclose(two, one, rtol=1e-8)
