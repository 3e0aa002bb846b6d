"""Sphinx configuration. Formulas become MathML, which browsers draw themselves: no script, no network."""

import importlib.metadata

from docutils import nodes
from latex2mathml.converter import convert

project = "linfit"
author = "The linfit authors"
release = importlib.metadata.version("linfit")
extensions = ["myst_parser", "sphinx.ext.autodoc"]
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
    """|x| is an absolute value in our docstrings, not a substitution."""
    lines[:] = [line if line.lstrip().startswith(">>>") else line.replace("|", r"\|") for line in lines]


def setup(app):
    """Register the MathML renderer."""
    app.connect("autodoc-process-docstring", _escape_bars)
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))


html_math_renderer = "mathml"
