"""The loop around a training step."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from qsv.training.checkpoints import Checkpoints
from qsv.training.metrics import MetricWriter
from qsv.training.sharding import put_batch
from qsv.training.state import TrainState
from qsv.training.step import TrainStep


class Loader(Protocol):
    """Endless batches, with a position that can be saved."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]:
        """JSON-compatible position after the last batch."""
        ...


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became NaN or infinite; the message names the step."""


@dataclasses.dataclass(frozen=True)
class Periods:
    """How often, in steps, things happen; 0 is never.

    Attributes:
        log: metrics are written (those of the last step too).
        save: a checkpoint is saved (the last step always is, where there are checkpoints).
        refresh: codebooks are refreshed.
    """

    log: int = 10
    save: int = 0
    refresh: int = 0


def fit(
    state: TrainState,
    loader: Loader,
    train_step: TrainStep,
    mesh: Mesh,
    *,
    num_steps: int,
    periods: Periods = Periods(),
    refresh: Callable[[TrainState], TrainState] | None = None,
    checkpoints: Checkpoints | None = None,
    writer: MetricWriter | None = None,
    description: str = "training",
) -> TrainState:
    """Train until step `num_steps`.

    The host reads a step's scalars only after it has dispatched the next step, so that devices never wait for it.

    Args:
        state: where to start; its buffers are donated.
        loader: batches of host arrays.
        train_step: from `make_train_step`.
        mesh: the devices.
        num_steps: step at which to stop (not a number of further steps).
        periods: how often to log, save and refresh.
        refresh: from `make_refresh`.
        checkpoints: where to save.
        writer: where metrics go.
        description: beside the progress bar.

    Returns:
        The state at step `num_steps`.

    Raises:
        NonFiniteLossError: before anything of that step is saved.
    """
    step = int(state.step)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    last_log = (step, time.monotonic())
    with tqdm(total=num_steps, initial=step, desc=description, unit="step", mininterval=1) as bar:

        def settle() -> None:
            """Read the pending step's scalars, check and write them."""
            nonlocal pending, last_log
            if pending is None:
                return
            number, scalars = pending[0], {name: float(value) for name, value in pending[1].items()}
            pending = None
            # A finite loss may have a gradient that isn't, and the parameters have taken its step already.
            loss, norm = scalars["train/loss"], scalars["train/gradient_norm"]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteLossError(
                    f"the loss is {loss} and the norm of its gradient {norm} at step {number}; lower the learning rate "
                    "or clip gradients"
                )
            bar.update(1)
            if periods.log and (number % periods.log == 0 or number == num_steps):
                now = time.monotonic()
                scalars["train/steps_per_second"] = (number - last_log[0]) / max(now - last_log[1], 1e-9)
                last_log = (number, now)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if writer is not None:
                    writer.write(number, scalars)

        while step < num_steps:
            batch = put_batch(next(loader), mesh)
            state, scalars = train_step(state, batch)
            step += 1
            settle()
            pending = (step, scalars)
            if refresh is not None and periods.refresh and step % periods.refresh == 0:
                state = refresh(state)
            if checkpoints is not None and (step == num_steps or (periods.save and step % periods.save == 0)):
                settle()
                checkpoints.save(state, loader.get_state())
        settle()
    return state
