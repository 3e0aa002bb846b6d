"""Sphinx configuration. Formulas become MathML, which browsers draw themselves: no script, no network."""

import importlib.metadata

from docutils import nodes
from latex2mathml.converter import convert

project = "linfit"
author = "The linfit authors"
release = importlib.metadata.version("linfit")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
html_theme = "furo"
html_title = f"linfit {release}"
exclude_patterns = ["_build"]


def _inline(translator, node):
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _display(translator, node):
    translator.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode


def _escape_bars(app, what, name, obj, options, lines):
    """|x| is an absolute value and **values are keywords in our docstrings, not a substitution and bold print."""
    code = (">>>", "...")
    lines[:] = [x if x.lstrip().startswith(code) else x.replace("|", r"\|").replace(" **", r" \*\*") for x in lines]


def setup(app):
    """Register the MathML renderer."""
    app.connect("autodoc-process-docstring", _escape_bars)
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))


html_math_renderer = "mathml"
