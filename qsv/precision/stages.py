"""Multi-stage fine-tuning: which layers are quantized in which stage."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from qsv.quant import Plan


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a fine-tuning.

    Attributes:
        name: unique among the stages; also its folder's.
        plan: quantizers in this stage; layers whose turn is yet to come are None.
        steps: of fine-tuning.
        learning_rate: relative to the run's.
    """

    name: str
    plan: Plan
    steps: int
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.learning_rate > 0:
            raise ValueError(
                f"stage {self.name} needs steps of 0 or more and a positive learning rate, "
                f"got {self.steps} and {self.learning_rate}"
            )


def one_stage(plan: Plan, *, steps: int) -> tuple[Stage, ...]:
    """All layers at once: one-shot fine-tuning."""
    return (Stage("all", plan, steps),)


def ascending_bits(plan: Plan, *, steps: int, num_stages: int | None = None) -> tuple[Stage, ...]:
    """Stage s quantizes the layers of the s fewest bits; those of more bits adapt in float meanwhile.

    Args:
        plan: the final one.
        steps: of all stages together, shared evenly; the first ones get what is left over.
        num_stages: at most so many; where there are more widths, neighbouring ones share a stage, so that about as
            many layers are added in each. None is one for each width.

    Raises:
        ValueError: there are no stages.

    Source: Liu et al. 2024 (arXiv 2406.05359), as its text reads.
    """
    counts = collections.Counter(quantizer.bits for quantizer in plan.quantized.values())
    widths = sorted(counts)
    if num_stages is not None:
        _check_num_stages(num_stages)
    count = len(widths) if num_stages is None else num_stages
    shared: dict[int, list[int]] = {}
    for index, bits in enumerate(widths):
        middle = sum(counts[fewer] for fewer in widths[:index]) + counts[bits] / 2
        shared.setdefault(index if len(widths) <= count else int(count * middle / counts.total()), []).append(bits)
    groups = {
        f"{own[0]}_bits" if len(own) == 1 else f"{own[0]}_to_{own[-1]}_bits": [
            path for path, quantizer in plan.quantized.items() if quantizer.bits in own
        ]
        for own in shared.values()
    }
    return listed_stages(plan, groups, steps=steps)


def descending_sensitivity(
    plan: Plan, sensitivity: Mapping[str, float], *, num_stages: int, steps: int
) -> tuple[Stage, ...]:
    """The most sensitive layers first, in groups of about equally many weight tensors.

    Args:
        plan: the final one.
        sensitivity: {path: what its quantization costs} for every quantized path.
        num_stages: at most so many stages.
        steps: of all stages together, shared evenly.

    Raises:
        ValueError: a path has no sensitivity, or there are no stages.
    """
    _check_num_stages(num_stages)
    missing = [path for path in plan.quantized if path not in sensitivity]
    if missing:
        raise ValueError(f"no sensitivity for {missing}")
    ordered = sorted(plan.quantized, key=lambda path: -sensitivity[path])
    count = min(num_stages, len(ordered))
    bounds = [round(len(ordered) * index / max(count, 1)) for index in range(count + 1)]
    groups = {
        f"group_{index + 1}": ordered[low:high]
        for index, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False))
    }
    return listed_stages(plan, groups, steps=steps)


def listed_stages(plan: Plan, groups: Mapping[str, Sequence[str]], *, steps: int) -> tuple[Stage, ...]:
    """Stages by a list of the user's.

    Args:
        plan: the final one.
        groups: {name of the stage: paths that it adds}; together all quantized paths, each once.
        steps: of all stages together, shared evenly; the first ones get what is left over.

    Returns:
        The stages; the last one's plan is the final one. A plan without quantizers is one stage.

    Raises:
        ValueError: a path is missing, unknown or in two groups.
    """
    named = [path for paths in groups.values() for path in paths]
    twice = sorted({path for path in named if named.count(path) > 1})
    missing, unknown = sorted(set(plan.quantized) - set(named)), sorted(set(named) - set(plan.quantized))
    if twice or missing or unknown:
        raise ValueError(f"each quantized path belongs to one stage: {missing=}, {unknown=}, {twice=}")
    if not groups:
        return one_stage(plan, steps=steps)
    stages, done = [], set[str]()
    for index, (name, paths) in enumerate(groups.items()):
        done |= set(paths)
        own_steps = steps // len(groups) + (index < steps % len(groups))
        stages.append(Stage(name, restricted(plan, done.__contains__), own_steps))
    return tuple(stages)


def _check_num_stages(num_stages: int) -> None:
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1, got {num_stages}")


def restricted(plan: Plan, is_wanted: Callable[[str], bool]) -> Plan:
    """The plan with quantizers for the wanted paths only."""
    return Plan(tuple((path, quantizer if is_wanted(path) else None) for path, quantizer in plan.entries))
