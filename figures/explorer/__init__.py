"""The explorer: curves that follow sliders, in a browser or a notebook (`linfit explore`)."""

from figures.explorer.session import app as app

__all__ = ["app"]
