"""Clients that we did not write, on the driver emulator: that they work shows that it is faithful.

Started by `make test-emulator`, which puts the emulator's libcuda.so.1 first on LD_LIBRARY_PATH.
The extra `test-cuda` installs the clients; one that is missing is a failure. Nothing here is a GPU
result.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

# cuda-bindings and tinygrad do not support older Pythons.
collect_ignore_glob = ["test_*.py"] if sys.version_info < (3, 11) else []


class Emulator:
    """The control interface of tests/emulator/emulator.h, as far as it is used here."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        if not hasattr(self._library, "kvspan_emulator_reset"):
            pytest.exit("libcuda.so.1 is not the emulator: run `make test-emulator`", 1)
        self._library.kvspan_emulator_violations.restype = ctypes.c_ulonglong
        self._library.kvspan_emulator_violation.restype = ctypes.c_char_p

    def reset(self, options: str = "") -> None:
        """Start over with options; fails unless the ledger is empty."""
        assert self._library.kvspan_emulator_reset(options.encode()) == 0, "something was left"

    def violations(self) -> list[str]:
        """Take what was done wrong since the last time."""
        n = self._library.kvspan_emulator_violations()
        texts = [self._library.kvspan_emulator_violation(i).decode() for i in range(n)]
        self._library.kvspan_emulator_clear_violations()
        return texts

    def read_kernel(self, stream: int, at: int, size: int, us: float = 1000.0) -> None:
        """Queue a kernel that reads a range."""
        result = self._library.kvspan_emulator_read_kernel(
            ctypes.c_void_p(stream),
            ctypes.c_ulonglong(at),
            ctypes.c_size_t(size),
            ctypes.c_size_t(0),
            ctypes.c_double(us),
            None,
        )
        assert result == 0

    def hold(self, is_held: bool) -> None:
        """Let nothing on any stream run until it is waited for."""
        self._library.kvspan_emulator_hold_streams(int(is_held))


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """A fresh emulator of two devices; afterwards nothing was done wrong and nothing is left."""
    control = Emulator()
    control.reset("devices=2")
    yield control
    assert control.violations() == []
    control.reset()


@pytest.fixture
def run_client() -> Callable[..., str]:
    """Run a program in a process of its own, with the emulator's options; it must end well."""

    def run(program: str, options: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "KVSPAN_EMULATOR": options},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run
