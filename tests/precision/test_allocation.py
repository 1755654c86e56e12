"""Allocations against brute force, and what can't be allocated."""

import itertools
import time

import numpy as np
import pytest

from qsv.precision import (
    Allocation,
    Budget,
    Choice,
    InfeasibleBudgetError,
    Layer,
    allocate,
    four_section_search,
    pareto_front,
)


def random_layers(rng, count, widths=(2, 3, 4)):
    """Layers of widely differing size and sensitivity; costs fall with the bits, mostly."""
    layers = []
    for index in range(count):
        weights = int(rng.integers(10, 2000))
        sensitivity = 10 ** rng.uniform(-3, 3)
        choices = [
            Choice(
                bits, sensitivity * 4.0**-bits * rng.uniform(0.8, 1.2), weights * bits // 8 + 4 * 2**bits, 8.0 * bits
            )
            for bits in widths
        ]
        layers.append(Layer(f"layer{index}/kernel", weights, tuple(choices)))
    return layers


def every_allocation(layers):
    for bits in itertools.product(*([choice.bits for choice in layer.choices] for layer in layers)):
        yield Allocation.of(layers, {layer.path: width for layer, width in zip(layers, bits, strict=True)})


def test_allocations_equal_brute_force():
    rng = np.random.default_rng(0)
    for case in range(1000):
        layers = random_layers(rng, int(rng.integers(1, 5)), widths=(1, 2, 3, 4, 8)[: int(rng.integers(1, 6))])
        everything = list(every_allocation(layers))
        sizes = sorted(allocation.size_bytes for allocation in everything)
        some = everything[int(rng.integers(len(everything)))]
        budget = [
            Budget(max_bytes=some.size_bytes),
            Budget(max_bits=some.average_bits),
            Budget(max_bytes=float(rng.uniform(sizes[0], sizes[-1] + 1))),
            Budget(max_bytes=some.size_bytes, max_bops=some.bops, max_bits=some.average_bits + 0.1),
        ][case % 4]
        limits = budget.limits(layers)
        kept = [
            allocation
            for allocation in everything
            if allocation.size_bytes <= limits.get("bytes", np.inf)
            and sum(layer.weights * allocation.bits[layer.path] for layer in layers) <= limits.get("bits", np.inf)
            and allocation.bops <= limits.get("bops", np.inf)
        ]
        found = allocate(layers, budget)
        assert any(found.bits == allocation.bits for allocation in kept)
        assert found.cost == pytest.approx(min(allocation.cost for allocation in kept), rel=1e-9)


def test_three_hundred_layers_of_eight_widths_take_seconds():
    layers = random_layers(np.random.default_rng(0), 300, widths=range(1, 9))
    start = time.perf_counter()
    allocation = allocate(layers, Budget(max_bits=3.0))
    assert time.perf_counter() - start < 5
    assert 2.99 < allocation.average_bits <= 3


@pytest.mark.parametrize("bits", [1.2, 2.0, 2.7, 3.9, 6.1, 7.95])
def test_any_size_is_hit_from_below(bits):
    layers = random_layers(np.random.default_rng(0), 20, widths=range(1, 9))
    uniform = sum(layer.weights for layer in layers) / 8
    allocation = allocate(layers, Budget(max_bytes=bits * uniform + 4 * 2**4 * len(layers)))
    limit = bits * uniform + 4 * 2**4 * len(layers)
    most = sum(layer.choice(8).size_bytes for layer in layers)
    assert 0.99 * min(limit, most) <= allocation.size_bytes <= limit


def test_without_a_budget_the_cheapest_choices_are_taken():
    layers = random_layers(np.random.default_rng(0), 5)
    expected = sum(min(choice.cost for choice in layer.choices) for layer in layers)
    assert allocate(layers, Budget()).cost == pytest.approx(expected)


