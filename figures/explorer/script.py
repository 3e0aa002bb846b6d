"""'Copy as Python': a program that calls the function of the page again."""

from collections.abc import Callable

from figures.explorer.page import Page, Values
from figures.explorer.tables import average


def script(page: Page, values: Values, *, simulated: bool = False) -> str:
    """A program that recomputes every plotted number, bit for bit, by the function that the page itself calls.

    Running it leaves `tables` as `page.compute(values)` returns it, with the overlay as tables["simulated"].
    """
    overlay = page.overlay
    imported: list[Callable] = [page.curves, page.parameters, *([overlay.replicate, average] if simulated else [])]
    rows = "".join(f"    {name}={value!r},\n" for name, value in values.items())
    parts = [
        f'"""linfit explore: {page.title}. Every number of the page, recomputed; needs linfit[explore].\n\n'
        "Keep it away from files of yours that are called figures.py, sims.py, theory.py or linfit.py: Python would import those.\n"
        '"""',
        'import jax\n\njax.config.update("jax_enable_x64", True)',
        "\n".join(f"from {each.__module__} import {each.__name__}" for each in imported if each is not dict),
        f"parameters = {page.parameters.__name__}(\n{rows})",
        *([page.data_source] if page.data_source else []),
        f"tables = curves({'' if page.data is None else 'data, '}parameters)",
    ]
    if simulated:
        samples = f"[{overlay.replicate.__name__}(index, parameters) for index in range({overlay.replicates})]"
        parts += [f"samples = {samples}", f'tables["simulated"] = average(samples, {overlay.axes!r})']
    show = "for table, columns in tables.items():\n    print(table, {name: values[:3] for name, values in columns.items()})"
    return "\n\n".join([*parts, show]) + "\n"
