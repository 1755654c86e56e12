"""The loop: exact resume after a kill, checkpoints whole, non-finite losses stopped, metrics written."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qsv.training import (
    CheckpointError,
    Checkpoints,
    MetricWriter,
    NonFiniteLossError,
    Periods,
    TrainState,
    data_mesh,
    fit,
    make_refresh,
    make_train_step,
    put_replicated,
    read_metrics,
)


def train(task, state, loader, folder, num_steps, stop_after=None):
    """Train with checkpoints every 3 steps; `stop_after` ends the run early, as a kill would."""
    mesh = data_mesh(jax.devices()[:1])
    checkpoints = Checkpoints(folder / "checkpoints")
    if checkpoints.latest_step is None:
        state = put_replicated(state, mesh)
    else:
        state, position = checkpoints.restore(state, mesh)
        loader.set_state(position)
    with MetricWriter(folder) as writer:
        return fit(
            state,
            loader,
            make_train_step(task, mesh),
            mesh,
            num_steps=stop_after or num_steps,
            periods=Periods(log=1, save=3, refresh=2),
            refresh=make_refresh(task.plan, mesh),
            checkpoints=checkpoints if stop_after is None else _OnlyPeriodic(checkpoints, stop_after),
            writer=writer,
        )


class _OnlyPeriodic:
    """Checkpoints without the last one: what is there when a run is killed just after that step."""

    def __init__(self, checkpoints, last):
        self.checkpoints, self.last = checkpoints, last

    def save(self, state, position):
        if int(state.step) != self.last:
            self.checkpoints.save(state, position)


def losses(folder):
    return {line["step"]: line["train/loss"] for line in read_metrics(folder)}


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(make_task, make_loader, tmp_path, assert_trees_equal):
    task, state = make_task(bits=4)
    whole = train(task, state, make_loader(), tmp_path / "whole", 10)
    train(task, state, make_loader(), tmp_path / "cut", 10, stop_after=5)
    resumed = train(task, state, make_loader(), tmp_path / "cut", 10)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10]
    assert_trees_equal(resumed, whole)


def test_the_loss_after_a_non_finite_one_is_never_saved(make_task, make_loader, tmp_path):
    task, state = make_task()

    class Poisoned(make_loader):
        def __next__(self):
            batch = super().__next__()
            if self.position == 5:
                batch["waveform"][0] = np.nan
            return batch

    with pytest.raises(NonFiniteLossError, match="step 5"):
        train(task, state, Poisoned(dtype=np.float32), tmp_path, 10)
    assert Checkpoints(tmp_path / "checkpoints").latest_step == 3


def test_a_non_finite_gradient_of_a_finite_loss_is_never_saved(make_loader, tmp_path):
    @jax.jit
    def train_step(state, batch):
        # The square root's slope is infinite where the third step brings it.
        loss, gradient = jax.value_and_grad(lambda params: jnp.sqrt(jnp.sum(params["w"])))(state.params)
        params = jax.tree.map(lambda leaf: leaf - 1, state.params)
        metrics = {"train/loss": loss, "train/gradient_norm": optax.tree.norm(gradient)}
        return dataclasses.replace(state, params=params, step=state.step + 1), metrics

    state = TrainState.create(
        params={"w": jnp.array([2.0])}, head={}, batch_stats={}, transformation=optax.identity(), seed=0
    )
    mesh, checkpoints = data_mesh(jax.devices()[:1]), Checkpoints(tmp_path)
    with pytest.raises(NonFiniteLossError, match="loss is 0.0 and the norm of its gradient inf at step 3"):
        fit(
            put_replicated(state, mesh),
            make_loader(),
            train_step,
            mesh,
            num_steps=3,
            periods=Periods(save=1),
            checkpoints=checkpoints,
        )
    assert checkpoints.latest_step == 2


def test_metrics_with_a_period_of_zero_are_never_written(make_task, make_loader, tmp_path):
    task, state = make_task()
    mesh = data_mesh(jax.devices()[:1])
    with MetricWriter(tmp_path) as writer:
        step = make_train_step(task, mesh)
        fit(put_replicated(state, mesh), make_loader(), step, mesh, num_steps=2, periods=Periods(log=0), writer=writer)
    assert read_metrics(tmp_path) == []


def test_a_damaged_checkpoint_is_refused_by_name(make_task, make_loader, tmp_path):
    task, state = make_task()
    train(task, state, make_loader(), tmp_path, 3)
    folder = tmp_path / "checkpoints" / "3"
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match="checkpoints/3.*damaged"):
        train(task, state, make_loader(), tmp_path, 5)


def test_a_checkpoint_of_another_network_is_refused(make_task, make_loader, tmp_path):
    task, state = make_task()
    train(task, state, make_loader(), tmp_path, 3)
    other_task, other_state = make_task(bits=4)
    with pytest.raises(CheckpointError, match="other model or optimizer flags"):
        train(other_task, other_state, make_loader(), tmp_path, 5)


def test_no_checkpoint(make_task, tmp_path):
    _, state = make_task()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpoints(tmp_path).restore(state, data_mesh(jax.devices()[:1]))


def test_metrics_are_json_lines_with_units(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 2.5, "eval/eer_percent": float("nan")})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text)
    assert line["step"] == 1 and line["train/loss"] == 2.5 and line["eval/eer_percent"] is None
    assert any((tmp_path / "tensorboard").iterdir())


FULL_DISK = """
import dataclasses, resource, signal, sys
import jax, optax
from qsv.training import CheckpointError, Checkpoints, TrainState, data_mesh

def state(step):
    params = {"w": jax.random.normal(jax.random.key(step), (4_000_000,))}
    made = TrainState.create(
        params=params, head=jax.numpy.ones(2), batch_stats={}, transformation=optax.identity(), seed=0
    )
    return dataclasses.replace(made, step=jax.numpy.int32(step))

checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(state(1), {"position": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, unlimited))
try:
    checkpoints.save(state(2), {"position": 2})
except CheckpointError as error:
    print("refused", "step 2" in str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
restored, position = Checkpoints(sys.argv[1]).restore(state(0), data_mesh(jax.devices()[:1]))
print("restored", int(restored.step), bool((restored.params["w"] == state(1).params["w"]).all()), position)
"""


def test_a_full_disk_leaves_the_earlier_checkpoint(make_task, make_loader, tmp_path):
    """A process whose files may not grow stands for a full disk."""
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script, tmp_path / "run"], capture_output=True, text=True, env=environment)
    assert "refused True" in done.stdout, done.stderr
    assert "restored 1 True {'position': 1}" in done.stdout, done.stderr
