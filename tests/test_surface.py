"""What is public is said in one place, small, and all that packages use of each other; functions fit on a screen."""

import ast
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("linfit", "theory", "sims", "figures")
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
MOST_NAMES, MOST_LINES = 300, 60


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): ast.parse(path.read_text()) for path in FILES}
PACKAGES = {module_of(path) for path in FILES if path.name == "__init__.py"}


@cache
def stated(module: str) -> tuple[str, ...]:
    """The `__all__` of a module, as it is when imported."""
    return tuple(import_module(module).__all__)


@cache
def public_modules() -> frozenset[str]:
    """Packages, and the modules that they list."""
    listed = {f"{package}.{name}" for package in PACKAGES for name in stated(package)} & set(MODULES)
    return frozenset(PACKAGES | listed)


def functions(module: str) -> set[str]:
    return {node.name for node in MODULES[module].body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_package_states_its_public_names(package):
    for name in stated(package):
        assert f"{package}.{name}" in MODULES or getattr(import_module(package), name) is not None


def test_what_no_other_file_uses_starts_with_an_underscore():
    loaded_by_name = {"pictures", "curves", "replicate"}  # of a figure, of a page of the explorer
    texts = {path: set(re.findall(r"\w+", path.read_text())) for path in [*FILES, *(ROOT / "tests").glob("*.py")]}
    for path in FILES:
        module = module_of(path)
        if module in public_modules() or module.startswith("sims.claims."):  # claims are collected
            continue
        for name in functions(module) - loaded_by_name:
            used = any(name in words for other, words in texts.items() if other != path)
            assert used, f"{module}.{name}: start it with an underscore"


def test_public_modules_list_their_functions():
    for module in public_modules() - PACKAGES:
        used = {name for other in set(MODULES) - {module} for source, name in imports(other) if source == module}
        missing = functions(module) - set(stated(module)) - used
        assert not missing, f"{module}: add to __all__ or start with an underscore: {missing}"


def test_the_public_surface_is_small():
    names = set()
    for module in public_modules():
        for name in stated(module):
            if f"{module}.{name}" not in MODULES and name != "bridge":
                value = getattr(import_module(module), name)
                names.add((getattr(value, "__module__", module), name))
    assert len(names) <= MOST_NAMES, len(names)


@cache
def imports(module: str) -> tuple[tuple[str, str], ...]:
    """(module, name) of everything that is imported from this project, or taken from a module that is."""
    nodes, names, modules = list(ast.walk(MODULES[module])), [], {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in FLOORS:
            for alias in node.names:
                names.append((node.module, alias.name))
                if f"{node.module}.{alias.name}" in MODULES:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            names.append((modules[node.value.id], node.attr))
    return tuple(names)


def test_no_module_uses_the_private_names_of_another():
    for module in MODULES:
        for source, name in imports(module):
            assert name[0] != "_", f"{module} imports the private {source}.{name}"


def test_functions_fit_on_a_screen():
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MOST_LINES, f"{module}.{node.name}: {lines} lines"
