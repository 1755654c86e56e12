"""How many bits each layer gets: an exact integer program, and the paper's search over four sections."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

_SECTIONS = 4
_SECTION_BITS = (2, 3, 4)
# HiGHS stops at an absolute gap of 1e-6; costs are scaled to make that a relative one of 1e-10.
_LARGEST_COST = 1e4


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to quantize a layer.

    Attributes:
        bits: bits a weight.
        cost: what it costs in accuracy, such as a sensitivity; lower is better.
        size_bytes: of the layer in the packed file, tables included.
        bops: bit operations, bits of a weight times those of an activation times multiplications.
    """

    bits: int
    cost: float
    size_bytes: int
    bops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer and the ways to quantize it.

    Attributes:
        path: of its kernel in the parameter tree.
        weights: how many it has.
        choices: at least one, each of other bits.

    Raises:
        ValueError: no choices, two of the same bits, or one that isn't finite.
    """

    path: str
    weights: int
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        bits = [choice.bits for choice in self.choices]
        if not bits or len(set(bits)) < len(bits):
            raise ValueError(f"{self.path} needs choices of different bits, got {bits}")
        wrong = [choice for choice in self.choices if not np.isfinite([choice.cost, choice.bops]).all()]
        if wrong:
            raise ValueError(f"{self.path}: costs and bops must be finite, got {wrong[0]}")

    def choice(self, bits: int) -> Choice:
        """The choice of so many bits; raises ValueError where there is none."""
        for choice in self.choices:
            if choice.bits == bits:
                return choice
        raise ValueError(f"{self.path} can't have {bits} bits, only {sorted(choice.bits for choice in self.choices)}")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What an allocation may take; None is as much as it likes.

    Attributes:
        max_bytes: sum of the layers' bytes.
        max_bits: average bits a weight, tables not counted.
        max_bops: sum of the layers' bit operations.
    """

    max_bytes: float | None = None
    max_bits: float | None = None
    max_bops: float | None = None

    def limits(self, layers: Sequence[Layer]) -> dict[str, float]:
        """{what is limited: its limit}; average bits as the sum of all weights' bits."""
        weights = sum(layer.weights for layer in layers)
        limits = {
            "bytes": self.max_bytes,
            "bits": None if self.max_bits is None else self.max_bits * weights,
            "bops": self.max_bops,
        }
        return {name: float(limit) for name, limit in limits.items() if limit is not None}


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Bits for every layer.

    Attributes:
        bits: {path: bits} in the order of the layers.
        cost: sum of the layers' costs.
        size_bytes: sum of their bytes.
        average_bits: bits a weight, tables not counted.
        bops: sum of their bit operations.
    """

    bits: Mapping[str, int]
    cost: float
    size_bytes: int
    average_bits: float
    bops: float

    @classmethod
    def of(cls, layers: Sequence[Layer], bits: Mapping[str, int]) -> "Allocation":
        """The allocation of given bits."""
        chosen = [layer.choice(bits[layer.path]) for layer in layers]
        weights = sum(layer.weights for layer in layers)
        spent = sum(layer.weights * choice.bits for layer, choice in zip(layers, chosen, strict=True))
        return cls(
            {layer.path: choice.bits for layer, choice in zip(layers, chosen, strict=True)},
            float(sum(choice.cost for choice in chosen)),
            sum(choice.size_bytes for choice in chosen),
            spent / max(weights, 1),
            float(sum(choice.bops for choice in chosen)),
        )


class InfeasibleBudgetError(ValueError):
    """No allocation keeps a budget; the message says by how much, and which layer takes most."""


def allocate(
    layers: Sequence[Layer],
    budget: Budget,
    *,
    ties: Sequence[Collection[str]] = (),
    pinned: Mapping[str, int] | None = None,
) -> Allocation:
    """The allocation of least cost within a budget, by an integer program.

        min sum_i sum_b x_ib cost_ib,   x_ib in {0, 1},   sum_b x_ib = 1,   sum_i sum_b x_ib use_ib <= limit

    Args:
        layers: with their choices.
        budget: limits, all of which hold.
        ties: groups of paths that must have the same bits, such as a block's shortcut and its last convolution.
        pinned: {path: bits} that are fixed.

    Returns:
        The best allocation, exact but for a relative gap of 1e-10 of the largest cost.

    Raises:
        InfeasibleBudgetError: a limit is below what the fewest bits take.
        ValueError: no layers, an unknown path, or tied layers without bits in common.

    Source: HAWQ-V3's integer program, Yao et al. 2021 (arXiv 2011.10680); solved by HiGHS.
    """
    if not layers:
        raise ValueError("there are no layers to allocate bits to")
    groups = _grouped(layers, ties, dict(pinned or {}))
    limits = budget.limits(layers)
    _check_feasible(groups, limits)
    options = [(index, bits) for index, group in enumerate(groups) for bits in group.bits]
    costs = np.array([groups[index].cost(bits) for index, bits in options])
    uses = {name: np.array([groups[index].use(name, bits) for index, bits in options]) for name in limits}
    owner = np.array([index for index, _ in options])
    chosen = _solve(costs, owner, len(groups), uses, limits)
    bits = {layer.path: bits for index, bits in itertools.compress(options, chosen) for layer in groups[index].layers}
    return Allocation.of(layers, bits)


def pareto_front(
    layers: Sequence[Layer],
    budgets: Sequence[Budget],
    *,
    ties: Sequence[Collection[str]] = (),
    pinned: Mapping[str, int] | None = None,
) -> list[Allocation]:
    """The best allocations for several budgets, those that another one beats left out.

    Args:
        layers: as for `allocate`, and so are the options.
        budgets: the budgets; infeasible ones are left out.
        ties: as for `allocate`.
        pinned: as for `allocate`.

    Returns:
        By ascending bytes and descending cost.
    """
    found = []
    for budget in budgets:
        try:
            found.append(allocate(layers, budget, ties=ties, pinned=pinned))
        except InfeasibleBudgetError:
            continue
    front: list[Allocation] = []
    for allocation in sorted(found, key=lambda one: (one.size_bytes, one.cost)):
        if not front or allocation.cost < front[-1].cost:
            front.append(allocation)
    return front


def four_section_search(layers: Sequence[Layer], traces: Mapping[str, float], budget: Budget) -> Allocation:
    """The paper's search: layers sorted by trace, in four sections of one bit width each.

    Args:
        layers: with choices of 2, 3 and 4 bits.
        traces: {path: mean Hessian trace}.
        budget: limits, all of which hold.

    Returns:
        The cheapest of the 81 combinations of {2, 3, 4}^4 that keep the budget.

    Raises:
        InfeasibleBudgetError: none does.
        ValueError: a layer lacks a trace, or one of the widths.

    Source: Liu et al. 2024 (arXiv 2406.05359), which gives the sections as equal numbers of layers, as far as its text
    can be read; `allocate` is never worse.
    """
    missing = [layer.path for layer in layers if layer.path not in traces]
    if missing:
        raise ValueError(f"no trace for {missing}")
    ordered = sorted(layers, key=lambda layer: traces[layer.path])
    sections = np.array_split(np.arange(len(ordered)), _SECTIONS)
    limits = budget.limits(layers)
    best: Allocation | None = None
    for widths in itertools.product(_SECTION_BITS, repeat=_SECTIONS):
        bits = {ordered[i].path: width for section, width in zip(sections, widths, strict=True) for i in section}
        allocation = Allocation.of(layers, bits)
        used = {name: sum(_use(layer, name, bits[layer.path]) for layer in layers) for name in limits}
        if all(used[name] <= limit for name, limit in limits.items()):
            best = allocation if best is None or allocation.cost < best.cost else best
    if best is None:
        _check_feasible(_grouped(layers, (), {}), limits)
        raise InfeasibleBudgetError(f"no combination of {_SECTION_BITS} bits in {_SECTIONS} sections keeps {budget}")
    return best


@dataclasses.dataclass(frozen=True)
class _Group:
    """Layers that have the same bits."""

    layers: tuple[Layer, ...]
    bits: tuple[int, ...]

    def cost(self, bits: int) -> float:
        return sum(layer.choice(bits).cost for layer in self.layers)

    def use(self, limited: str, bits: int) -> float:
        return float(sum(_use(layer, limited, bits) for layer in self.layers))


def _use(layer: Layer, limited: str, bits: int) -> float:
    """What a layer takes of a limit."""
    choice = layer.choice(bits)
    return {"bytes": choice.size_bytes, "bits": bits * layer.weights, "bops": choice.bops}[limited]


def _grouped(layers: Sequence[Layer], ties: Sequence[Collection[str]], pinned: dict[str, int]) -> list[_Group]:
    """Tied layers together, with the bits that all of them can have."""
    by_path = {layer.path: layer for layer in layers}
    if len(by_path) < len(layers):
        raise ValueError("two layers have the same path")
    unknown = [path for path in (*itertools.chain(*ties), *pinned) if path not in by_path]
    if unknown:
        raise ValueError(f"ties or pinned bits name {unknown}, which are no layers")
    group_of = {path: {path} for path in by_path}
    for tie in ties:
        merged = set().union(*(group_of[path] for path in tie))
        group_of |= dict.fromkeys(merged, merged)
    groups = []
    for paths in {id(group): group for group in group_of.values()}.values():
        members = tuple(layer for layer in layers if layer.path in paths)
        allowed = [{choice.bits for choice in layer.choices} for layer in members]
        allowed += [{pinned[layer.path]} for layer in members if layer.path in pinned]
        common = tuple(sorted(set.intersection(*allowed)))
        if not common:
            raise ValueError(f"{sorted(paths)} have no bits in common: {[sorted(bits) for bits in allowed]}")
        groups.append(_Group(members, common))
    return groups


def _check_feasible(groups: Sequence[_Group], limits: Mapping[str, float]) -> None:
    """Raise InfeasibleBudgetError where a limit is below the least that can be."""
    for name, limit in limits.items():
        least, each = 0.0, []
        for group in groups:
            used, bits = min((group.use(name, bits), bits) for bits in group.bits)
            least += used
            each += [(_use(layer, name, bits), layer.path, bits) for layer in group.layers]
        if least > limit:
            most, path, bits = max(each)
            raise InfeasibleBudgetError(
                f"the budget of {limit:,.0f} {name} is {least - limit:,.0f} below the least that can be, {least:,.0f}; "
                f"{path} alone takes {most:,.0f} of them with {bits} bits"
            )


def _solve(
    costs: NDArray[np.float64],
    owner: NDArray[np.intp],
    num_groups: int,
    uses: Mapping[str, NDArray[np.float64]],
    limits: Mapping[str, float],
) -> NDArray[np.bool_]:
    """Which options are chosen, one of each owner."""
    one_each = LinearConstraint((owner == np.arange(num_groups)[:, None]).astype(float), 1, 1)
    # Costs as differences from the owner's least, so that a constant doesn't drown them.
    least = np.full(num_groups, np.inf)
    np.minimum.at(least, owner, costs)
    relative = costs - least[owner]
    largest = relative.max(initial=0.0)
    objective = relative * (_LARGEST_COST / largest) if largest > 0 else relative
    constraints = [one_each]
    for name, limit in limits.items():
        scale = max(limit, 1.0)
        constraints.append(LinearConstraint(uses[name][None] / scale, -np.inf, limit / scale))
    while True:
        solution = milp(
            objective,
            integrality=np.ones(len(costs)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is None:
            raise InfeasibleBudgetError(f"no allocation keeps {dict(limits)} together: {solution.message}")
        chosen = np.asarray(solution.x > 0.5)
        if all(uses[name][chosen].sum() <= limit for name, limit in limits.items()):
            return chosen
        # The solver takes a limit for kept where it is exceeded by a millionth: any other choice, then.
        constraints.append(LinearConstraint(chosen[None].astype(float), -np.inf, num_groups - 1))
