"""`linfit validate`: real fine-tunings, each predicted before it is run."""

import sys
from importlib.util import find_spec
from pathlib import Path


def validate(out: Path = Path("output"), quick: bool = False, seed: int = 0) -> None:
    """Fine-tune small real networks, each run predicted from tangent features before it starts, and compare.

    OUT/predict holds one JSON file a run, and is read again: an interrupted table goes on where it stopped. Rows of
    language models, if any, are read from OUT/predict/language. Writes predict.png, .pdf and .nc (every number), and
    predict.md, the tables.

    Args:
        out: folder for all of it.
        quick: 8 small runs instead of 108.
        seed: of the runs that choose the boundary of trust; seed + 1 makes those that try it.
    """
    if not 0 <= seed < 2**32 - 1:
        raise ValueError(f"--seed must be between 0 and 2^32 − 2, got {seed}")
    if any(find_spec(package) is None for package in ("optax", "sklearn")):
        raise ValueError("validate needs the extra lab: pip install 'linfit[lab]'")
    import jax

    from figures.predict import pictures, tables
    from figures.report import prepare_folder, write_pictures
    from linfit.internal.files import whole_file

    def report(done: int, all: int) -> None:
        print(f"\rfine-tunings: {done} of {all}", end="\n" if done == all else "", file=sys.stderr, flush=True)

    prepare_folder(out)
    (picture,) = pictures(jax.random.key(seed), quick, out / "predict", report)
    ((_, _, caption),) = write_pictures("figures.predict", [picture], out)
    with whole_file(out / "predict.md") as temporary:
        temporary.write_text(tables(picture.data), encoding="utf-8")
    print(caption)
    print(f"written: {out / 'predict.png'}, {out / 'predict.md'}")
