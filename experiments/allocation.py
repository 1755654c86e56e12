"""Bits for every layer of a network, so that its packed file has the wanted size."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.configuration import setting
from experiments.models import MODEL_FILE, FloatModel
from experiments.patterns import check_pins, matching, pinned_bits
from experiments.sensitivity import Measured
from qsv.deploy import save
from qsv.precision import Allocation, Budget, allocate, four_section_search
from qsv.quant import Plan, Quantizer, Rule, init, leaf_paths, resolve

# Of the target: training can make a value more that doesn't fit into half precision.
_RESERVE = 5e-4
_BUDGET_TRIES = 8


@dataclasses.dataclass(frozen=True)
class AllocationConfig:
    """The wanted size, and what is fixed; every target that is given holds."""

    target_mbytes: float = setting(0.0, "Largest packed file, in megabytes (10^6 bytes).", minimum=0.0)
    target_bits: float = setting(0.0, "Most bits a weight: the mean over quantized weights, tables apart.", minimum=0.0)
    target_gbops: float = setting(
        0.0,
        "Most bit operations, in 10^9, for an utterance of --utterance_seconds, with activations of 32 bits.",
        minimum=0.0,
    )
    candidate_bits: tuple[str, ...] = setting((), "Bits to choose from; all that the scheme has when absent.")
    search: str = setting(
        "exact",
        "exact: integer program; four_section: the paper's, 2, 3 or 4 bits for each quarter of the layers by trace.",
        choices=["exact", "four_section"],
    )
    tie: tuple[str, ...] = setting((), "Regular expression over paths of kernels that get the same bits.")
    pin: tuple[str, ...] = setting((), "BITS:PATTERN, fixed bits for kernels whose paths match a regular expression.")

    def __post_init__(self) -> None:
        for bits in self.candidate_bits:
            if not bits.isdecimal():
                raise ValueError(f"--candidate_bits must be a whole number, got {bits!r}")
        check_pins(self.pin)

    @property
    def has_target(self) -> bool:
        """Whether any is given."""
        return bool(self.target_mbytes or self.target_bits or self.target_gbops)

    def require_target(self) -> None:
        """Raise ValueError where no target is given."""
        if not self.has_target:
            raise ValueError("--target_mbytes, --target_bits or --target_gbops must be given; see --help")


def choose(
    config: AllocationConfig,
    model: FloatModel,
    quantizers: Mapping[int, Quantizer],
    measured: Measured,
    *,
    compact: bool = True,
) -> Allocation:
    """The bits of least cost within the targets.

    Args:
        config: the targets.
        model: the float model.
        quantizers: {bits: specification}.
        measured: sensitivities.
        compact: how the file will be written.

    Raises:
        InfeasibleBudgetError: a target is too small; says by how much.
        ValueError: no target, a pattern that matches no kernel, or sensitivities that the search can't use.
    """
    config.require_target()
    max_bits, max_bops = config.target_bits or None, config.target_gbops * 1e9 or None
    if not config.target_mbytes:
        return _search(config, measured, Budget(max_bits=max_bits, max_bops=max_bops))
    # What of a file isn't codes and tables hardly changes with the bits, and is known once a file has been written.
    wanted = config.target_mbytes * 1e6 * (1 - _RESERVE)
    fewest = {layer.path: min(choice.bits for choice in layer.choices) for layer in measured.layers}
    allocation, overhead = Allocation.of(measured.layers, fewest), 0
    for _ in range(_BUDGET_TRIES):
        file_bytes = _file_bytes(plan_of(allocation.bits, quantizers, model), model, compact=compact)
        if overhead and file_bytes <= wanted:
            return allocation
        overhead = max(overhead, file_bytes - allocation.size_bytes)
        if overhead >= wanted:
            raise ValueError(
                f"--target_mbytes={config.target_mbytes:g}: what isn't quantized alone takes {overhead:,} bytes"
            )
        allocation = _search(config, measured, Budget(wanted - overhead, max_bits, max_bops))
    raise RuntimeError(f"found no allocation whose file has at most {wanted:,.0f} bytes")


def kernels(quantizer: Quantizer, float_layers: Sequence[str], params: Any) -> list[str]:
    """Paths of what can be quantized: every kernel but those to leave float."""
    kept = [Rule(pattern, None) for pattern in float_layers]
    return list(resolve([*kept, Rule(".*/kernel", quantizer), Rule(".*", None)], params).quantized)


def plan_of(bits: Mapping[str, int], quantizers: Mapping[int, Quantizer], model: FloatModel) -> Plan:
    """The plan of an allocation; what it doesn't name stays float."""
    own = [(path, quantizers[bits[path]] if path in bits else None) for path, _ in leaf_paths(model.params)]
    return Plan(tuple(own))


def _search(config: AllocationConfig, measured: Measured, budget: Budget) -> Allocation:
    layers, paths = measured.layers, [layer.path for layer in measured.layers]
    if config.search == "four_section":
        if config.tie or config.pin:
            raise ValueError("--search=four_section knows neither --tie nor --pin")
        if not measured.traces:
            raise ValueError(
                "--search=four_section sorts layers by trace; it needs --sensitivity=gauss_newton or hessian"
            )
        traces = {path: trace.mean_trace for path, trace in measured.traces.items()}
        return four_section_search(layers, traces, budget)
    ties = [matching(pattern, paths, flag="tie") for pattern in config.tie]
    return allocate(layers, budget, ties=ties, pinned=pinned_bits(config.pin, paths))


def _file_bytes(plan: Plan, model: FloatModel, *, compact: bool) -> int:
    """Size of the packed file; its tables hold anything: only their number counts."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda params: init(plan, params), model.params)
    qstate = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / MODEL_FILE
        # As many digits as a calibrated threshold has.
        save(path, model.network, plan, model.params, qstate, model.batch_stats, compact=compact, threshold=1 / 3)
        return path.stat().st_size
