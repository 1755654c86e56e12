"""Masses and sums of the values in the cells of a codebook or of a histogram."""

import jax
import jax.numpy as jnp


def cell_sums(
    keys: jax.Array, values: jax.Array, masses: jax.Array | None, edges: jax.Array, origins: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Masses and sums of `mass (value - origin)` in the cells `edges[k-1] <= key < edges[k]`; NaN is in none.

    Without masses each value counts as 1, and the masses are integers.
    """
    # Scattering millions of weights to few cells is quick on a CPU. On an accelerator they queue for one
    # address, and the order of that queue, so the last bit of the sums, differs from run to run.
    return jax.lax.platform_dependent(keys, values, masses, edges, origins, cpu=_scattered_sums, default=_compared_sums)


def _scattered_sums(
    keys: jax.Array, values: jax.Array, masses: jax.Array | None, edges: jax.Array, origins: jax.Array
) -> tuple[jax.Array, jax.Array]:
    cells = jnp.searchsorted(edges, keys, side="right")
    cells = jnp.where(jnp.isnan(keys), origins.size, cells)
    deviations = values - origins.at[cells].get(mode="clip")
    each = jnp.int32(1) if masses is None else masses
    totals = jnp.zeros(origins.size, each.dtype).at[cells].add(each, mode="drop")
    weighted = deviations if masses is None else masses * deviations
    return totals, jnp.zeros(origins.size, jnp.float32).at[cells].add(weighted, mode="drop")


def _compared_sums(
    keys: jax.Array, values: jax.Array, masses: jax.Array | None, edges: jax.Array, origins: jax.Array
) -> tuple[jax.Array, jax.Array]:
    infinity = jnp.full(1, jnp.inf, edges.dtype)
    lower, upper = jnp.concatenate([-infinity, edges]), jnp.concatenate([edges, infinity])
    inside = (keys >= lower[:, None]) & (keys < upper[:, None])
    deviations = jnp.where(inside, values - origins[:, None], 0.0).astype(jnp.float32)
    if masses is None:
        return inside.sum(axis=1, dtype=jnp.int32), deviations.sum(axis=1)
    return jnp.where(inside, masses, 0.0).sum(axis=1), jnp.where(inside, masses * deviations, 0.0).sum(axis=1)


def mean_deviations(totals: jax.Array, sums: jax.Array) -> jax.Array:
    """Sums over totals; 0 for an empty cell."""
    return sums / jnp.where(totals > 0, totals, 1)
