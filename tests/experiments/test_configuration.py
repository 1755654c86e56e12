"""Flags from configs and back, for every experiment."""

import dataclasses
import functools
import importlib
import json
import pathlib
import re
import shlex
import types
import typing

import pytest
from absl import flags

from experiments import configuration

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIGS = {
    "ablation": "AblationConfig",
    "benchmark_hessian": "HessianBenchmarkConfig",
    "benchmark_inference": "InferenceBenchmarkConfig",
    "benchmark_loader": "LoaderBenchmarkConfig",
    "benchmark_training": "BenchmarkConfig",
    "binary": "BinaryConfig",
    "bit_widths": "BitWidthsConfig",
    "cascade": "CascadeConfig",
    "diagnose": "DiagnoseConfig",
    "embed": "EmbedConfig",
    "evaluate": "EvaluateConfig",
    "export": "ExportConfig",
    "import_checkpoint": "ImportConfig",
    "integer_network": "IntegerNetworkConfig",
    "mixed_precision": "MixedPrecisionConfig",
    "precision_study": "PrecisionStudyConfig",
    "prepare": "PrepareConfig",
    "quality_corpus": "QualityCorpusConfig",
    "quantize": "QuantizeConfig",
    "quickstart": "QuickstartConfig",
    "select_layers": "SelectLayersConfig",
    "speech_quality": "SpeechQualityConfig",
    "tables": "TablesConfig",
    "train": "TrainConfig",
    "verify": "VerifyConfig",
    "weight_study": "WeightStudyConfig",
}


# Of flags that take no arbitrary text.
SAMPLES = {
    "from_bits": ("4", "2"),
    "mixed_bits": ("2.5", "1.5"),
    "share": "1/2",
    "candidate_bits": ("2", "4"),
    "workers": ("1", "4"),
    "pin": ("8:stem/.*", "2:two words"),
    "stage_steps": ("100", "20"),
    "stage_rate": ("1", "0.5"),
}


def config_type(experiment):
    return getattr(importlib.import_module(f"experiments.{experiment}"), CONFIGS[experiment])


@pytest.fixture
def fresh_flags(monkeypatch):
    """Flags of one experiment, apart from those of this process: (arguments) -> its config."""

    def define(experiment):
        values = flags.FlagValues()
        defining = {
            name: functools.partial(getattr(flags, name), flag_values=values)
            for name in dir(flags)
            if name.startswith("DEFINE_")
        }
        monkeypatch.setattr(configuration, "flags", types.SimpleNamespace(FLAGS=values, **defining))
        configuration.define_flags(config_type(experiment)())
        configuration.define_launch_flags(cpu_devices=0)

        def parse(*arguments):
            rest = values(["program", *map(str, arguments)])
            return configuration.config_from_flags(config_type(experiment), rest[1:])

        return parse

    return define


def settings(config):
    """(field, value) of every flag of a config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value)
        elif field.name != "arguments":
            yield field, value


def changed(config):
    """The config with another value in every field."""
    hints, values = typing.get_type_hints(type(config)), {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = changed(value)
        elif field.name == "arguments":
            values[field.name] = ("a.wav", "b.wav")
        elif field.metadata["choices"]:
            values[field.name] = next(choice for choice in field.metadata["choices"] if choice != value)
        elif isinstance(SAMPLES.get(field.name), type(value)):
            values[field.name] = SAMPLES[field.name]
        elif isinstance(value, tuple):
            values[field.name] = value[::-1] or ("one", "two words")
        elif hints[field.name] is bool:
            values[field.name] = not value
        elif hints[field.name] is float:  # Half stays within the bounds of a probability; of 0 and NaN there is none.
            values[field.name] = value / 2 if value > 0 else 0.5
        else:
            values[field.name] = f"{value}/other" if isinstance(value, str) else value + 1
    return type(config)(**values)


def test_every_experiment_is_tested():
    launched = {
        path.stem for path in (REPOSITORY / "experiments").glob("*.py") if "launch(" in path.read_text(encoding="utf-8")
    }
    assert launched - {"configuration"} == set(CONFIGS)


@pytest.mark.parametrize("experiment", CONFIGS)
def test_without_arguments_the_config_has_its_defaults(fresh_flags, experiment):
    # Compared as text, in which a NaN equals itself.
    assert repr(fresh_flags(experiment)()) == repr(config_type(experiment)())


@pytest.mark.parametrize("experiment", CONFIGS)
def test_every_field_can_be_set_by_its_flag(fresh_flags, as_flags, experiment):
    config = changed(config_type(experiment)())
    for (field, value), (_, default) in zip(settings(config), settings(config_type(experiment)()), strict=True):
        assert value != default, field.name
    arguments = getattr(config, "arguments", ())
    assert fresh_flags(experiment)(*as_flags(config), *arguments) == config


@pytest.mark.parametrize("experiment", CONFIGS)
def test_bounds_and_choices_are_enforced_and_flags_explained(fresh_flags, experiment):
    parse = fresh_flags(experiment)
    for field, _ in settings(config_type(experiment)()):
        assert field.metadata["help"].endswith("."), field.name
        if field.metadata["choices"]:
            with pytest.raises(flags.IllegalFlagValueError, match=f"--{field.name}"):
                parse(f"--{field.name}=nonsense")
        if field.metadata["minimum"] is not None:
            with pytest.raises(flags.IllegalFlagValueError, match=f"--{field.name}"):
                parse(f"--{field.name}={field.metadata['minimum'] - 1}")


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "experiments" / "flags").glob("*.txt")), ids=lambda path: path.stem
)
def test_flag_files_are_of_their_experiments(fresh_flags, path):
    quantizing = ("quantize", "bit_widths", "mixed_precision", "precision_study", "binary")
    experiments = quantizing if path.stem.endswith("_quantize") else ("train",)
    for experiment in experiments:
        assert fresh_flags(experiment)(f"--flagfile={path}") != config_type(experiment)()


# A shell's loop: variable, values, and what is done with each.
LOOP = re.compile(r"\bfor (\w+) in ([^;\n]+); do\n(.*?)\bdone\b", re.DOTALL)


def unrolled(loop):
    """What a shell's loop does, once for each of its values."""
    name, values, body = loop.groups()
    return "\n".join(re.sub(rf"\$(?:{name}\b|{{{name}}})", value, body) for value in values.split())


