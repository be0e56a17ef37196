"""NVIDIA's cuda-core: its own allocator on the emulator, and our tensors in its view."""

from __future__ import annotations

from collections.abc import Callable

import pytest

# VirtualMemoryResource leaks one reference of every handle that it creates: `allocate` and
# `modify_allocation` keep the reference of cuMemCreate, and `deallocate` drops only the one that it
# has just taken by cuMemRetainAllocationHandle (cuda/core/_memory/_virtual_memory_resource.py,
# 1.2.2). The emulator reports them; nothing else is expected of it.
ALLOCATE_AND_GROW = """
from cuda.core import Device, VirtualMemoryResource, VirtualMemoryResourceOptions

MIB = 1 << 20
device = Device(0)
device.set_current()
stream = device.create_stream()
resource = VirtualMemoryResource(device, config=VirtualMemoryResourceOptions(handle_type=None))
buffer = resource.allocate(3 * MIB)
assert buffer.size % (2 * MIB) == 0 and buffer.size >= 3 * MIB
other = resource.allocate(2 * MIB)

buffer.fill(b"\\x05", stream=stream)
other.fill(b"\\x07", stream=stream)
stream.sync()  # growing may unmap the old range
grown = resource.modify_allocation(buffer, {new_size} * MIB)
assert grown.size >= {new_size} * MIB
grown_part = grown.size - 2 * MIB
copy = resource.allocate(grown.size)
copy.copy_from(grown, stream=stream)
event = stream.record()
event.sync()

from cuda.bindings import driver
seen = bytearray(4 * MIB)
assert driver.cuMemcpyDtoH(seen, int(copy.handle), 4 * MIB)[0] == 0
assert seen[: 3 * MIB] == b"\\x05" * (3 * MIB)
copy.close()
other.close()
print("done")
"""


@pytest.mark.parametrize("new_size", [8, 64])
def test_virtual_memory_resource_allocates_and_grows(
    run_client: Callable[..., str], new_size: int
) -> None:
    said = run_client(ALLOCATE_AND_GROW.replace("{new_size}", str(new_size)), "expect=leak")
    assert "done" in said
    violations = [line for line in said.splitlines() if "VIOLATION" in line]
    assert violations
    assert all("(expected): leak:" in line for line in violations)


# cuda-core keeps the primary context for as long as the process lives.
KEPT = "expect=leak: 1 retained primary contexts"
CACHE = """
import ctypes

import kvspan
import torch
from cuda.core import Device, StreamOptions
from cuda.core.utils import StridedMemoryView

device = Device(0)
device.set_current()
pool = kvspan.Pool("cuda:0", capacity="64MiB", background=False)
cache = kvspan.KVCache(pool, 2, 2, 64, torch.bfloat16, max_seqs=3, max_seq_len=4096)
"""
READ_BACK = """
stream = device.create_stream()
sequence = cache.sequence()
sequence.extend(100)
for layer in range(2):
    for plane in range(2):
        ours = cache.view(layer, plane)
        view = StridedMemoryView.from_dlpack(ours, stream_ptr=int(stream.handle))
        assert view.ptr == ours.address
        assert (view.device_id, view.is_device_accessible, view.readonly) == (0, True, False)
        assert view.shape == (3, 4096, 2, 64)
        assert view.strides[1:] == (2 * 2 * 2 * 64, 64, 1)  # both layers' planes side by side
        at = view.ptr + 2 * view.strides[0] * sequence.slot
        sent = bytes([layer * 2 + plane]) * 256  # K or V of the first token
        driver = ctypes.CDLL("libcuda.so.1")
        assert driver.cuMemcpyHtoD_v2(ctypes.c_ulonglong(at), sent, 256) == 0
received = ctypes.create_string_buffer(1024)
first = cache.view(0, 0).address + 2 * view.strides[0] * sequence.slot
assert driver.cuMemcpyDtoH_v2(received, ctypes.c_ulonglong(first), 1024) == 0
assert received.raw == b"".join(bytes([i]) * 256 for i in range(4))
del view, ours
sequence.release()
stream.close()
cache.close()
pool.close()
print("done")
"""
STREAMS = """
stream = device.create_stream(options=StreamOptions(nonblocking=True))
sequence = cache.sequence(stream=stream)
sequence.extend(3000, stream=stream)
child = sequence.fork(stream=stream)
sequence.release(stream=stream)
child.truncate(10, stream=stream)
stream.sync()
child.release(stream=stream)
try:
    cache.sequence(stream="fast")
except kvspan.InvalidArgument as error:
    assert "stream" in str(error)
else:
    raise AssertionError("a string is no stream")
stream.close()
cache.close()
pool.close()
print("done")
"""


@pytest.mark.parametrize("program", [READ_BACK, STREAMS], ids=["tensors", "streams"])
def test_cuda_core_and_our_cache(run_client: Callable[..., str], program: str) -> None:
    assert "done" in run_client(CACHE + program, KEPT)
