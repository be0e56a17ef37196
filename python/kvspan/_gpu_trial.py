"""A self-check of one GPU: the work behind ``kvspan doctor --gpu``.

First the driver is called as kvspan calls it, by ctypes and timed, so that what fails here is the
driver's or the machine's; then kvspan's public API; then torch's attention over kvspan's tensors.
Each check stands for itself and says what it saw: a report is read by somebody elsewhere.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import kvspan

MIB = 1 << 20
ROUNDS = 16  # of a mapping's life

# CUdevice_attribute, of cuda.h.
ATTRIBUTES = {
    "compute capability major": 75,
    "compute capability minor": 76,
    "virtual memory management": 102,
    "export by file descriptor": 103,
    "GPUDirect RDMA with virtual memory": 110,
    "memory pools": 115,
    "integrated": 18,
}
# What kvspan needs, in the version in which it asks for it.
ENTRY_POINTS = {
    "cuMemAddressReserve": 10020,
    "cuMemAddressFree": 10020,
    "cuMemCreate": 10020,
    "cuMemRelease": 10020,
    "cuMemMap": 10020,
    "cuMemUnmap": 10020,
    "cuMemSetAccess": 10020,
    "cuMemGetAllocationGranularity": 10020,
    "cuMemExportToShareableHandle": 10020,
    "cuMemImportFromShareableHandle": 10020,
    "cuMemcpyDtoDAsync": 3020,
    "cuMemsetD8Async": 3020,
    "cuStreamWaitEvent": 3020,
    "cuStreamIsCapturing": 10000,
    "cuThreadExchangeStreamCaptureMode": 10010,
    "cuEventQuery": 2000,
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    Attributes
    ----------
    name : str
        What was looked at.
    outcome : str
        "pass", "FAIL" or "skip".
    detail : str
        What was seen, or why not.
    """

    name: str
    outcome: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Latency:
    """What calls of one name took, in microseconds on the host's clock."""

    call: str
    size: int
    n_calls: int
    median_us: float
    longest_us: float


@dataclasses.dataclass(frozen=True)
class GpuTrial:
    """The outcome of all checks.

    Attributes
    ----------
    is_emulated : bool
        Whether the driver is kvspan's emulator: then nothing here is a GPU's result.
    checks : tuple of Check
        In the order in which they were made.
    latencies : tuple of Latency
        Of the driver's calls, by name and size of the frame.
    """

    is_emulated: bool
    checks: tuple[Check, ...]
    latencies: tuple[Latency, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.outcome != "FAIL" for check in self.checks)


class Skip(Exception):  # noqa: N818
    """A check that cannot be made here."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("rest", ctypes.c_uint64 * 2),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_DEVICE, _PINNED, _READ_WRITE, _DESCRIPTOR = 1, 1, 3, 1


class _Driver:
    """libcuda.so.1: calls that raise, and are timed while `size` is set."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.size = 0
        self.times: dict[tuple[str, int], list[float]] = defaultdict(list)

    def __call__(self, name: str, *arguments: Any) -> None:
        function = getattr(self.library, name)
        begin = time.perf_counter_ns()
        status = function(*arguments)
        took_us = (time.perf_counter_ns() - begin) / 1000
        if status != 0:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(status, ctypes.byref(text))
            raise OSError(f"{name}: {text.value.decode() if text.value else f'error {status}'}")
        if self.size:
            self.times[name.removesuffix("_v2"), self.size].append(took_us)

    def number(self, name: str, *arguments: Any, kind: Any = ctypes.c_int) -> int:
        """Call what writes a number to its first argument."""
        out = kind()
        self(name, ctypes.byref(out), *arguments)
        return int(out.value)

    @contextmanager
    def context(self, ordinal: int) -> Iterator[int]:
        """Make the device's primary context current; yields the device."""
        device = self.number("cuDeviceGet", ordinal)
        context, popped = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self("cuCtxPushCurrent_v2", context)
            yield device
            self("cuCtxPopCurrent_v2", ctypes.byref(popped))
        finally:
            self("cuDevicePrimaryCtxRelease_v2", device)

    @contextmanager
    def mapped(self, handle: int, size: int, devices: list[int]) -> Iterator[ctypes.c_uint64]:
        """Show a handle's memory at an address."""
        at = ctypes.c_uint64()
        u64 = ctypes.c_uint64
        self("cuMemAddressReserve", ctypes.byref(at), u64(size), u64(0), u64(0), u64(0))
        try:
            self("cuMemMap", at, u64(size), u64(0), u64(handle), u64(0))
            try:
                grants = (_Access * len(devices))(
                    *(_Access(_Location(_DEVICE, device), _READ_WRITE) for device in devices)
                )
                self("cuMemSetAccess", at, u64(size), grants, u64(len(devices)))
                yield at
            except BaseException:
                self.library.cuCtxSynchronize()  # what was queued may still use the memory
                raise
            finally:
                self("cuMemUnmap", at, u64(size))
        finally:
            self("cuMemAddressFree", at, u64(size))

    @contextmanager
    def frame(self, size: int, ordinal: int, handle_types: int = 0) -> Iterator[int]:
        """Create physical memory."""
        properties = _Properties(_PINNED, handle_types, _Location(_DEVICE, ordinal))
        handle = ctypes.c_uint64()
        self(
            "cuMemCreate",
            ctypes.byref(handle),
            ctypes.c_uint64(size),
            ctypes.byref(properties),
            ctypes.c_uint64(0),
        )
        try:
            yield handle.value
        finally:
            self("cuMemRelease", handle)

    def fill(self, at: ctypes.c_uint64, value: int, size: int) -> None:
        """Set bytes, and wait until they are."""
        self("cuMemsetD8Async", at, ctypes.c_ubyte(value), ctypes.c_uint64(size), None)
        self("cuStreamSynchronize", None)

    def require(self, at: int, value: int) -> None:
        """Read a byte back."""
        seen = ctypes.c_ubyte()
        self("cuMemcpyDtoH_v2", ctypes.byref(seen), ctypes.c_uint64(at), ctypes.c_uint64(1))
        if seen.value != value:
            raise OSError(f"{seen.value} was read where {value} was written")