def commands(text):
    """(experiment, arguments) of every `python -m experiments.NAME` command in a text."""
    joined = LOOP.sub(unrolled, re.sub(r"\\+\n\s*", " ", text))
    for name, rest in re.findall(r"python -m experiments\.(\w+)([^\n`]*)", joined):
        yield name, shlex.split(rest, comments=True)


def test_commands_in_a_loop_are_found_with_each_value():
    after = "python -m experiments.run $A"
    looped = "for A in 1 b; do\n  python -m experiments.train --seed=$A \\\n    --workdir=x${A}y$AB\ndone\n"
    expected = [["--seed=1", "--workdir=x1y$AB"], ["--seed=b", "--workdir=xby$AB"], ["$A"]]
    assert [arguments for _, arguments in commands(looped + after)] == expected


DOCUMENTED = {experiment: importlib.import_module(f"experiments.{experiment}").__doc__ for experiment in CONFIGS}
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
DOCUMENTED |= {page.name: page.read_text(encoding="utf-8") for page in PAGES}


@pytest.mark.parametrize("place", DOCUMENTED)
def test_documented_commands_have_flags_that_exist(fresh_flags, place, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    found = list(commands(DOCUMENTED[place]))
    assert found
    for experiment, arguments in found:
        fresh_flags(experiment)(*arguments)


@pytest.mark.parametrize("error", [ValueError, FloatingPointError])
def test_an_expected_error_is_one_line(monkeypatch, capsys, error):
    @dataclasses.dataclass(frozen=True)
    class Config:
        pass

    def run(config):
        raise error("the curvature of stem is not finite")

    values = flags.FlagValues()
    defining = {
        name: functools.partial(getattr(flags, name), flag_values=values)
        for name in ("DEFINE_bool", "DEFINE_integer", "DEFINE_string")
    }
    statuses = []
    monkeypatch.setattr(configuration, "flags", types.SimpleNamespace(FLAGS=values, **defining))
    monkeypatch.setattr(configuration, "_use_huge_pages", lambda: None)
    monkeypatch.setattr(configuration.app, "run", lambda main: statuses.append(main(values(["program"]))))
    configuration.launch(Config, run)
    assert statuses == [1] and capsys.readouterr().err == "error: the curvature of stem is not finite\n"


def test_missing_settings_are_all_named():
    configuration.require(workdir="runs", bits=0, data_dir=("a",))
    with pytest.raises(ValueError, match="^--model, --data_dir must be given; see --help$"):
        configuration.require(workdir="runs", model="", data_dir=())


def test_json_replaces_a_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "made" / "results.json"
    configuration.write_json(path, {"a": 1})
    configuration.write_json(path, {"path": tmp_path})
    assert json.loads(path.read_text()) == {"path": str(tmp_path)}
    assert list(path.parent.iterdir()) == [path]
