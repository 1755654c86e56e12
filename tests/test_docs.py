"""Commands, flags, names, files and links of README and docs/ exist."""

import ast
import dataclasses
import importlib
import pathlib
import re

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXT = "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FLAG_FILES = sorted((REPOSITORY / "experiments" / "flags").glob("*.txt"))
# Flags of `launch`, of absl, and of other programs that README calls.
LAUNCH_FLAGS = {"debug", "cpu_devices", "coordinator", "processes", "process", "flagfile", "help"}
OTHER_FLAGS = {"no-deps", "json", "store", "threshold", "backend", "direct_num_workers", "direct_running_mode"}


def commands():
    """(module, arguments) of every `python -m experiments.NAME ...` in an indented block."""
    text = re.sub(r"\\\n\s*", " ", TEXT)
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    found = []
    for line in lines:
        for part in re.split(r"&&|;", line.partition("  #")[0]):
            match = re.search(r"python -m experiments\.(\w+)(.*)", part)
            if match:
                found.append((match[1], match[2].split()))
    return found


def named_experiments():
    return sorted(set(re.findall(r"experiments\.(\w+)\b(?!/)", TEXT)))


def flags_of(config):
    """{flag: whether it is boolean} of a config's fields."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= flags_of(value) if dataclasses.is_dataclass(value) else {field.name: isinstance(value, bool)}
    return found


def flags_of_experiment(name):
    source = (REPOSITORY / "experiments" / f"{name}.py").read_text(encoding="utf-8")
    config = re.search(r"^    launch\((\w+), ", source, re.MULTILINE)
    return flags_of(getattr(importlib.import_module(f"experiments.{name}"), config[1])())


def unknown_flags(arguments, known):
    accepted = set(known) | {f"no{flag}" for flag, is_bool in known.items() if is_bool} | LAUNCH_FLAGS
    names = [argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")]
    return [name for name in names if name not in accepted]


def test_there_are_commands():
    assert len(commands()) > 15


@pytest.mark.parametrize(("name", "arguments"), commands(), ids=lambda part: part if isinstance(part, str) else "")
def test_flags_of_commands_exist(name, arguments):
    assert unknown_flags(arguments, flags_of_experiment(name)) == []
    for argument in arguments:
        if argument.startswith("--flagfile="):
            file = REPOSITORY / argument.partition("=")[2]
            lines = file.read_text(encoding="utf-8").split("\n")
            assert unknown_flags([line for line in lines if line.startswith("--")], flags_of_experiment(name)) == []


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


def test_python_blocks_import_what_exists():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
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
