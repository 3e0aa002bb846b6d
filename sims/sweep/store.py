"""Where a sweep's numbers are kept: a zarr 3 store that any xarray opens, and that no crash can spoil.

One process writes, under a lock that dies with it. A task's numbers are whole chunks of their own; its `status` is
written after they have reached the disk, so that whatever is marked as done is there. The arrays:

    NAME_samples   (cell axes, replicate, batched axes)   every replicate; NaN where it failed or is missing
    NAME           (cell axes, batched axes)              their mean, once the cell is finished
    NAME_error     the same                               its standard error
    status         (cell axes, replicate)                 0 missing, 1 done, 2 failed
    message        the same                               what went wrong
    seconds        the same                               what the kernel took
    replicates     (cell axes)                            how many the mean is over, 0 while unfinished
"""

import fcntl
import json
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from linfit.internal.files import sync, whole_file
from sims.sweep.environment import SETTINGS, versions
from sims.sweep.plan import Sweep, Task, sweep_from_configuration
from sims.sweep.task import Result

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["export", "read", "read_sweep"]

FORMAT = 1
MISSING, DONE, FAILED = 0, 1, 2

_KEPT = "; what was finished is kept, and --resume computes the rest"

_NUMBERS = BloscCodec(cname="lz4", clevel=1, shuffle="shuffle")
"""A third of the time of zarr's default on surfaces of risks, and smaller."""


