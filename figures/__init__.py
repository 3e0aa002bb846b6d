"""What people look at and touch: figures, the report, the explorer, and the command `linfit`."""

__all__ = ["commands", "explorer", "style"]
