"""Which device the suite runs on, and what that changes. The one place that knows.

The host, unless KVSPAN_TEST_DEVICE says otherwise: `cuda:0` is a GPU, or the driver emulator where
its libcuda.so.1 comes first on LD_LIBRARY_PATH. Importing this gives pools and caches the device as
a default, and the habits of the host, which the suite's figures are about: frames of one page,
nothing mapped ahead, no thread in the background. What a GPU's own defaults do is tested in
tests/emulator_api and tests/gpu.

Programs that a test starts with `run_program` have it, too.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import kvspan

DEVICE = os.environ.get("KVSPAN_TEST_DEVICE", "cpu")
IS_HOST = DEVICE == "cpu"
DLPACK_DEVICE = (1, 0) if IS_HOST else (2, 0)


def load_emulator() -> ctypes.CDLL | None:
    """Return the CUDA driver if it is the emulator."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if hasattr(library, "kvspan_emulator_reset") else None


emulator = None if IS_HOST else load_emulator()
IS_GPU = not IS_HOST and emulator is None


def only_on_the_host(reason: str) -> pytest.MarkDecorator:
    """Mark what other devices do not have."""
    return pytest.mark.skipif(not IS_HOST, reason=f"only on the host: {reason}")


def not_on_a_gpu(reason: str) -> pytest.MarkDecorator:
    """Mark what needs memory that the host can reach, or an exact account of it."""
    return pytest.mark.skipif(IS_GPU, reason=f"not on a GPU: {reason}")


class Properties(ctypes.Structure):
    """CUmemAllocationProp of cuda.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("type", "handle_types", "location_type", "ordinal")),
        ("rest", ctypes.c_uint64 * 2),
    )


def smallest_page() -> int:
    """Return the smallest page that both the host's suite and the device can have."""
    if IS_HOST:
        return 64 << 10
    driver, granularity = ctypes.CDLL("libcuda.so.1"), ctypes.c_size_t()
    pinned_on_device = Properties(1, 0, 1, 0)
    assert driver.cuInit(0) == 0
    assert (
        driver.cuMemGetAllocationGranularity(
            ctypes.byref(granularity), ctypes.byref(pinned_on_device), 0
        )
        == 0
    )
    return max(64 << 10, granularity.value)


PAGE = smallest_page()
# How much wider heads are than on a host, so that a page holds as many tokens everywhere.
SCALE = PAGE // (64 << 10)


# What is left on the device


class Ledger(ctypes.Structure):
    """kvspan_emulator_ledger_t of tests/emulator/emulator.h."""

    _fields_ = tuple(
        (name, ctypes.c_ulonglong)
        for name in (
            *("reservations", "handles", "handle_references", "mappings", "streams", "events"),
            *("pinned_allocations", "device_allocations", "contexts", "pending_operations"),
            "device_bytes",
        )
    )


class Holdings(NamedTuple):
    """What this process has of pools: how many things, the bytes in them, mappings of them."""

    n_things: int
    n_bytes: int
    n_mappings: int


def holdings() -> Holdings:
    """Return what this process has; on a GPU nothing can be told."""
    if IS_HOST:
        return host_holdings()
    if emulator is None:
        return Holdings(0, 0, 0)
    now = Ledger()
    emulator.kvspan_emulator_ledger(ctypes.byref(now))
    figures = {name: getattr(now, name) for name, _ in Ledger._fields_}
    n_bytes, n_mappings = figures.pop("device_bytes"), figures.pop("mappings")
    return Holdings(sum(figures.values()), n_bytes, n_mappings)


def host_holdings() -> Holdings:
    """Count files of memory and mappings of them."""
    n_files = n_bytes = 0
    for fd in Path("/proc/self/fd").iterdir():
        try:
            if "memfd:kvspan" in os.readlink(fd):
                n_files += 1
                n_bytes += os.stat(fd).st_blocks * 512
        except OSError:  # the listing's own descriptor
            continue
    return Holdings(n_files, n_bytes, Path("/proc/self/maps").read_text().count("memfd:kvspan"))


