"""Points at which integer arithmetic needs codes."""

import pytest

from qsv.models import Network, activation_points

NETWORKS = {
    "resnet10": {"width": 4},
    "resnet36": {"width": 8},
    "df_resnet56": {"width": 4},
    "ecapa": {"channels": 16},
    "campplus": {"growth_rate": 4, "bn_size": 1, "init_channels": 8},
    "eres2netv2": {"width": 8},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_has_a_point(name):
    points = activation_points(Network(name, {**NETWORKS[name], "embedding_size": 8}))
    assert list(points.inputs.values())[0] and set(points.outputs) <= set(points.inputs)
    for layer, point in points.inputs.items():
        assert layer == point or layer.startswith(point + "/")
    assert all(point.endswith(":output") for point in points.outputs.values())
    assert points.rectified <= set(points.outputs.values())


def test_what_a_residual_block_reads_and_sums_has_codes():
    points = activation_points(Network("resnet10", {"width": 4, "embedding_size": 8}))
    assert points.inputs["stem/conv"] == "stem"
    # The input of the block is that of its first layer, of its shortcut, and of the sum where it has none.
    assert points.inputs["stage2_block1/conv1/conv"] == points.inputs["stage2_block1/shortcut/conv"] == "stage2_block1"
    assert points.inputs["stage1_block1/conv2/conv"] == "stage1_block1/conv2"
    # A sum reads them; between the others and the next layer there is a rectifier only.
    assert points.outputs == {
        f"stage{stage}_block1/{name}/conv": f"stage{stage}_block1/{name}/norm:output"
        for stage in (1, 2, 3, 4)
        for name in ("conv2", "shortcut")
        if (stage, name) != (1, "shortcut")
    }


def test_what_only_rectifiers_read_is_known():
    points = activation_points(Network("campplus", {**NETWORKS["campplus"], "embedding_size": 8}))
    # The rectified bottleneck goes to a convolution and to a mean; the normalised context goes to a product.
    assert "block1_layer1/norm2:output" in points.rectified
    assert "block1_layer1/local:output" in points.outputs.values()
    assert "block1_layer1/local:output" not in points.rectified


def test_a_normalisation_that_is_not_alone_belongs_to_what_comes_after_it():
    points = activation_points(Network("campplus", {**NETWORKS["campplus"], "embedding_size": 8}))
    # The first layer of the next block normalises it, and a concatenation keeps it as it is.
    assert points.outputs["transit1"] == "transit1:output"
    assert points.outputs["transit3"] == "norm:output"


def test_a_gate_is_read_by_a_product():
    points = activation_points(Network("resnet36", {"width": 8, "embedding_size": 8}))
    assert points.outputs["stage1_block1/conv2/conv"] == "stage1_block1/conv2/norm:output"
    assert "stage1_block1/gate/squeeze" not in points.outputs and "stage1_block1/gate/excite" in points.outputs
