"""'Copy as Python': the source of the function that made the numbers, with what it needs, and a call of it."""

import ast
import inspect
import sys
from collections.abc import Callable

from figures.explorer.page import Page, Parameters, average


def script(page: Page, parameters: Parameters, *, simulated: bool = False) -> str:
    """A program of its own that recomputes every plotted number, bit for bit, through the public API.

    Running it leaves `tables` as `page.compute(parameters)` returns it, with the overlay as tables["simulated"].
    """
    overlay = page.overlay if simulated else None
    functions = [page.curves] if overlay is None else [page.curves, overlay.replicate]
    parts = [
        f'"""linfit explore: {page.title}. Every number of the page, recomputed."""',
        'import jax\n\njax.config.update("jax_enable_x64", True)',
        _with_requirements(*functions),
        f"parameters = {_literal(parameters)}",
    ]
    if page.data is None:
        parts.append("tables = curves(**parameters)")
    else:
        parts += [page.data_source, "tables = curves(data, **parameters)"]
    if overlay is not None:
        call = f"{overlay.replicate.__name__}(index, **parameters)"
        parts += [
            _with_requirements(average),
            f"samples = [{call} for index in range({overlay.replicates})]",
            f'tables["simulated"] = average(samples, {overlay.axes!r})',
        ]
    parts.append(
        "for table, columns in tables.items():\n    print(table, {name: values[:3] for name, values in columns.items()})"
    )
    return "\n\n".join(parts) + "\n"


def _literal(parameters: Parameters) -> str:
    rows = "".join(f"    {name!r}: {value!r},\n" for name, value in parameters.items())
    return "{\n" + rows + "}"


def _with_requirements(*functions: Callable) -> str:
    """Source of functions of one module together with the imports, constants and functions there that they use."""
    source = inspect.getsource(sys.modules[functions[0].__module__])
    statements = [(node, _defined(node)) for node in ast.parse(source).body]
    wanted = _closure(statements, {function.__name__ for function in functions})
    imports, definitions = [], []
    for node, names in statements:
        if not names & wanted:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [alias for alias in node.names if (alias.asname or alias.name) in wanted]
            imports.append(ast.unparse(node))
        else:
            decorators = getattr(node, "decorator_list", [])
            node.lineno = min([node.lineno, *(decorator.lineno for decorator in decorators)])
            definitions.append("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]))
    return "\n\n".join(["\n".join(imports), *definitions])


def _closure(statements: list[tuple[ast.stmt, set[str]]], names: set[str]) -> set[str]:
    """`names` and every name they need, directly or not."""
    known: set[str] = set()
    frontier = names
    while frontier:
        known |= frontier
        reached = {
            node.id
            for statement, defined in statements
            if defined & frontier and not isinstance(statement, ast.Import | ast.ImportFrom)
            for node in ast.walk(statement)
            if isinstance(node, ast.Name)
        }
        frontier = reached - known
    return known


def _defined(node: ast.stmt) -> set[str]:
    """Names that a statement of a module brings into being."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()
