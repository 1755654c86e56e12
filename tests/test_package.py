"""The package's layers, its public names and its docstrings."""

import ast
import doctest
import importlib
import pathlib
import pkgutil

import pytest

import qsv

ROOT = pathlib.Path(qsv.__file__).parent
# What each layer may import of qsv, by the architecture: only what is below it.
ALLOWED = {
    "quant": set(),
    "frontend": set(),
    "models": {"frontend", "quant"},
    "data": set(),
    "scoring": set(),
    "analysis": {"models", "quant", "scoring"},
    "training": {"frontend", "models", "quant"},
    "interop": {"frontend", "models", "quant"},
    "precision": {"models", "quant"},
    "deploy": {"frontend", "models", "quant", "data", "precision", "scoring"},
}
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(ROOT)], "qsv."))


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("layer", ALLOWED)
def test_layers_import_only_what_is_below(layer):
    for path in (ROOT / layer).rglob("*.py"):
        for name in imported_names(path):
            first, *rest = name.split(".")
            assert first != "experiments", path
            if first == "qsv" and rest and rest[0] != layer:
                assert rest[0] in ALLOWED[layer], f"{path.name} imports {name}"


def test_quantizers_need_only_jax_and_numpy():
    for path in (ROOT / "quant").glob("*.py"):
        for name in imported_names(path):
            assert name.split(".")[0] not in ("flax", "scipy", "optax", "absl"), f"{path.name} imports {name}"


def test_every_layer_is_named_here():
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == set(ALLOWED)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_public_names_are_documented():
    for name in dir(qsv):
        value = getattr(qsv, name)
        if not name.startswith("_") and callable(value):
            assert value.__doc__ and len(value.__doc__) > 40, name