def test_tied_layers_have_the_same_bits_and_pinned_ones_theirs():
    layers = random_layers(np.random.default_rng(1), 6)
    paths = [layer.path for layer in layers]
    everything = [
        allocation
        for allocation in every_allocation(layers)
        if allocation.bits[paths[0]] == allocation.bits[paths[3]] == allocation.bits[paths[5]]
        and allocation.bits[paths[1]] == 4
        and allocation.average_bits <= 3.1
    ]
    # Ties that share a layer are one.
    ties = [(paths[0], paths[3]), (paths[3], paths[5])]
    found = allocate(layers, Budget(max_bits=3.1), ties=ties, pinned={paths[1]: 4})
    assert found.cost == pytest.approx(min(allocation.cost for allocation in everything))
    assert found.bits[paths[0]] == found.bits[paths[5]] and found.bits[paths[1]] == 4


def test_a_front_rises_in_bytes_and_falls_in_cost():
    layers = random_layers(np.random.default_rng(2), 8)
    front = pareto_front(layers, [Budget(max_bits=bits) for bits in (1.0, 4.0, 2.0, 2.5, 2.5, 3.0)])
    assert len(front) == 4
    for smaller, larger in itertools.pairwise(front):
        assert smaller.size_bytes < larger.size_bytes and smaller.cost > larger.cost


def test_four_sections_are_never_better_than_the_program():
    rng = np.random.default_rng(3)
    for _ in range(20):
        layers = random_layers(rng, int(rng.integers(4, 12)))
        traces = {layer.path: layer.choice(2).cost for layer in layers}
        budget = Budget(max_bits=float(rng.uniform(2.6, 4)))
        sections, program = four_section_search(layers, traces, budget), allocate(layers, budget)
        assert program.cost <= sections.cost * (1 + 1e-9)
        assert sections.average_bits <= budget.max_bits
        ordered = sorted(layers, key=lambda layer: traces[layer.path])
        widths = [sections.bits[layer.path] for layer in ordered]
        assert len(list(itertools.groupby(widths))) <= 4


def test_budgets_that_are_too_small_say_by_how_much_and_whose_fault_it_is():
    layers = [
        Layer("small", 10, (Choice(2, 1.0, 10), Choice(4, 0.5, 20))),
        Layer("large", 100, (Choice(2, 1.0, 100), Choice(4, 0.5, 200))),
    ]
    whole = [Layer(layer.path, layer.weights, (*layer.choices, Choice(3, 0.7, 150))) for layer in layers]
    with pytest.raises(
        InfeasibleBudgetError, match="90 bytes is 20 below .* 110; large alone takes 100 of them with 2"
    ):
        allocate(layers, Budget(max_bytes=90))
    with pytest.raises(InfeasibleBudgetError, match="large alone takes 200 of them with 4"):
        allocate(layers, Budget(max_bytes=150), pinned={"large": 4})
    with pytest.raises(InfeasibleBudgetError, match="90 bytes is 20 below"):
        four_section_search(whole, {"small": 1.0, "large": 2.0}, Budget(max_bytes=90))
    # Each limit can be kept, but not both.
    crossed = [Layer("one", 10, (Choice(2, 1.0, 10, 20.0), Choice(4, 0.5, 20, 10.0)))]
    with pytest.raises(InfeasibleBudgetError, match="together"):
        allocate(crossed, Budget(max_bytes=10, max_bops=10))


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([], {}, "no layers"),
        (["a", "a"], {}, "the same path"),
        (["a"], {"ties": [("a", "b")]}, r"\['b'\], which are no layers"),
        (["a"], {"pinned": {"b": 2}}, r"\['b'\], which are no layers"),
        (["a"], {"pinned": {"a": 7}}, "no bits in common"),
    ],
)
def test_wrong_arguments(layers, options, message):
    with pytest.raises(ValueError, match=message):
        allocate([Layer(path, 1, (Choice(2, 1.0, 1),)) for path in layers], Budget(), **options)


def test_wrong_layers():
    with pytest.raises(ValueError, match="different bits"):
        Layer("a", 1, (Choice(2, 1.0, 1), Choice(2, 2.0, 1)))
    with pytest.raises(ValueError, match="different bits"):
        Layer("a", 1, ())
    with pytest.raises(ValueError, match="finite"):
        Layer("a", 1, (Choice(2, float("nan"), 1),))
    with pytest.raises(ValueError, match=r"only \[2\]"):
        Layer("a", 1, (Choice(2, 1.0, 1),)).choice(3)
    with pytest.raises(ValueError, match="no trace for"):
        four_section_search([Layer("a", 1, (Choice(2, 1.0, 1),))], {}, Budget())
