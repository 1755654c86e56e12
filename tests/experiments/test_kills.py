"""A hundred kills -9 at random moments of training, checkpointing and preparation: nothing is lost or damaged."""

import collections
import dataclasses
import filecmp
import itertools
import shutil
import signal
import time

import numpy as np
import pytest

from experiments import prepare, train
from qsv.data.prepared import open_prepared
from qsv.training.metrics import read_metrics

pytestmark = pytest.mark.slow

TRAINING_KILLS, PREPARATION_KILLS = 70, 30
STEPS_A_KILL, SAVE_STEPS = 6, 2


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def checkpoints(workdir):
    """Steps of the checkpoints that are whole."""
    return {int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()}


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.001)
    return process.poll() is None


def test_trainings_go_on_from_their_last_checkpoint_with_the_same_losses(
    tmp_path, make_train_config, start_experiment, as_flags
):
    """Half of the kills come while a checkpoint is being written, the others at any time after one."""
    rng, steps = np.random.default_rng(0), TRAINING_KILLS * STEPS_A_KILL
    workdir, whole = tmp_path / "killed", tmp_path / "whole"
    config = dataclasses.replace(make_train_config(whole, steps=steps), save_steps=SAVE_STEPS)
    train.run(config)
    expected = {line["step"]: line["train/loss"] for line in read_metrics(whole)}
    assert sorted(expected) == list(range(1, steps + 1))

    arguments = as_flags(dataclasses.replace(config, workdir=str(workdir)))
    resumed_at, kills = [], collections.Counter()
    for number in itertools.count():
        before = max(checkpoints(workdir), default=0) if workdir.exists() else 0
        process = start_experiment("train", *arguments, "--cpu_devices=4")
        if kills.total() == TRAINING_KILLS:
            output, errors = process.communicate()
            assert process.returncode == 0, errors[-3000:]
        elif wait_for(process, lambda: max(checkpoints(workdir), default=0) > before):  # noqa: B023
            if number % 2:
                is_writing = wait_for(process, lambda: any((workdir / "checkpoints").glob("*tmp*")))
                kills["while a checkpoint was written" if is_writing else "later"] += 1
                time.sleep(rng.uniform(0, 0.02))
            else:
                kills["at any time"] += 1
                time.sleep(rng.exponential(0.1))
            if process.poll() is None:
                kill(process)
        lines = list(read_metrics(workdir))
        resumed_at.append((before, lines))
        if process.poll() == 0:
            break
    assert kills.total() == TRAINING_KILLS and kills["while a checkpoint was written"] > TRAINING_KILLS / 4

    # Every loss of every attempt is that of the training that nobody killed, to the last bit.
    lines = resumed_at[-1][1]
    assert all(line["train/loss"] == expected[line["step"]] for line in lines)
    assert {line["step"] for line in lines} == set(expected)
    # Each attempt begins right after the last whole checkpoint of the one before.
    seen = 0
    for before, so_far in resumed_at:
        if len(so_far) > seen:
            assert so_far[seen]["step"] == before + 1
        seen = len(so_far)
    for name in ("model.safetensors", "head.safetensors"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_a_preparation_is_whole_or_not_there(tmp_path, speech, start_experiment, as_flags):
    source, rng = tmp_path / "source", np.random.default_rng(1)
    for number, path in itertools.product(range(40), sorted(speech.train.rglob("*.wav"))):
        copy = source / f"speaker{number}" / f"{path.parent.name}_{path.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    config = prepare.PrepareConfig(source=str(source), runner="", shard_mbytes=0.5, encoding="flac")
    begun = time.monotonic()
    whole = prepare.run(dataclasses.replace(config, output=str(tmp_path / "whole")))
    seconds = time.monotonic() - begun

    output, kills = tmp_path / "killed", 0
    arguments = as_flags(dataclasses.replace(config, output=str(output)))
    while kills < PREPARATION_KILLS:
        process = start_experiment("prepare", *arguments)
        assert wait_for(process, lambda: any(output.rglob("incomplete.*")) or any(output.rglob("report.json")))
        time.sleep(rng.uniform(0, 1.2 * seconds))
        if process.poll() is None:
            kill(process)
            kills += 1
        folders = [path for path in output.rglob("1.0.0") if path.is_dir()]
        if folders:
            # Whole, with or without its report.
            assert len(open_prepared(output)) == len(open_prepared(whole))
            shutil.rmtree(output)
        elif output.exists():
            with pytest.raises(FileNotFoundError):
                open_prepared(output)
    process = start_experiment("prepare", *arguments)
    process.communicate()
    assert process.returncode == 0
    (folder,) = (path for path in output.rglob("1.0.0") if path.is_dir())
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    assert filecmp.cmpfiles(folder, whole, names, shallow=False)[0] == names
    assert [path for path in output.rglob("incomplete.*")] == []