def try_gpu(ordinal: int = 0) -> GpuTrial:
    """Make all checks on one device.

    Parameters
    ----------
    ordinal : int
        N of "cuda:N".

    Returns
    -------
    GpuTrial
        What came of them. Nothing is raised: what fails is part of the report.
    """
    checks: list[Check] = []

    def check(name: str, body: Callable[[], str]) -> bool:
        try:
            checks.append(Check(name, "pass", body()))
        except Skip as reason:
            checks.append(Check(name, "skip", str(reason)))
        except Exception as error:
            text = str(error).partition("\n")[0]
            checks.append(Check(name, "FAIL", text or type(error).__name__))
        return checks[-1].outcome != "FAIL"

    try:
        driver = _Driver()
    except OSError:
        check("driver", lambda: _fail("libcuda.so.1 was not found: no NVIDIA driver"))
        return GpuTrial(False, tuple(checks), ())
    is_emulated = hasattr(driver.library, "kvspan_emulator_reset")
    if check("driver", lambda: _driver(driver)) and check(
        "device", lambda: _device(driver, ordinal)
    ):
        check("entry points", lambda: _entry_points(driver))
        check("attributes", lambda: _attributes(driver, ordinal))
        check("granularity", lambda: _granularity(driver, ordinal))
        check("a mapping's life", lambda: _life(driver, ordinal))
        check("fences", lambda: _fences(driver, ordinal))
        check("export, import", lambda: _export(driver, ordinal))
        check("peers", lambda: _peers(driver, ordinal))
        check("kvspan", lambda: _kvspan(ordinal))
        check("attention", lambda: _attention(ordinal))
    latencies = tuple(
        Latency(call, size, len(times), statistics.median(times), max(times))
        for (call, size), times in sorted(driver.times.items(), key=lambda item: item[0][::-1])
    )
    return GpuTrial(is_emulated, tuple(checks), latencies)


def _fail(why: str) -> str:
    raise OSError(why)


def _driver(driver: _Driver) -> str:
    driver("cuInit", 0)
    version = driver.number("cuDriverGetVersion")
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def _device(driver: _Driver, ordinal: int) -> str:
    count = driver.number("cuDeviceGetCount")
    if ordinal >= count:
        raise OSError(f"there is no cuda:{ordinal}; the driver shows {count} devices")
    with driver.context(ordinal) as device:
        name = ctypes.create_string_buffer(128)
        driver("cuDeviceGetName", name, len(name), device)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        driver("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return (
        f"cuda:{ordinal} of {count}: {name.value.decode()}, "
        f"{free.value // MIB} of {total.value // MIB} MiB free"
    )


def _entry_points(driver: _Driver) -> str:
    missing = []
    for name, version in ENTRY_POINTS.items():
        found = ctypes.c_void_p()
        arguments = (name.encode(), ctypes.byref(found), version, ctypes.c_uint64(0))
        if hasattr(driver.library, "cuGetProcAddress_v2"):
            driver.library.cuGetProcAddress_v2(*arguments, None)
        else:
            driver.library.cuGetProcAddress(*arguments)
        if not found.value:
            missing.append(name)
    if missing:
        raise OSError("the driver lacks " + ", ".join(missing))
    return f"all {len(ENTRY_POINTS)} asked for are there"


