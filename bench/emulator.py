"""The CUDA driver emulator (tests/emulator), for benchmarks that count and model driver work.

It has no GPU behind it and its times are virtual, made up of published latencies: what comes of it
is never a GPU result, and `NOT_A_GPU` says so in every report.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cpp_programs import BUILD, build
from harness import BenchError

NOT_A_GPU = "modelled, on the driver emulator with published latencies: not a GPU result"

# Virtual-memory calls: microseconds a handle. kvcached's bench_vmm and vAttention's table 3, A100;
# release is an assumption (tests/emulator/clock.cpp).
LATENCY_US = {
    "cuMemCreate": 193.0,
    "cuMemMap": 1.75,
    "cuMemSetAccess": 36.0,
    "cuMemUnmap": 26.0,
    "cuMemRelease": 2.0,
}
_CALL = re.compile(r"^\[\d+ lane (\d+) [\d.]+ us\] (\w+)\(", re.MULTILINE)
SERVING, BACKGROUND = 0, 1  # lanes: the virtual clocks of two threads


class Emulator:
    """A driver without a GPU, loaded in the place of libcuda.so.1."""

    def __init__(self) -> None:
        build("kvspan_emulator")
        # Whoever asks for libcuda.so.1 from now on gets this one, by its name.
        self._library = ctypes.CDLL(str(BUILD / "emulator" / "libcuda.so.1"), ctypes.RTLD_GLOBAL)
        self._library.kvspan_emulator_handles.restype = ctypes.c_ulonglong
        self._library.kvspan_emulator_log.restype = ctypes.c_size_t
        self._library.kvspan_emulator_call_time.restype = ctypes.c_double

    def restart(self, memory: str) -> None:
        """Start over with a device of so much memory, of which none is there."""
        latencies = ",".join(f"latency.{name}={us}" for name, us in LATENCY_US.items())
        options = f"memory_free=1,memory={memory},log_entries=10000000,{latencies}"
        if self._library.kvspan_emulator_reset(options.encode()) != 0:
            raise BenchError("the emulator's ledger is not empty: something leaked")
        self._library.kvspan_emulator_set_lane(SERVING)

    @contextmanager
    def background(self) -> Iterator[None]:
        """Let what is done inside be another thread's, on the emulator's clocks."""
        self._library.kvspan_emulator_set_lane(BACKGROUND)
        try:
            yield
        finally:
            self._library.kvspan_emulator_set_lane(SERVING)

    def compute(self, us: float) -> None:
        """Let virtual time pass: the model runs, and what was queued before it is done."""
        self._library.kvspan_emulator_advance(ctypes.c_double(us))

    def handles(self) -> Counter[str]:
        """Return the handles that each virtual-memory call has concerned so far."""
        return Counter(
            {name: self._library.kvspan_emulator_handles(name.encode()) for name in LATENCY_US}
        )

    def call_us(self) -> float:
        """Return the virtual time that this thread has spent in calls of the driver."""
        return float(self._library.kvspan_emulator_call_time())

    def calls(self) -> dict[int, Counter[str]]:
        """Return the number of calls by name so far, for each lane."""
        size = self._library.kvspan_emulator_log(None, 0)
        text = ctypes.create_string_buffer(size)
        self._library.kvspan_emulator_log(text, size)
        found: dict[int, Counter[str]] = {SERVING: Counter(), BACKGROUND: Counter()}
        for lane, name in _CALL.findall(text.value.decode()):
            found[int(lane)][name] += 1
        return found
