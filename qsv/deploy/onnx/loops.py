"""JAX's loops over a leading axis as ONNX's Scan."""

from collections.abc import Callable, Sequence
from typing import Any

from onnx import helper

from qsv.deploy.onnx.graph import Graph
from qsv.deploy.onnx.tensors import Tensor, Value, Weight, as_tensor, onnx_type, plain, straight

# (jaxpr, constants, arguments) -> outputs
Run = Callable[[Any, Sequence[Any], Sequence[Value]], list[Value]]


def scan(graph: Graph, run: Run, equation: Any, *inputs: Value) -> list[Tensor]:
    """`scan`: carried arrays, then arrays whose leading axis is walked along; the body sees all else from outside."""
    parameters = equation.params
    body, constants, carried = parameters["jaxpr"], parameters["num_consts"], parameters["num_carry"]
    if not len(inputs) - constants:
        raise NotImplementedError("a loop over nothing")
    own = [_whole(graph, value) for value in inputs[constants:]]
    variables = body.jaxpr.invars[constants:]
    names = [graph.new_name() for _ in variables]
    arguments = [
        Tensor(name, tuple(variable.aval.shape), straight(len(variable.aval.shape)))
        for name, variable in zip(names, variables, strict=True)
    ]
    with graph.body() as nodes:
        outputs = run(body.jaxpr, body.consts, [*inputs[:constants], *arguments])
        # A value that the body hands on as it came needs a node of its own.
        results = [graph.add("Identity", _whole(graph, value).name) for value in outputs]
    types = [onnx_type(variable.aval.dtype) for variable in (*variables, *body.jaxpr.outvars)]
    infos = [
        helper.make_tensor_value_info(name, kind, None) for name, kind in zip((*names, *results), types, strict=True)
    ]
    inner = helper.make_graph(nodes, graph.new_name(), infos[: len(names)], infos[len(names) :])
    count = len(equation.outvars)
    direction = [int(parameters["reverse"])]
    # ONNX has no type for an empty list.
    outward = {"scan_output_directions": direction * (count - carried)} if count > carried else {}
    made = graph.add(
        "Scan",
        *(value.name for value in own),
        outputs=count,
        body=inner,
        num_scan_inputs=len(own) - carried,
        scan_input_directions=direction * (len(own) - carried),
        **outward,
    )
    made = [made] if count == 1 else made
    return [
        Tensor(name, tuple(out.aval.shape), straight(len(out.aval.shape)))
        for name, out in zip(made, equation.outvars, strict=True)
    ]


def _whole(graph: Graph, value: Value) -> Tensor:
    if isinstance(value, Weight):
        raise NotImplementedError("a loop along a weight")
    return plain(graph, as_tensor(graph, value))
