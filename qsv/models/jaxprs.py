"""Traced functions: the calls within them."""

from typing import Any

from jax.extend.core import ClosedJaxpr

# The parameter that holds the function.
_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def called(equation: Any) -> ClosedJaxpr | None:
    """The function that an equation calls once with its inputs; None where it is no such call."""
    if equation.primitive.name not in _CALLS:
        return None
    function = equation.params[_CALLS[equation.primitive.name]]
    return function if isinstance(function, ClosedJaxpr) else ClosedJaxpr(function, ())
