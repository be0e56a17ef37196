"""tinygrad's CUDA runtime: its own ctypes bindings, contexts, copies and peers; no virtual memory.

It never frees its contexts, so it runs in a process of its own, whose leaks at exit are expected.
"""

from __future__ import annotations

from collections.abc import Callable

PROGRAM = """
from tinygrad import Device
from tinygrad.device import BufferSpec

devices = [Device["CUDA:0"], Device["CUDA:1"]]
assert devices[0].count() == 2
spec, size = BufferSpec(), 3 << 20
sent = bytes(range(256)) * (size // 256)
here, there = (device.allocator._alloc(size, spec) for device in devices)
devices[0].allocator._copyin(here, memoryview(bytearray(sent)))
devices[0].allocator._transfer(there, here, size, devices[0], devices[1])
received = bytearray(size)
devices[1].allocator._copyout(memoryview(received), there)
assert received == sent
part = bytearray(256)
devices[0].allocator._copyout(memoryview(part), devices[0].allocator._offset(here, 256, 512))
assert part == sent[512:768]
for device, memory in zip(devices, (here, there)):
    device.synchronize()
    device.allocator._free(memory, spec)
print("done")
"""


def test_copies_between_devices(run_client: Callable[..., str]) -> None:
    said = run_client(PROGRAM, "devices=2,expect=leak")
    assert "done" in said
    leaks = [line for line in said.splitlines() if "VIOLATION" in line]
    assert all("(expected): leak: " in line for line in leaks), said
    # What it frees is gone: only its contexts, and the pinned memory that it keeps for later.
    assert not any("device allocations" in line for line in leaks), said
