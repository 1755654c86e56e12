"""Checkpoints: the training state and the data position, saved together and atomically."""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from qsv.training.sharding import state_shardings
from qsv.training.state import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint can't be read or written; the message names the folder."""


class Checkpoints:
    """Numbered checkpoints of one run, the newest few kept.

    A checkpoint appears under its step number only when all of it is on disk, so a kill at any moment leaves the
    previous one whole.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_position: dict[str, Any]) -> None:
        """Save under the state's step.

        Args:
            state: the training state.
            data_position: of the loader, JSON-compatible: `TrainingLoader.get_state()` after the last batch used.

        Raises:
            CheckpointError: the disk is full or can't be written; earlier checkpoints are untouched.
        """
        step = int(state.step)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position))
        try:
            self._manager.save(step, args=items, force=True)
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"can't save step {step} in {self.folder}: {error}. Earlier checkpoints are untouched; "
                "free some space and start the same command again"
            ) from error

    def restore(self, like: TrainState, mesh: Mesh, *, split_head: bool = False) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint.

        Args:
            like: a state of the same structure, shapes and dtypes, such as a fresh one.
            mesh: where the arrays go.
            split_head: as in `put_state`.

        Returns:
            The state and the data position.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another network or optimizer.
        """
        step = self.latest_step
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.folder}")
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            like,
            state_shardings(like, mesh, split_head=split_head),
        )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # orbax and tensorstore raise many types for the same few causes
            raise CheckpointError(
                f"can't restore {self.folder / str(step)}: {error}. It is damaged or was written with other model or "
                "optimizer flags; use those, or delete this folder to resume from the checkpoint before"
            ) from error
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Release the manager's resources."""
        self._manager.close()