def create(path: Path, sweep: Sweep) -> None:
    """An empty store for a sweep; it appears whole or not at all. ValueError if something is there already."""
    if path.exists():
        raise ValueError(f"{path} exists; --resume computes what is missing in it, another --store starts anew")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        try:
            _lay_out(draft, sweep)
            draft.chmod(0o755)
            _sync([draft, *draft.rglob("*")])
            draft.rename(path)  # fails if another process was quicker
            _sync([path.parent])
        except OSError:
            if path.exists():
                raise ValueError(f"{path} exists: another sweep has just created it") from None
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _lay_out(folder: Path, sweep: Sweep) -> None:
    """All arrays and attributes; only the coordinates have values yet."""
    scalars = [name for name, values in sweep.parameters.items() if values.ndim == 0]
    what = {"title": sweep.experiment.help, "experiment": sweep.experiment.name}
    how = {"configuration": json.dumps(sweep.configuration), "seed": sweep.seed, "format": FORMAT}
    origin = {"versions": json.dumps(versions()), "revision": revision(), "device": ""}
    more = {"wall_time": 0.0, "wall_time_units": "s", "coordinates": " ".join([*scalars, *sweep.design])}
    group = zarr.create_group(folder, zarr_format=3, attributes=what | how | origin | more)
    for name, values in sweep.parameters.items():
        parameter, along = sweep.experiment.parameters[name], "point" if name in sweep.design else name
        _coordinate(group, name, along, values, units=parameter.unit, long_name=parameter.help)
    _coordinate(group, "replicate", "replicate", np.arange(sweep.seeds), long_name="replicate; its key is made of it")
    if sweep.design:
        points = np.arange(sweep.task_dims["point"])
        _coordinate(group, "point", "point", points, long_name="point of the Sobol design")
    _empty_arrays(group, sweep)
    with warnings.catch_warnings():  # zarr: not in the specification; xarray asks for it nevertheless
        warnings.simplefilter("ignore", category=zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(folder)


def _create(group: zarr.Group, name: str, dims: Mapping[str, int], dtype: Any, **options: Any) -> zarr.Array:
    """An empty array, with all its chunks in one folder, so that there is one folder to bring to the disk."""
    shape, flat = tuple(dims.values()), {"name": "default", "separator": "."}
    options |= {"dimension_names": tuple(dims), "chunk_key_encoding": flat}
    return group.create_array(name, shape=shape, dtype=dtype, **options)


def _coordinate(group: zarr.Group, name: str, along: str, values: np.ndarray, **attributes: Any) -> None:
    kind, dims = str if values.dtype.kind == "U" else values.dtype, dict(zip([along], values.shape))
    array = _create(group, name, dims, kind, attributes=attributes)
    array[...] = values.astype(object) if kind is str else values


def _empty_arrays(group: zarr.Group, sweep: Sweep) -> None:
    """Chunks: one cell, the replicates of one task, the batched axes whole."""
    cells = sweep.task_dims
    each = cells | {"replicate": sweep.seeds}

    def empty(name: str, dims: Mapping[str, int], inner: Mapping[str, int], dtype: Any, **attributes: Any) -> None:
        chunks = [1] * len(cells) + [sweep.chunk] * ("replicate" in dims) + [*inner.values()]
        options = {"compressors": _NUMBERS, "fill_value": np.nan} if dtype == "float64" else {"fill_value": dtype()}
        _create(group, name, {**dims, **inner}, dtype, chunks=tuple(chunks), attributes=attributes, **options)

    for name, output in sweep.experiment.outputs.items():
        inner, unit = sweep.output_dims(name), output.unit
        empty(name, cells, inner, "float64", units=unit, long_name=output.help, best=output.best or "")
        empty(f"{name}_error", cells, inner, "float64", units=unit, long_name=f"standard error of {name}")
        empty(f"{name}_samples", each, inner, "float64", units=unit, long_name=f"{output.help}, every replicate")
    empty("status", each, {}, np.int8, long_name="0 missing, 1 done, 2 failed")
    empty("message", each, {}, str, long_name="what went wrong")
    empty("seconds", each, {}, "float64", units="s", long_name="time of the kernel")
    empty("replicates", cells, {}, np.int64, long_name="replicates in the mean, 0 while unfinished")


def revision() -> str:
    """Git revision of the code, "+" if it has been changed since, "" where it is not kept by git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    questions = ("ls-files", Path(__file__).name), ("describe", "--always", "--abbrev=40", "--dirty=+")
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
    try:
        listed, described = (subprocess.run([*git, *question], **settings).stdout.strip() for question in questions)
    except (OSError, subprocess.SubprocessError):
        return ""
    return described if listed else ""  # else the repository is that of whoever installed this


@contextmanager
def opened(path: Path, sweep: Sweep) -> Iterator["Store"]:
    """The store for writing, locked as long as this process lives or the block lasts.

    Raises ValueError if it is no store, holds another configuration or was made by other versions, or is in use, and
    OSError if it cannot be written.
    """
    attributes = read_attributes(path)
    found = list(_differences(json.loads(attributes["configuration"]), sweep.configuration))
    found += _differences(json.loads(attributes["versions"]), versions())
    if found:
        raise ValueError(f"{path} holds another sweep: " + "; ".join(found))
    with _writing(path):
        lock = (path / "status" / "zarr.json").open("r+b")  # never replaced, unlike zarr.json of the store
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is in use: another sweep is writing to it") from None
        for leftover in path.glob("**/*.partial"):  # of writers that were killed
            leftover.unlink(missing_ok=True)
        yield Store(path, sweep)


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """One line for each entry of two nested mappings that differs.

    >>> list(_differences({"seed": 0, "parameters": {"n": 5}}, {"seed": 1, "parameters": {"n": 5}}))
    ['seed: the store has 0, asked for is 1']
    """
    for name in dict.fromkeys([*stored, *asked]):
        one, other = stored.get(name), asked.get(name)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other)
        else:
            yield f"{name}: the store has {_brief(one)}, asked for is {_brief(other)}"


def _brief(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} values {json.dumps(value[:2])[1:-1]} … {json.dumps(value[-1])}"
    return "nothing" if value is None else json.dumps(value)


class Store:
    """A store that this process may write to; made by `opened`."""

    def __init__(self, path: Path, sweep: Sweep):
        self.path, self.sweep = path, sweep
        self.group: Any = zarr.open_group(path, mode="r+")
        self.status = np.asarray(zarr.open_array(path / "status", mode="r")[...])
        self.device = read_attributes(path)["device"]

    def missing_tasks(self, retry: bool) -> list[Task]:
        """Tasks that are not done, or not even failed unless `retry`."""
        wanted = (self.status == MISSING) | ((self.status == FAILED) & retry)
        return [task for task in self.sweep.tasks if wanted[(*task.cell, slice(task.first, task.last))].any()]

    def write(self, task: Task, result: Result) -> None:
        """Keep a task's numbers, then mark it as done; ValueError if they were made under other conditions."""
        self._check_origin(result.environment)
        region: Any = (*task.cell, slice(task.first, task.last))
        failed = np.array([bool(message) for message in result.messages])
        values: dict[str, np.ndarray] = {f"{name}_samples": samples for name, samples in result.samples.items()}
        values["seconds"] = result.seconds
        if failed.any() or (self.status[region] == FAILED).any():
            values["message"] = np.array(result.messages, dtype=object)
        status = np.where(failed, FAILED, DONE).astype(np.int8)
        self._put(region, values, {"status": status})
        self.status[region] = status
        if (self.status[task.cell] == DONE).all():
            self._summarise(task.cell)

    def summarise(self) -> None:
        """Means and standard errors of finished cells that have none, because a run ended just before."""
        counts = np.asarray(self.group["replicates"][...])
        for cell in np.argwhere((self.status == DONE).all(axis=-1) & (counts == 0)).tolist():
            self._summarise(tuple(cell))

    def _summarise(self, cell: tuple[int, ...]) -> None:
        values = {}
        for name in self.sweep.experiment.outputs:
            samples = np.asarray(self.group[f"{name}_samples"][cell])
            with np.errstate(invalid="ignore", over="ignore"):  # infinite samples
                values[name] = samples.mean(axis=0)
                spread = samples.std(axis=0, ddof=1) if len(samples) > 1 else np.full(samples.shape[1:], np.nan)
            values[f"{name}_error"] = spread / len(samples) ** 0.5
        self._put(cell, values, {"replicates": np.asarray(self.sweep.seeds)})

    def add_wall_time(self, seconds: float) -> None:
        """Note how long a run took, and under which revision of the code."""
        attributes = read_attributes(self.path)
        revisions = dict.fromkeys([*attributes["revision"].split(", "), revision()])
        self._note(wall_time=attributes["wall_time"] + seconds, revision=", ".join(filter(None, revisions)))

    def _check_origin(self, origin: Mapping[str, str]) -> None:
        expected = versions() | SETTINGS | {"device": self.device or origin["device"]}
        found = {name: (origin.get(name, "not set"), value) for name, value in expected.items()}
        wrong = [f"{name} is {there} there, {here} here" for name, (there, here) in found.items() if there != here]
        if wrong:
            start = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
            raise ValueError(
                f"a worker would give other numbers: {'; '.join(wrong)}. Start workers with `{start} dask worker …`"
            )
        if not self.device:
            self.device = origin["device"]
            self._note(device=self.device)

    def _put(self, region: tuple, *steps: Mapping[str, np.ndarray]) -> None:
        """Write one chunk of each array; a step begins when what the one before wrote is on the disk."""
        place = [index.start // self.sweep.chunk if isinstance(index, slice) else index for index in region]
        with _writing(self.path, _KEPT):
            for values in steps:
                touched = []
                for name, value in values.items():
                    array = self.group[name]
                    array[region] = value
                    chunk = [*place, *[0] * (array.ndim - len(place))]
                    touched += [self.path / name / ".".join(["c", *map(str, chunk)]), self.path / name]
                _sync(touched)

    def _note(self, **attributes: Any) -> None:
        file = self.path / "zarr.json"
        content = json.loads(file.read_text())
        content["attributes"] |= attributes
        with whole_file(file) as draft:
            draft.write_text(json.dumps(content, indent=2))
            _sync([draft])
        _sync([self.path])


def _sync(paths: Iterable[Path]) -> None:
    """Bring files and folders to the disk, all at once; chunks that hold nothing are not there."""

    def one(path: Path) -> None:
        with suppress(FileNotFoundError):
            sync(path)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(one, paths))


@contextmanager
def _writing(path: Path, consequence: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error.strerror or error}{consequence}") from error


def read_attributes(path: Path) -> dict[str, Any]:
    """Attributes of a store, without opening its arrays; ValueError if it is none, or of another format."""
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        found = attributes["format"]
        json.loads(attributes["configuration"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a store made by linfit sweep") from None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, this version reads {FORMAT}")
    return attributes


def read_sweep(path: Path) -> Sweep:
    """The sweep that a store holds."""
    return sweep_from_configuration(json.loads(read_attributes(path)["configuration"]))


def read(path: Path | str) -> "xr.Dataset":
    """A store as an xarray Dataset, loaded when used: `xarray.open_zarr(path)` after checking that it is one."""
    import xarray as xr  # a second to load, for readers alone

    read_attributes(Path(path))
    return xr.open_zarr(path, chunks=None)


def export(path: Path, out: Path) -> None:
    """Copy a store into one file: `.nc` (NetCDF 3, everything), or `.csv` (means, standard errors; a line per point).

    Raises ValueError for another ending, or an array of more than 2 GiB, which NetCDF 3 cannot hold.
    """
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.absolute().parent}")
    if out.suffix == ".nc":
        data = read(path)
        large = [name for name in data if data[name].nbytes >= 2**31]
        if large:
            raise ValueError(f"{', '.join(map(str, large))}: too large for NetCDF 3; read {path} by xarray.open_zarr")
        with whole_file(out) as draft:
            data.load().to_netcdf(draft, engine="scipy")
    elif out.suffix == ".csv":
        sweep = read_sweep(path)
        names = [column for name in sweep.experiment.outputs for column in (name, f"{name}_error")]
        axes = [*sweep.task_dims, *sweep.batched_dims]
        data = read(path)
        grid = data[axes].coords.to_dataset()  # what does not vary along an axis repeats
        data = data[names].broadcast_like(grid) if axes else data[names].expand_dims("row")
        table = data.to_dataframe(dim_order=axes or None).reset_index()
        with whole_file(out) as draft:
            table[[*sweep.parameters, *names]].to_csv(draft, index=False, na_rep="nan", lineterminator="\r\n")
    else:
        raise ValueError(f"--out must end in .nc or .csv, got {out.name}")
