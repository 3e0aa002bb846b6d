"""What the last bits of a number may depend on, beyond the sweep: settings, versions, the device."""

import os
import platform
import sys
from functools import cache
from importlib.metadata import version

__all__ = ["SETTINGS"]

_NAMES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "NPROC", "JAX_ENABLE_X64")
SETTINGS = dict.fromkeys(_NAMES, "1")
"""Environment of every process that runs a kernel: one thread, so that no bit depends on a split; double precision."""


@cache
def versions() -> dict[str, str]:
    """Of Python, the machine and the packages."""
    packages = ("linfit", "jax", "jaxlib", "numpy", "scipy")
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "machine": platform.machine()} | {package: version(package) for package in packages}


def environment() -> dict[str, str]:
    """`versions`, `SETTINGS` as they are in this process, and the device that JAX, if it is loaded, computes on."""
    found = versions() | {name: os.environ.get(name, "not set") for name in SETTINGS}
    jax = sys.modules.get("jax")
    return found | {"device": "cpu" if jax is None else jax.devices()[0].device_kind}
