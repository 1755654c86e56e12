"""Which layers to quantize at all: one after the other, those first that lose least for the bytes they save."""

from collections.abc import Mapping, Sequence

from qsv.precision.allocation import Allocation, Choice, InfeasibleBudgetError, Layer

FLOAT_BITS = 32


def layers_or_float(layers: Sequence[Layer]) -> list[Layer]:
    """Layers of one width each, with float as the other choice: it costs nothing and takes four bytes a weight.

    Raises:
        ValueError: a layer has several widths.
    """
    several = [layer.path for layer in layers if len(layer.choices) != 1]
    if several:
        raise ValueError(f"a selection needs layers of one width each, {several[0]} has others")
    return [
        Layer(
            layer.path,
            layer.weights,
            (
                layer.choices[0],
                Choice(FLOAT_BITS, 0.0, 4 * layer.weights, layer.choices[0].bops * FLOAT_BITS / layer.choices[0].bits),
            ),
        )
        for layer in layers
    ]


def greedy_order(layers: Sequence[Layer]) -> tuple[str, ...]:
    """Paths of the layers, by what each alone costs for a byte that it saves; those that cost least come first.

    Layers that save none, such as tiny ones with tables, are left out.

    Args:
        layers: from `layers_or_float`.

    Source: Hong et al. 2024 (arXiv 2407.08991), where the cost is the rise of the EER with that layer alone quantized.
    """

    def saved_bytes(layer: Layer) -> int:
        own, unchanged = layer.choices
        return unchanged.size_bytes - own.size_bytes

    saving = [layer for layer in layers if saved_bytes(layer) > 0]
    return tuple(layer.path for layer in sorted(saving, key=lambda layer: layer.choices[0].cost / saved_bytes(layer)))


def greedy_selection(layers: Sequence[Layer], order: Sequence[str], *, max_bytes: float) -> Allocation:
    """The first layers of an order quantized, as many as the bytes need; the others stay float.

    Args:
        layers: from `layers_or_float`.
        order: from `greedy_order`.
        max_bytes: of the layers together.

    Raises:
        InfeasibleBudgetError: all layers of the order quantized take more.
    """
    bits: Mapping[str, int] = dict.fromkeys((layer.path for layer in layers), FLOAT_BITS)
    quantized = {layer.path: layer.choices[0].bits for layer in layers}
    selection = Allocation.of(layers, bits)
    for path in order:
        if selection.size_bytes <= max_bytes:
            return selection
        bits = {**bits, path: quantized[path]}
        selection = Allocation.of(layers, bits)
    if selection.size_bytes > max_bytes:
        raise InfeasibleBudgetError(
            f"with all layers quantized they take {selection.size_bytes:,} bytes, "
            f"{selection.size_bytes - max_bytes:,.0f} too many"
        )
    return selection