def _attributes(driver: _Driver, ordinal: int) -> str:
    device = driver.number("cuDeviceGet", ordinal)
    found = {
        name: driver.number("cuDeviceGetAttribute", which, device)
        for name, which in ATTRIBUTES.items()
    }
    if not found["virtual memory management"]:
        raise OSError("the device has no virtual memory management")
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _granularities(driver: _Driver, ordinal: int) -> tuple[int, int]:
    properties = _Properties(_PINNED, 0, _Location(_DEVICE, ordinal))
    minimum, recommended = (
        driver.number(
            "cuMemGetAllocationGranularity", ctypes.byref(properties), which, kind=ctypes.c_size_t
        )
        for which in (0, 1)
    )
    return minimum, recommended


def _granularity(driver: _Driver, ordinal: int) -> str:
    minimum, recommended = _granularities(driver, ordinal)
    return f"{minimum // 1024} KiB, recommended {recommended // 1024} KiB"


def _life(driver: _Driver, ordinal: int) -> str:
    minimum, _ = _granularities(driver, ordinal)
    sizes = [max(minimum, 2 * MIB), max(minimum, 32 * MIB)]
    with driver.context(ordinal):
        for size in sizes:
            for value in range(1, ROUNDS + 1):
                driver.size = size
                try:
                    with (
                        driver.frame(size, ordinal) as handle,
                        driver.mapped(handle, size, [ordinal]) as at,
                    ):
                        driver.fill(at, value, size)
                        driver.require(at.value + size - 1, value)
                finally:
                    driver.size = 0
    return f"{ROUNDS} times with frames of {' and '.join(f'{size // MIB} MiB' for size in sizes)}"


def _fences(driver: _Driver, ordinal: int) -> str:
    size = max(_granularities(driver, ordinal)[0], 2 * MIB)
    event, stream = ctypes.c_void_p(), ctypes.c_void_p()
    with (
        driver.context(ordinal),
        driver.frame(size, ordinal) as handle,
        driver.mapped(handle, size, [ordinal]) as at,
    ):
        driver("cuStreamCreate", ctypes.byref(stream), 1)
        driver("cuEventCreate", ctypes.byref(event), 2)
        try:
            n_bytes = ctypes.c_uint64(size)
            driver("cuMemsetD8Async", at, ctypes.c_ubyte(5), n_bytes, stream)
            driver("cuEventRecord", event, stream)
            driver("cuStreamWaitEvent", None, event, 0)
            driver("cuMemsetD8Async", at, ctypes.c_ubyte(6), ctypes.c_uint64(1), None)
            driver("cuStreamSynchronize", None)
            driver("cuEventQuery", event)
            driver.require(at.value, 6)
            driver.require(at.value + 1, 5)
        finally:
            driver("cuEventDestroy_v2", event)
            driver("cuStreamDestroy_v2", stream)
    return "work on one stream came after an event of another"


def _export(driver: _Driver, ordinal: int) -> str:
    device = driver.number("cuDeviceGet", ordinal)
    if not driver.number("cuDeviceGetAttribute", ATTRIBUTES["export by file descriptor"], device):
        raise Skip("the device cannot export memory as file descriptors")
    size = max(_granularities(driver, ordinal)[0], 2 * MIB)
    with driver.context(ordinal), driver.frame(size, ordinal, _DESCRIPTOR) as handle:
        fd, other = ctypes.c_int(), ctypes.c_uint64()
        u64 = ctypes.c_uint64
        driver("cuMemExportToShareableHandle", ctypes.byref(fd), u64(handle), _DESCRIPTOR, u64(0))
        try:
            driver(
                "cuMemImportFromShareableHandle",
                ctypes.byref(other),
                ctypes.c_void_p(fd.value),
                _DESCRIPTOR,
            )
        finally:
            os.close(fd.value)
        try:
            with (
                driver.mapped(handle, size, [ordinal]) as here,
                driver.mapped(other.value, size, [ordinal]) as there,
            ):
                driver.fill(here, 9, size)
                driver.require(there.value + size - 1, 9)
        finally:
            driver("cuMemRelease", other)
    return "an imported frame shows the exporter's bytes"


