"""`kvspan doctor --gpu` on the driver emulator, which it must not take for a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from test_cuda_pool import emulator

pytestmark = pytest.mark.skipif(
    emulator is None, reason="the emulator's libcuda.so.1 is not first on LD_LIBRARY_PATH"
)

MAIN = "import sys; from kvspan.cli import main; sys.exit(main(sys.argv[1:]))"


def doctor(*words: str, options: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, "doctor", "--gpu", *words],
        env={**os.environ, "KVSPAN_EMULATOR": options},
        capture_output=True,
        text=True,
    )


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return {c["name"]: c["outcome"] for c in json.loads(done.stdout)["checks"]}


def test_all_is_well_and_nobody_takes_it_for_a_gpu() -> None:
    done = doctor()
    assert (done.returncode, done.stderr) == (0, "")
    assert "EMULATOR: this driver is kvspan's emulator. NOTHING BELOW IS A GPU'S" in done.stdout
    assert "9 passed, 0 failed" in done.stdout
    assert "skip  peers" in done.stdout
    assert re.search(r"cuMemSetAccess +2 MiB +16 ", done.stdout)
    assert "no GPU's)" in done.stdout


def test_peers_are_tried() -> None:
    done = doctor("1", "--json", options="devices=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["is_emulated"]
    assert outcomes(done)["peers"] == "pass"


@pytest.mark.parametrize(
    ("options", "failed", "says"),
    [
        ("missing=cuMemMap", {"entry points", "kvspan"}, "the driver lacks cuMemMap"),
        ("memory=200MiB", {"kvspan"}, "capacity is 256 MiB, more than the 200 MiB"),
        ("devices=0", {"driver"}, "cuInit: CUDA_ERROR_NO_DEVICE"),
        ("driver=11020", {"kvspan"}, "11.4 is the oldest"),
    ],
)
def test_what_fails_is_a_line_and_the_status(options: str, failed: set[str], says: str) -> None:
    done = doctor("--json", options=options)
    assert (done.returncode, done.stderr) == (1, "")
    assert {name for name, outcome in outcomes(done).items() if outcome == "FAIL"} == failed
    assert says in done.stdout


def test_a_device_that_is_not_there_is_named() -> None:
    done = doctor("7", "--json")
    assert done.returncode == 1
    assert outcomes(done) == {"driver": "pass", "device": "FAIL"}
    assert "there is no cuda:7; the driver shows 1 devices" in done.stdout


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("cuMemSetAccess", "a mapping's life"),
        ("cuStreamSynchronize", "a mapping's life"),
        ("cuEventRecord", "fences"),
        ("cuMemImportFromShareableHandle", "export, import"),
    ],
)
def test_a_call_that_fails_fails_its_check_alone(name: str, check: str) -> None:
    """And leaves nothing on the device: the emulator would end the process with status 86."""
    code = f"""
import ctypes
one = ctypes.c_ulonglong(1)
ctypes.CDLL("libcuda.so.1").kvspan_emulator_fail(b"{name}", one, 999, one)
"""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{MAIN}", "doctor", "--gpu", "--json"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert [c for c, outcome in outcomes(done).items() if outcome == "FAIL"] == [check]
    assert f"{name}: CUDA_ERROR_UNKNOWN" in done.stdout
