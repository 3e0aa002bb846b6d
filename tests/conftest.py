"""Fixtures that several test files share."""

import os
import sys

import pytest

from figures.commands import main
from tests.bridge_checkpoints import families  # noqa: F401
from tests.sweep_toys import like_a_worker  # noqa: F401


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line within this process: what it prints, or with `code` what it complains about."""

    def call(*arguments, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["linfit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            sys.exit(main())
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == code, printed.err
        return printed.out if code == 0 else printed.err

    for name in ("JAX_ENABLE_X64", "OPENBLAS_NUM_THREADS", "NPROC"):  # what a command sets for its own process
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    return call
