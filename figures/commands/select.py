"""`linfit select`."""

from pathlib import Path
from typing import Annotated

import tyro


def select(file: Annotated[Path, tyro.conf.Positional], /, out: Path | None = None, json: bool = False) -> None:
    """Choose the ensemble coefficient τ and the ridge penalty λ for your own features, by exact leave-one-out.

    Args:
        file: an .npz with X (n, p), y (n,), theta_1 (p,), and optionally X_val, y_val.
        out: picture of the error surface (.png, .pdf or .svg); FILE with the ending .select.png if not given.
        json: print the result as JSON instead of a table.
    """
    from figures.selection import report_selection

    report_selection(file, out, json)