def _peers(driver: _Driver, ordinal: int) -> str:
    count = driver.number("cuDeviceGetCount")
    mine = driver.number("cuDeviceGet", ordinal)
    peers = [
        other
        for other in range(count)
        if other != ordinal
        and driver.number("cuDeviceCanAccessPeer", driver.number("cuDeviceGet", other), mine)
    ]
    if not peers:
        raise Skip("no other device can reach this one")
    with (
        kvspan.Pool(f"cuda:{ordinal}", capacity=64 * MIB, peers=peers) as pool,
        kvspan.KVCache(pool, 1, 1, 64, max_seqs=1, max_seq_len=1024) as cache,
        cache.sequence() as sequence,
    ):
        with driver.context(ordinal):
            sequence.extend(8, stream=0)
            driver("cuStreamSynchronize", None)  # the page is cleared there; peers are not ordered
        at = ctypes.c_uint64(cache.view(0, 0).address)
        with driver.context(peers[0]):
            driver.fill(at, 3, 64)
            driver.require(at.value + 63, 3)
    return f"cuda:{peers[0]} writes and reads our pages; peers: {peers}"


def _kvspan(ordinal: int) -> str:
    with (
        kvspan.Pool(f"cuda:{ordinal}", capacity=256 * MIB) as pool,
        kvspan.KVCache(pool, 2, 2, 64, max_seqs=4, max_seq_len=65536) as cache,
    ):
        sequence = cache.sequence()
        sequence.extend(10_000)
        child = sequence.fork()
        child.extend(1)
        sequence.truncate(50)
        # Not as a batch, whose arrays are torch's tensors: torch may have no CUDA.
        for _ in range(100):
            for row in (sequence, child):
                row.extend(1)
        lengths = [len(sequence), len(child)]
        if lengths != [150, 10_101]:
            raise OSError(f"lengths are {lengths} instead of [150, 10101]")
        calls, shared = cache.stats().calls, cache.stats().shared_bytes
        child.release()
        sequence.release()
        # The background may hold a frame for a moment.
        deadline = time.monotonic() + 5
        while pool.stats().in_use_bytes and time.monotonic() < deadline:
            cache.trim()
            time.sleep(0.01)
        stats = pool.stats()
        if stats.in_use_bytes or stats.n_failures:
            raise OSError(f"{stats.in_use_bytes} bytes stay in use, {stats.n_failures} failures")
    return (
        f"10,000 tokens, a fork sharing {shared // MIB} MiB, 100 steps: "
        f"{calls['map'].handles} frames mapped, {calls['copy'].calls} copies"
    )


def _attention(ordinal: int) -> str:
    if not torch.cuda.is_available():
        raise Skip(f"torch {torch.__version__} has no CUDA device")
    torch.manual_seed(0)
    device = torch.device("cuda", ordinal)
    with (
        kvspan.Pool(device, capacity=256 * MIB) as pool,
        kvspan.KVCache(pool, 2, 2, 64, torch.float16, max_seqs=2, max_seq_len=8192) as cache,
        torch.cuda.device(device),
        cache.sequence() as sequence,
    ):
        sequence.extend(3000)
        k, v = sequence.layer(1)
        dense = [torch.randn_like(plane, memory_format=torch.contiguous_format) for plane in (k, v)]
        k.copy_(dense[0]), v.copy_(dense[1])
        q = torch.randn(1, 2, 1, 64, dtype=torch.float16, device=device)

        def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k.transpose(0, 1)[None], v.transpose(0, 1)[None]
            )

        ours, theirs = attend(k, v), attend(*dense)
        difference = (ours - theirs).abs().max().item()
    if not difference < 1e-3:
        raise OSError(f"it differs by {difference} from attention over dense tensors")
    return f"torch's over 3,000 tokens differs by {difference:.2g} from that over dense tensors"


def format_trial(trial: GpuTrial) -> str:
    """Render a trial for a person, and for an issue.

    Parameters
    ----------
    trial : GpuTrial
        What `try_gpu` found.

    Returns
    -------
    str
        Lines of text.
    """
    lines = []
    if trial.is_emulated:
        lines = ["EMULATOR: this driver is kvspan's emulator. NOTHING BELOW IS A GPU'S RESULT.", ""]
    lines += [f"{check.outcome:4}  {check.name:16}  {check.detail}" for check in trial.checks]
    if trial.latencies:
        clock = "the emulator's own cost, no GPU's" if trial.is_emulated else "host clock"
        lines += ["", f"driver calls, microseconds ({clock})"]
        lines += [f"  {'call':24} {'frame':>7} {'calls':>6} {'median':>9} {'longest':>9}"]
        lines += [
            f"  {x.call:24} {x.size // MIB:3} MiB {x.n_calls:6} {x.median_us:9.1f} "
            f"{x.longest_us:9.1f}"
            for x in trial.latencies
        ]
    n = {outcome: sum(c.outcome == outcome for c in trial.checks) for outcome in ("pass", "FAIL")}
    lines += ["", f"{n['pass']} passed, {n['FAIL']} failed"]
    return "\n".join(lines)
