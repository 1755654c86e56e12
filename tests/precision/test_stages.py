"""Stages of a fine-tuning."""

import jax.numpy as jnp
import pytest

from qsv.precision import Stage, ascending_bits, descending_sensitivity, listed_stages, one_stage
from qsv.quant import KMeans, Rule, resolve


@pytest.fixture
def plan():
    params = {name: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for name in "abcde"}
    bits = {"a": 4, "b": 2, "c": 3, "d": 2}
    rules = [Rule(f"{name}/kernel", KMeans(width)) for name, width in bits.items()]
    return resolve([*rules, Rule(".*", None)], params)


def quantized(stages):
    return [sorted(path[0] for path in stage.plan.quantized) for stage in stages]


def test_fewest_bits_come_first(plan):
    stages = ascending_bits(plan, steps=10)
    assert [stage.name for stage in stages] == ["2_bits", "3_bits", "4_bits"]
    assert quantized(stages) == [["b", "d"], ["b", "c", "d"], ["a", "b", "c", "d"]]
    assert [stage.steps for stage in stages] == [4, 3, 3]
    assert stages[-1].plan == plan
    assert all(stage.plan["e/kernel"] is None and len(stage.plan) == len(plan) for stage in stages)


def test_neighbouring_widths_share_a_stage_where_they_are_more(plan):
    stages = ascending_bits(plan, steps=10, num_stages=2)
    assert [stage.name for stage in stages] == ["2_bits", "3_to_4_bits"]
    assert quantized(stages) == [["b", "d"], ["a", "b", "c", "d"]]
    assert [stage.name for stage in ascending_bits(plan, steps=1, num_stages=1)] == ["2_to_4_bits"]
    assert ascending_bits(plan, steps=10, num_stages=8) == ascending_bits(plan, steps=10)
    with pytest.raises(ValueError, match="num_stages must be at least 1, got 0"):
        ascending_bits(plan, steps=1, num_stages=0)


def test_most_sensitive_come_first(plan):
    sensitivity = {"a/kernel": 3.0, "b/kernel": 1.0, "c/kernel": 4.0, "d/kernel": 2.0}
    stages = descending_sensitivity(plan, sensitivity, num_stages=2, steps=7)
    assert quantized(stages) == [["a", "c"], ["a", "b", "c", "d"]]
    assert [stage.steps for stage in stages] == [4, 3]
    assert len(descending_sensitivity(plan, sensitivity, num_stages=9, steps=7)) == 4
    with pytest.raises(ValueError, match="no sensitivity for .*a/kernel"):
        descending_sensitivity(plan, {}, num_stages=2, steps=7)
    with pytest.raises(ValueError, match="num_stages"):
        descending_sensitivity(plan, sensitivity, num_stages=0, steps=7)


def test_one_shot_is_one_stage(plan):
    (stage,) = one_stage(plan, steps=5)
    assert (stage.plan, stage.steps) == (plan, 5)


def test_a_list_must_hold_every_path_once(plan):
    stages = listed_stages(plan, {"one": ["b/kernel"], "rest": ["a/kernel", "c/kernel", "d/kernel"]}, steps=3)
    assert [stage.name for stage in stages] == ["one", "rest"] and stages[-1].plan == plan
    with pytest.raises(ValueError, match=r"missing=\['c/kernel'\].*unknown=\['x'\].*twice=\['a/kernel'\]"):
        listed_stages(plan, {"one": ["a/kernel", "b/kernel"], "two": ["a/kernel", "d/kernel", "x"]}, steps=3)


def test_a_plan_without_quantizers_is_one_stage():
    plan = resolve([Rule(".*", None)], {"a": jnp.ones(2)})
    assert ascending_bits(plan, steps=3) == one_stage(plan, steps=3)


def test_wrong_stages(plan):
    with pytest.raises(ValueError, match="got -1"):
        Stage("all", plan, -1)
    with pytest.raises(ValueError, match="positive learning rate"):
        Stage("all", plan, 1, learning_rate=0.0)
