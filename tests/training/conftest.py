"""A tiny training task, with synthetic batches that a loader hands out."""

import jax
import numpy as np
import pytest

from qsv.frontend import SpecAugment
from qsv.models import Network
from qsv.quant import KMeans, Rule, init, resolve
from qsv.training import (
    Classification,
    MarginSoftmax,
    Optimizer,
    Task,
    TrainState,
    learning_rate_schedule,
    margin_schedule,
)

NUM_SPEAKERS = 5


class SyntheticLoader:
    """Batches that depend on a position only, like a resumable loader's."""

    def __init__(self, batch_size=8, samples=3200, dtype=np.int16):
        self.position = 0
        self.batch_size, self.samples, self.dtype = batch_size, samples, dtype

    def __next__(self):
        rng = np.random.default_rng(self.position)
        self.position += 1
        label = rng.integers(0, NUM_SPEAKERS, self.batch_size).astype(np.int32)
        phase = np.arange(self.samples) * (0.02 + 0.02 * label[:, None])
        waveform = 0.2 * np.sin(phase) + 0.02 * rng.normal(size=(self.batch_size, self.samples))
        if self.dtype == np.int16:
            waveform = waveform * 32767
        return {"waveform": waveform.astype(self.dtype), "label": label}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


@pytest.fixture
def make_loader():
    return SyntheticLoader


@pytest.fixture
def make_task():
    """(task, state) of a tiny network; `bits` quantizes its kernels by k-means, or else a `quantizer`."""

    def make(*, bits=None, quantizer=None, spec_augment=True, optimizer=None, num_steps=20, dtype="float32", peak=0.05):
        network = Network("resnet10", {"width": 2, "embedding_size": 8})
        variables = network.init(jax.random.key(0))
        quantizer = quantizer or (bits and KMeans(bits))
        policy = [Rule(".*/kernel", quantizer), Rule(".*", None)]
        plan = resolve(policy, variables["params"])
        learning_rate = learning_rate_schedule("cosine", peak=peak, final=1e-4, num_steps=num_steps)
        transformation = (optimizer or Optimizer()).transformation(learning_rate)
        loss = MarginSoftmax(NUM_SPEAKERS, scale=8.0)
        task = Task(
            network=network,
            objective=Classification(loss, margin_schedule(final=0.2, rise_start=2, rise_end=5)),
            plan=plan,
            learning_rate=learning_rate,
            transformation=transformation,
            spec_augment=SpecAugment(max_time_frames=3, max_mels=4) if spec_augment else None,
            dtype=dtype,
        )
        state = TrainState.create(
            params=variables["params"],
            head=loss.init(jax.random.key(1), 8),
            batch_stats=variables["batch_stats"],
            transformation=transformation,
            seed=3,
            qstate=init(plan, variables["params"]),
        )
        return task, state

    return make


def tree_equal(first, second):
    return jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), first, second))


@pytest.fixture
def assert_trees_equal():
    def check(first, second):
        assert jax.tree.structure(first) == jax.tree.structure(second)
        assert tree_equal(first, second)

    return check
