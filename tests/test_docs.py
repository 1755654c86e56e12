"""Names, flags, files and links of README and docs/ exist; tests/experiments/test_configuration.py has commands."""

import ast
import dataclasses
import importlib
import pathlib
import re

import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXT = "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FLAG_FILES = sorted((REPOSITORY / "experiments" / "flags").glob("*.txt"))
# Flags of `launch`, of absl, and of other programs that README calls.
LAUNCH_FLAGS = {"debug", "cpu_devices", "coordinator", "processes", "process", "flagfile", "help"}
OTHER_FLAGS = {"no-deps", "json", "store", "threshold", "backend", "direct_num_workers", "direct_running_mode"}


def named_experiments():
    return sorted(set(re.findall(r"experiments\.(\w+)\b(?!/)", TEXT)))


def flags_of(config):
    """Names of a config's flags."""
    found = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= flags_of(value) if dataclasses.is_dataclass(value) else {field.name}
    return found


def flags_of_experiment(name):
    source = (REPOSITORY / "experiments" / f"{name}.py").read_text(encoding="utf-8")
    config = re.search(r"^    launch\((\w+), ", source, re.MULTILINE)
    return flags_of(getattr(importlib.import_module(f"experiments.{name}"), config[1])())


def test_every_flag_file_is_used():
    assert all(file.name in TEXT for file in FLAG_FILES)


@pytest.mark.parametrize("name", named_experiments())
def test_named_experiments_exist(name):
    assert importlib.util.find_spec(f"experiments.{name}")


def test_flags_in_the_text_exist():
    modules = [path.stem for path in (REPOSITORY / "experiments").glob("*.py")]
    launched = [name for name in modules if "\n    launch(" in (REPOSITORY / f"experiments/{name}.py").read_text()]
    known = set().union(*(flags_of_experiment(name) for name in launched), LAUNCH_FLAGS, OTHER_FLAGS)
    mentioned = set(re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", TEXT))
    assert {flag for flag in mentioned - known if flag.removeprefix("no") not in known} == set()


def test_dotted_names_exist():
    for dotted in sorted(set(re.findall(r"`(qsv(?:\.\w+)+)", TEXT))):
        parts = dotted.split(".")
        for count in range(len(parts), 0, -1):
            try:
                value = importlib.import_module(".".join(parts[:count]))
            except ModuleNotFoundError:
                continue
            for part in parts[count:]:
                value = getattr(value, part)
            break


def python_blocks():
    return re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_screen_of_the_library_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in python_blocks() if "qsv.fake_quantize" in block)
    names = {}
    exec(block, names)
    batch = {"x": np.ones((4, 20), np.float32), "label": np.arange(4)}
    params, _ = names["step"](names["params"], names["qstate"], names["opt_state"], batch)
    assert np.any(params["layers_0"]["kernel"] != names["params"]["layers_0"]["kernel"])
    assert (tmp_path / "mine.safetensors").exists()


def test_python_blocks_import_what_exists():
    for block in python_blocks():
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


def test_links_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target.partition("#")[0]).exists(), (page, target)


def test_every_page_is_linked():
    assert all(f"(docs/{page.name})" in TEXT for page in PAGES[1:])


def test_files_exist():
    tables = [
        page.parent / target
        for page in PAGES
        for target in re.findall(r"<!-- table (\S+) -->", page.read_text(encoding="utf-8"))
    ]
    named = re.findall(r"`((?:tests|notebooks|experiments|results|docs|qsv)/[\w./-]+\w)`", TEXT)
    assert len(tables) > 10
    for path in [*tables, *(REPOSITORY / target for target in named)]:
        assert path.exists(), path
