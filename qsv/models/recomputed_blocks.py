"""Activations inside blocks computed anew in the backward pass, without a change of the network."""

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn


@contextlib.contextmanager
def recomputed_blocks(wanted: bool = True) -> Iterator[None]:
    """Inside, the backward pass of a Linen module recomputes what is inside of each of its submodules.

    Only what goes into and comes out of the direct submodules is kept from the forward pass: for a network of blocks
    the memory of one block in place of all, for the time of another forward pass. False does nothing.

    >>> import jax, jax.numpy as jnp
    >>> net = nn.Sequential([nn.Dense(2), jnp.tanh])
    >>> variables = net.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> def loss(variables):
    ...     return net.apply(variables, jnp.ones((1, 3))).sum()
    >>> with recomputed_blocks():
    ...     "remat" in str(jax.make_jaxpr(jax.grad(loss))(variables))
    True

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv 1604.06174), with the network's own
    blocks as segments.
    """
    if not wanted:
        yield
        return
    started: set[tuple[str, ...]] = set()

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = context.module.path
        if context.method_name != "__call__" or len(path) != 1 or path in started:
            return call(*args, **kwargs)

        # Called on the module that the transformation makes, and once more by this function.
        def forward(module: nn.Module, *arrays: Any) -> Any:
            started.add(path)
            try:
                return module(*arrays, **kwargs)
            finally:
                started.discard(path)

        return nn.remat(forward)(context.module, *args)

    with nn.intercept_methods(intercept):
        yield
