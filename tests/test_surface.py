"""What is public is said in one place, small, and all that packages use of each other; functions fit on a screen."""

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("linfit", "theory", "sims", "figures")
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
MOST_NAMES, MOST_LINES = 250, 60

LONG: dict[str, str] = {}
"""Functions of more than 60 lines, each with its reason."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): ast.parse(path.read_text()) for path in FILES}
PACKAGES = {module_of(path) for path in FILES if path.name == "__init__.py"}


@cache
def stated(module: str) -> tuple[str, ...]:
    """The `__all__` of a module, as it is when imported."""
    return tuple(import_module(module).__all__)


def package_of(module: str) -> str:
    return module if module in PACKAGES else module.rpartition(".")[0]


@cache
def public_modules() -> frozenset[str]:
    """Packages, and the modules that they list."""
    listed = {f"{package}.{name}" for package in PACKAGES for name in stated(package)} & set(MODULES)
    return frozenset(PACKAGES | listed)


def definitions(module: str) -> set[str]:
    body = MODULES[module].body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_package_states_its_public_names(package):
    for name in stated(package):
        assert getattr(import_module(package), name) is not None


@pytest.mark.parametrize("module", sorted(set(MODULES) - PACKAGES))
def test_public_modules_list_what_they_define(module):
    if module in public_modules() and "internal" not in module:
        assert definitions(module) <= set(stated(module)), f"{module}: add to __all__ or start with an underscore"


def test_the_public_surface_is_small():
    names = set()
    for module in public_modules():
        if "internal" in module:
            continue
        for name in stated(module):
            value = getattr(import_module(module), name)
            if not isinstance(value, ModuleType):
                names.add((getattr(value, "__module__", module), name))
    assert len(names) <= MOST_NAMES, len(names)


def imports(module: str):
    """(module, name) of everything that a module imports from this project, anywhere in its code."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in FLOORS:
            for alias in node.names:
                yield node.module, alias.name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_packages_use_only_the_public_names_of_each_other(module):
    own = package_of(module)
    for source, name in imports(module):
        whole = f"{source}.{name}"
        target = whole if whole in MODULES else source
        assert name[0] != "_", f"{module} imports the private {whole}"
        if "internal" in target or own == package_of(target) or own.startswith(f"{package_of(target)}."):
            continue
        assert target in public_modules(), f"{module} imports {target}, which its package does not list"
        assert whole in MODULES or name in stated(source), f"{module} imports {whole}, which is not public"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_functions_fit_on_a_screen(module):
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES or f"{module}.{node.name}" in LONG, f"{module}.{node.name}: {lines} lines"
