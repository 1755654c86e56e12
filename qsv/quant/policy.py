"""Policies: which leaf of a parameter tree gets which quantizer."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsv.quant.qtensor import QTensor
from qsv.quant.quantizer import Quantizer


@dataclasses.dataclass(frozen=True)
class Rule:
    """Leaves whose whole path matches `pattern` get `quantizer`, or stay float where it is None.

    Attributes:
        pattern: regular expression over the path, such as `.*/kernel` for `stage1_block1/conv1/conv/kernel`.
        quantizer: a specification such as `KMeans(bits=4)`, or None.
    """

    pattern: str
    quantizer: Quantizer | None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from error
        if self.quantizer is not None and not isinstance(self.quantizer, Quantizer):
            raise ValueError(f"quantizer must be one such as KMeans(bits=4), or None, got {self.quantizer!r}")


Policy = Sequence[Rule]


@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, Quantizer | None]):
    """One quantizer, or None, for every leaf of a parameter tree: a hashable mapping from paths.

    Attributes:
        entries: (path, quantizer or None) in the order of the tree's leaves.
    """

    entries: tuple[tuple[str, Quantizer | None], ...]

    def __getitem__(self, path: str) -> Quantizer | None:
        for name, quantizer in self.entries:
            if name == path:
                return quantizer
        raise KeyError(path)

    def __iter__(self) -> Iterator[str]:
        return (path for path, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def quantized(self) -> dict[str, Quantizer]:
        """The entries that have a quantizer."""
        return {path: quantizer for path, quantizer in self.entries if quantizer is not None}


def leaf_paths(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, path components joined by `/`; a QTensor counts as a leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, QTensor))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with other leaves at some paths, as `leaf_paths` names them."""
    kept = [leaves.get(path, leaf) for path, leaf in leaf_paths(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=lambda node: isinstance(node, QTensor)), kept)


def resolve(policy: Policy, params: Any) -> Plan:
    """Apply a policy to a parameter tree: the first rule that matches a leaf's path decides.

    Args:
        policy: rules, first match wins.
        params: tree of arrays or ShapeDtypeStructs.

    Returns:
        The plan: one quantizer or None per leaf.

    Raises:
        ValueError: a leaf that no rule covers, a rule that decides no leaf, or a quantizer on a leaf that isn't
            floating point.

    >>> import jax.numpy as jnp
    >>> from qsv.quant import KMeans
    >>> params = {"conv": {"kernel": jnp.zeros((3, 3, 1, 8)), "bias": jnp.zeros(8)}}
    >>> plan = resolve([Rule(".*/kernel", KMeans(bits=4)), Rule(".*", None)], params)
    >>> plan["conv/kernel"].bits, plan["conv/bias"]
    (4, None)
    """
    rules = tuple(policy)
    if not rules:
        raise ValueError("the policy has no rules; add Rule('.*', None) to leave everything float")
    patterns = [re.compile(rule.pattern) for rule in rules]
    used = [False] * len(rules)
    entries = []
    for path, leaf in leaf_paths(params):
        index = next((i for i, pattern in enumerate(patterns) if pattern.fullmatch(path)), None)
        if index is None:
            raise ValueError(f"no rule covers {path!r} {np.shape(leaf)}; add Rule('.*', None)")
        used[index] = True
        quantizer = rules[index].quantizer
        if quantizer is not None and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{path!r} is {leaf.dtype}, only floating-point leaves can be quantized")
        entries.append((path, quantizer))
    unused = [rule.pattern for rule, hit in zip(rules, used, strict=True) if not hit]
    if unused:
        raise ValueError(
            f"rules {unused} decide no leaf: they match none, or an earlier rule took theirs; "
            f"leaves are {[path for path, _ in entries][:8]} ..."
        )
    return Plan(tuple(entries))
