"""Greedy selections by hand."""

import pytest

from qsv.precision import FLOAT_BITS, Choice, InfeasibleBudgetError, Layer, greedy_order, greedy_selection
from qsv.precision import layers_or_float as with_float


def layer(path, weights, cost, size=None):
    return Layer(path, weights, (Choice(8, cost, weights if size is None else size, 800.0),))


# Losses for a byte saved: 1 / 300, 0.5 / 30, -1 / 3000.
LAYERS = with_float([layer("a", 100, 1.0), layer("b", 10, 0.5), layer("c", 1000, -1.0)])


def test_float_is_the_other_choice():
    own, unchanged = LAYERS[0].choices
    assert own.bits == 8 and unchanged == Choice(FLOAT_BITS, 0.0, 400, 3200.0)
    with pytest.raises(ValueError, match="one width each, a has others"):
        with_float([Layer("a", 1, (Choice(8, 0.0, 1), Choice(4, 0.0, 1)))])


def test_those_that_lose_least_for_a_byte_come_first():
    assert greedy_order(LAYERS) == ("c", "a", "b")


def test_what_saves_nothing_is_never_quantized():
    assert greedy_order(with_float([layer("a", 100, 1.0), layer("tiny", 10, 0.0, size=40)])) == ("a",)


@pytest.mark.parametrize(
    ("max_bytes", "quantized"), [(4440, ""), (4439, "c"), (1440, "c"), (1439, "ca"), (1139, "cab"), (1110, "cab")]
)
def test_as_many_as_the_bytes_need(max_bytes, quantized):
    selection = greedy_selection(LAYERS, greedy_order(LAYERS), max_bytes=max_bytes)
    assert {path for path, bits in selection.bits.items() if bits == 8} == set(quantized)
    assert selection.size_bytes <= max_bytes
    assert selection.cost == sum({"a": 1.0, "b": 0.5, "c": -1.0}[path] for path in quantized)


def test_too_few_bytes_are_refused():
    with pytest.raises(InfeasibleBudgetError, match="1,110 bytes, 10 too many"):
        greedy_selection(LAYERS, greedy_order(LAYERS), max_bytes=1100)
