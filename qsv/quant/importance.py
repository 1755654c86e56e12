"""What each weight's squared error counts."""

import jax
import jax.numpy as jnp


def importance_of_each(importance: jax.typing.ArrayLike, weights: jax.Array) -> jax.Array:
    """The importance in the shape of the weights; raises ValueError where it doesn't broadcast to it."""
    try:
        return jnp.broadcast_to(jnp.asarray(importance), weights.shape)
    except ValueError as error:
        raise ValueError(
            f"importance {jnp.shape(importance)} doesn't broadcast against weights {weights.shape}"
        ) from error