def take_violations() -> list[str]:
    """Return, and forget, what the driver was asked that it leaves undefined."""
    if emulator is None:
        return []
    emulator.kvspan_emulator_violation.restype = ctypes.c_char_p
    emulator.kvspan_emulator_violations.restype = ctypes.c_ulonglong
    found = [
        emulator.kvspan_emulator_violation(ctypes.c_ulonglong(i)).decode()
        for i in range(emulator.kvspan_emulator_violations())
    ]
    emulator.kvspan_emulator_clear_violations()
    return found


# Pools, caches and tensors


class EmulatedTensor(torch.Tensor):
    """The emulator's memory as a CPU tensor: what is done with it comes after the default stream.

    So does a kernel on a GPU's default stream; torch for the CPU knows of no stream.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        finish_default_stream()
        return super().__torch_function__(func, types, args, kwargs or {})


def finish_default_stream() -> None:
    """Wait for it; not for others, so that work which is not ordered before it shows."""
    if IS_GPU:
        torch.cuda.default_stream().synchronize()
    if emulator is None:
        return
    context = ctypes.c_void_p()
    emulator.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    emulator.cuCtxPushCurrent_v2(context)
    emulator.cuStreamSynchronize(None)
    emulator.cuCtxPopCurrent_v2(ctypes.byref(context))
    emulator.cuDevicePrimaryCtxRelease_v2(0)


name_of = ctypes.pythonapi.PyCapsule_GetName
name_of.restype, name_of.argtypes = ctypes.c_char_p, (ctypes.py_object,)
pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
# Where the device's type stands in a capsule of either ABI.
DEVICE_TYPE_AT = {b"dltensor": 8, b"dltensor_versioned": 40}


def consume(capsule: Any) -> torch.Tensor:
    """Return a capsule's tensor; its owner is torch, as always."""
    if emulator is None:
        return torch.utils.dlpack.from_dlpack(capsule)
    name = name_of(capsule)
    if name in DEVICE_TYPE_AT:
        at = pointer_of(capsule, name) + DEVICE_TYPE_AT[name]
        ctypes.c_int32.from_address(at).value = 1  # kDLCPU
    return torch.utils.dlpack.from_dlpack(capsule).as_subclass(EmulatedTensor)


def tensor_of(view: Any) -> torch.Tensor:
    """Return a view's tensor."""
    return torch.from_dlpack(view) if emulator is None else consume(view.__dlpack__())


def install() -> None:
    """Make the device the default."""
    pool_of, cache_of = kvspan.Pool.__init__, kvspan.KVCache.__init__

    @functools.wraps(pool_of)
    def pool_of_device(self: Any, device: Any = DEVICE, **options: Any) -> None:
        if device != "cpu":
            options = {
                "background": False,
                "max_frame_size": options.get("page_size", "2MiB"),
                **options,
            }
        pool_of(self, device, **options)

    kvspan.Pool.__init__ = pool_of_device
    cache_of.__kwdefaults__["overread_tokens"] = 0
    if emulator is not None:
        kvspan.KVCache._tensor = lambda self, view: tensor_of(view)
    else:
        torch.set_default_device(DEVICE)


def run_program(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose pools are of this device. What it leaves at its end goes with it."""
    here, path = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
    options = os.environ.get("KVSPAN_EMULATOR")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, path] if path else [here]),
        "KVSPAN_EMULATOR": f"{options},expect=leak" if options else "expect=leak",
    }
    command = [sys.executable, "-c", f"import device\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    expected = "kvspan emulator: VIOLATION (expected): leak"
    done.stderr = "".join(
        line for line in done.stderr.splitlines(True) if not line.startswith(expected)
    )
    return done


if not IS_HOST:
    install()
