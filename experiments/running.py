"""A training in its folder: started, or resumed where its last checkpoint was."""

import contextlib
import pathlib
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from experiments.speech import report_bad_files
from qsv.data import TrainingLoader
from qsv.training import Checkpoints, MetricWriter, Periods, TrainState, TrainStep, fit, put_state

# Leaves room for all the programs of one more model.
_MANY_MAPS = 10_000


def run_or_resume(
    state: TrainState,
    loader: TrainingLoader,
    train_step: TrainStep,
    mesh: Mesh,
    *,
    workdir: pathlib.Path,
    num_steps: int,
    periods: Periods,
    refresh: Callable[[TrainState], TrainState] | None = None,
    description: str = "training",
    split_head: bool = False,
) -> TrainState:
    """Train until step `num_steps`, with checkpoints and metrics in `workdir`; closes the loader.

    Args:
        state: where a fresh training starts.
        loader: its batches.
        train_step: from `make_train_step`.
        mesh: the devices.
        workdir: folder of `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
        num_steps: step at which to stop.
        periods: how often to log, save and refresh.
        refresh: from `make_refresh`.
        description: beside the progress bar.
        split_head: as the step's task says.

    Returns:
        The state at step `num_steps`.
    """
    checkpoints = Checkpoints(workdir / "checkpoints")
    if checkpoints.latest_step is None:
        state = put_state(state, mesh, split_head=split_head)
    else:
        state, position = checkpoints.restore(state, mesh, split_head=split_head)
        loader.set_state(position)
        print(f"resumed at step {int(state.step)}")
    is_first = jax.process_index() == 0
    with MetricWriter(workdir) if is_first else contextlib.nullcontext() as writer:
        state = fit(
            state,
            loader,
            train_step,
            mesh,
            num_steps=num_steps,
            periods=periods,
            refresh=refresh,
            checkpoints=checkpoints,
            writer=writer,
            description=description,
        )
    checkpoints.close()
    report_bad_files(loader.bad_files)
    loader.close()
    return state


def free_programs() -> None:
    """Forget compiled programs where there are many: between models or layers, in experiments that make many.

    Every program takes memory maps, of which a Linux process can have 65,530; past that the next one crashes it.
    """
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > _MANY_MAPS:
        jax.clear_caches()
