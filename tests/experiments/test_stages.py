"""Stages by flags, and what a stage leaves of those before it."""

import dataclasses

import numpy as np
import pytest

from experiments.finetuning import quantize_layers, unquantized
from experiments.models import load_float_model
from experiments.stages import StagesConfig, make_stages
from qsv.precision import restricted
from qsv.quant import AdaptiveBinary, KMeans, Plan, Rule, leaf_paths, resolve

PATHS = ("stem/kernel", "block1/kernel", "block2/kernel", "embedding/kernel")
PLAN = Plan(tuple(zip(PATHS, (KMeans(8), KMeans(2), KMeans(2), KMeans(4)), strict=True)))
COSTS = dict(zip(PATHS, (4.0, 1.0, 3.0, 2.0), strict=True))


def added(stages):
    """The paths that each stage adds."""
    before, found = set(), []
    for stage in stages:
        found.append(set(stage.plan.quantized) - before)
        before |= found[-1]
    return found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (StagesConfig(), [{"block1/kernel", "block2/kernel"}, {"embedding/kernel"}, {"stem/kernel"}]),
        (StagesConfig(stages="one_shot"), [set(PATHS)]),
        (
            StagesConfig(stages="descending_sensitivity", num_stages=2),
            [{"stem/kernel", "block2/kernel"}, {"embedding/kernel", "block1/kernel"}],
        ),
        (
            StagesConfig(stages="listed", stage=("block.*", "stem/.*")),
            [{"block1/kernel", "block2/kernel"}, {"stem/kernel"}, {"embedding/kernel"}],
        ),
    ],
)
def test_flags_order_the_layers(config, expected):
    stages = make_stages(config, PLAN, COSTS, steps=100)
    assert added(stages) == expected
    assert stages[-1].plan == PLAN
    assert sum(stage.steps for stage in stages) == 100


def test_stages_have_steps_and_rates_of_their_own():
    config = StagesConfig(stage_steps=("5", "0", "7"), stage_rate=("1", "0.5", "1e-1"))
    stages = make_stages(config, PLAN, COSTS, steps=100)
    assert [(stage.steps, stage.learning_rate) for stage in stages] == [(5, 1.0), (0, 0.5), (7, 0.1)]
    with pytest.raises(ValueError, match=r"1 values of --stage_steps for stages \['2_bits', '4_bits', '8_bits'\]"):
        make_stages(StagesConfig(stage_steps=("5",)), PLAN, COSTS, steps=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": "sideways"}, "stages must be one of ascending_bits, .*, got 'sideways'"),
        ({"stage_steps": ("2.5",)}, "--stage_steps must be a whole number"),
        ({"stage_rate": ("0",)}, "--stage_rate must be a positive number"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StagesConfig(**settings)


@pytest.mark.parametrize("settings", [{"stages": "listed"}, {"stage": ("stem/.*",)}])
def test_a_list_needs_its_order_and_the_order_a_list(settings):
    with pytest.raises(ValueError, match="--stages=listed and --stage need each other"):
        make_stages(StagesConfig(**settings), PLAN, COSTS, steps=1)


def test_a_pattern_that_adds_nothing_is_refused():
    config = StagesConfig(stages="listed", stage=("block.*", "block1/.*"))
    with pytest.raises(ValueError, match="--stage: 'block1/.*' matches none of the kernels"):
        make_stages(config, PLAN, COSTS, steps=1)


@pytest.fixture(scope="module")
def halves(make_quantize_config, float_run):
    """The float run quantized at once, and in two stages: (settings, plan of the first, first, second)."""
    calibrated = {"calibration_crops": 8, "weighted_codebooks": True, "rounding": "compensated", "sequential": True}
    config = make_quantize_config("unused", **calibrated, recalibration="shift").finetune
    model = load_float_model(str(float_run))
    plan = resolve([Rule(".*/kernel", KMeans(3)), Rule(".*", None)], model.params)
    first_plan = restricted(plan, lambda path: path.startswith(("stem", "stage1")))
    first = quantize_layers(config, unquantized(config, model), first_plan)
    return config, first_plan, first, quantize_layers(config, first, plan)


def test_layers_of_a_stage_before_keep_their_levels(halves):
    _, first_plan, first, second = halves
    before, after = (dict(leaf_paths(network.variables["params"])) for network in (first, second))
    weights = dict(leaf_paths(first.calibrated.params)), dict(leaf_paths(second.calibrated.params))
    for path in first_plan.quantized:
        np.testing.assert_array_equal(before[path], after[path])
        np.testing.assert_array_equal(weights[0][path], weights[1][path])
    assert len(np.unique(after["embedding/kernel"])) == 8
    assert len(np.unique(before["embedding/kernel"])) > 8


def test_a_layer_that_gets_fewer_bits_is_quantized_from_the_values_that_it_has(halves):
    config, first_plan, first, _ = halves
    lower = resolve(
        [Rule("stem/.*", AdaptiveBinary()), Rule(".*/kernel", KMeans(3)), Rule(".*", None)], first.model.params
    )
    plan = restricted(lower, lambda path: path in first_plan.quantized)
    after = quantize_layers(
        dataclasses.replace(config, calibration_crops=0), dataclasses.replace(first, waveforms=[]), plan
    )
    before, found = (dict(leaf_paths(network.variables["params"])) for network in (first, after))
    values = np.asarray(before["stem/conv/kernel"])
    np.testing.assert_allclose(
        np.unique(found["stem/conv/kernel"]), [values.mean() - values.std(), values.mean() + values.std()], rtol=1e-5
    )
    np.testing.assert_array_equal(before["stage1_block1/conv1/conv/kernel"], found["stage1_block1/conv1/conv/kernel"])


def test_rounded_to_the_nearest_it_is_quantized_from_the_weights_behind_them(make_quantize_config, float_run):
    config = make_quantize_config("unused").finetune
    assert config.rounding == "nearest"
    model = load_float_model(str(float_run))
    rest = [Rule(".*/kernel", KMeans(3)), Rule(".*", None)]
    plans = [resolve([Rule("stem/.*", own), *rest], model.params) for own in (KMeans(2), AdaptiveBinary())]
    first = quantize_layers(config, unquantized(config, model), plans[0])
    found = dict(leaf_paths(quantize_layers(config, first, plans[1]).variables["params"]))["stem/conv/kernel"]
    weights = np.asarray(dict(leaf_paths(model.params))["stem/conv/kernel"])
    levels = np.asarray(dict(leaf_paths(first.variables["params"]))["stem/conv/kernel"])
    expected = [weights.mean() - weights.std(), weights.mean() + weights.std()]
    np.testing.assert_allclose(np.unique(found), expected, rtol=1e-5)
    np.testing.assert_array_equal(found > weights.mean(), weights > weights.mean())
    assert len(np.unique(levels)) == 4 and not np.isclose(levels.std(), weights.std(), rtol=1e-3)
