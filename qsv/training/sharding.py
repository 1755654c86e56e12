"""Where arrays live: a mesh over all devices, batches split along it, everything else on each device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis `data` over `devices` (all of them by default)."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the mesh."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Move one process's part of a batch to its devices.

    Raises:
        ValueError: the batch doesn't split evenly over the mesh.
    """
    local = len(mesh.local_devices)
    for name, array in batch.items():
        if len(array) % local:
            raise ValueError(f"batch of {len(array)} ({name!r}) doesn't split over {local} devices")
    sharding = along_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def state_shardings(state: Any, mesh: Mesh, *, split_head: bool = False) -> Any:
    """Where the leaves of a training state live, in a tree like it.

    Args:
        state: a `TrainState`, of arrays or shapes.
        mesh: the devices.
        split_head: whether the classes of the head, and what an optimizer keeps of them, are split over the devices.
    """
    everywhere, columns = replicated(mesh), NamedSharding(mesh, PartitionSpec(None, "data"))

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = {getattr(key, "name", None) or getattr(key, "key", None) for key in path}
        return columns if split_head and "head" in names and leaf.ndim == 2 else everywhere

    return jax.tree_util.tree_map_with_path(place, state)


def put_state(state: Any, mesh: Mesh, *, split_head: bool = False) -> Any:
    """Put a training state where `state_shardings` says, without donating the given one; the same in all processes."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, state, state_shardings(state, mesh, split_head=split_head))


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of every leaf on each device, without donating the given one."""
    place = replicated(mesh)
    if mesh.is_multi_process:
        # Every process has the same values, which `device_put` would compare over the network.
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(place, np.asarray(leaf)), tree)
    # Copied first: `device_put` reuses the buffer of an array that is on one of the devices already, even with
    # may_alias=False, and a step that donates it would then free what somebody else holds.
    return jax.device_put(jax.tree.map(jnp.copy, tree), place)
