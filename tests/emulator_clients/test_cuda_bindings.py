"""NVIDIA's cuda-bindings: the life of a mapping, and every wrong use that a driver refuses."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Emulator
from cuda.bindings import driver as cu

PAGE = 2 << 20
Result = cu.CUresult


def ok(answer: tuple[Any, ...]) -> Any:
    """Return what a call gave beside CUDA_SUCCESS."""
    result, *values = answer
    assert result == Result.CUDA_SUCCESS, result
    return values[0] if len(values) == 1 else values


class Device:
    """A device's primary context, current, and what its virtual memory calls want."""

    def __init__(self, ordinal: int = 0) -> None:
        ok(cu.cuInit(0))
        self.ordinal = ordinal
        self.device = ok(cu.cuDeviceGet(ordinal))
        self.context = ok(cu.cuDevicePrimaryCtxRetain(self.device))
        ok(cu.cuCtxPushCurrent(self.context))
        self.properties = cu.CUmemAllocationProp()
        self.properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.properties.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.properties.location.id = ordinal

    def close(self) -> None:
        ok(cu.cuCtxPopCurrent())
        ok(cu.cuDevicePrimaryCtxRelease(self.device))

    def grant(self, at: int, size: int, flags: Any = None) -> Any:
        access = cu.CUmemAccessDesc()
        access.location = self.properties.location
        read_write = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        access.flags = read_write if flags is None else flags
        return cu.cuMemSetAccess(at, size, [access], 1)[0]

    def reserve(self, size: int, alignment: int = 0) -> int:
        return int(ok(cu.cuMemAddressReserve(size, alignment, 0, 0)))

    def create(self, size: int) -> Any:
        return ok(cu.cuMemCreate(size, self.properties, 0))


@pytest.fixture
def device(emulator: Emulator) -> Iterator[Device]:
    """Device 0."""
    made = Device()
    yield made
    made.close()


class Mapped:
    """Two pages, mapped side by side and granted."""

    def __init__(self, device: Device) -> None:
        self.at = device.reserve(4 * PAGE)
        self.handles = [device.create(PAGE) for _ in range(2)]
        for i, handle in enumerate(self.handles):
            ok(cu.cuMemMap(self.at + i * PAGE, PAGE, 0, handle, 0))
        assert device.grant(self.at, 2 * PAGE) == Result.CUDA_SUCCESS

    def close(self) -> None:
        ok(cu.cuMemUnmap(self.at, 2 * PAGE))
        for handle in self.handles:
            ok(cu.cuMemRelease(handle))
        ok(cu.cuMemAddressFree(self.at, 4 * PAGE))


@pytest.fixture
def mapped(device: Device) -> Iterator[Mapped]:
    """Gone at the end."""
    made = Mapped(device)
    yield made
    made.close()


def test_the_whole_life_of_a_mapping(device: Device) -> None:
    minimum = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    assert ok(cu.cuMemGetAllocationGranularity(device.properties, minimum)) == PAGE
    free, total = ok(cu.cuMemGetInfo())
    at = device.reserve(8 * PAGE, alignment=4 * PAGE)
    assert at % (4 * PAGE) == 0
    handle = device.create(2 * PAGE)
    assert ok(cu.cuMemGetInfo()) == [free - 2 * PAGE, total]
    ok(cu.cuMemMap(at, 2 * PAGE, 0, handle, 0))
    assert device.grant(at, 2 * PAGE) == Result.CUDA_SUCCESS
    location = device.properties.location
    assert ok(cu.cuMemGetAccess(location, at)) == 3  # read and write

    stream = ok(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))
    event = ok(cu.cuEventCreate(cu.CUevent_flags.CU_EVENT_DISABLE_TIMING))
    sent = bytes(range(256)) * 16
    ok(cu.cuMemcpyHtoD(at + PAGE - 1024, sent, len(sent)))  # across what was one page
    ok(cu.cuMemsetD8Async(at + PAGE, 7, 16, stream))
    ok(cu.cuMemcpyDtoDAsync(at, at + PAGE - 1024, len(sent), stream))
    ok(cu.cuEventRecord(event, stream))
    ok(cu.cuEventSynchronize(event))
    assert cu.cuEventQuery(event) == (Result.CUDA_SUCCESS,)
    received = bytearray(len(sent))
    ok(cu.cuMemcpyDtoH(received, at, len(sent)))
    assert received == sent[:1024] + bytes([7]) * 16 + sent[1040:]

    # The memory goes with the last of the handle and the mapping.
    ok(cu.cuMemRelease(handle))
    assert ok(cu.cuMemGetInfo())[0] == free - 2 * PAGE
    ok(cu.cuMemUnmap(at, 2 * PAGE))
    assert ok(cu.cuMemGetInfo())[0] == free
    ok(cu.cuMemAddressFree(at, 8 * PAGE))
    ok(cu.cuEventDestroy(event))
    ok(cu.cuStreamDestroy(stream))


def test_a_handle_travels_as_a_file_descriptor(device: Device) -> None:
    kind = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    device.properties.requestedHandleTypes = kind
    handle = device.create(PAGE)
    fd = ok(cu.cuMemExportToShareableHandle(handle, kind, 0))
    imported = ok(cu.cuMemImportFromShareableHandle(fd, kind))
    os.close(fd)
    at = device.reserve(2 * PAGE)
    for i, one in enumerate((handle, imported)):
        ok(cu.cuMemMap(at + i * PAGE, PAGE, 0, one, 0))
    assert device.grant(at, 2 * PAGE) == Result.CUDA_SUCCESS
    ok(cu.cuMemcpyHtoD(at + 5, b"shared", 6))
    received = bytearray(6)
    ok(cu.cuMemcpyDtoH(received, at + PAGE + 5, 6))
    assert received == b"shared"
    ok(cu.cuMemUnmap(at, 2 * PAGE))
    ok(cu.cuMemRelease(handle))
    ok(cu.cuMemRelease(imported))
    ok(cu.cuMemAddressFree(at, 2 * PAGE))


def test_wrong_arguments_get_the_documented_error(device: Device, mapped: Mapped) -> None:
    invalid = Result.CUDA_ERROR_INVALID_VALUE
    at, handle = mapped.at, mapped.handles[0]
    assert cu.cuMemCreate(PAGE + 4096, device.properties, 0)[0] == invalid  # granularity
    assert cu.cuMemAddressReserve(PAGE, 3 * 4096, 0, 0)[0] == invalid  # alignment: no power of two
    assert cu.cuMemMap(at + 2 * PAGE, PAGE, 4096, handle, 0)[0] == invalid  # offset
    assert cu.cuMemMap(at + 2 * PAGE + 4096, PAGE, 0, handle, 0)[0] == invalid  # address
    assert cu.cuMemMap(at, PAGE, 0, handle, 0)[0] == invalid  # over a mapping
    assert cu.cuMemMap(at + 4 * PAGE, PAGE, 0, handle, 0)[0] == invalid  # outside
    assert cu.cuMemMap(at + 2 * PAGE, 2 * PAGE, 0, handle, 0)[0] == invalid  # more than it has
    assert device.grant(at, 3 * PAGE) == invalid  # a gap
    assert cu.cuMemUnmap(at, PAGE // 2)[0] == invalid  # a part
    assert cu.cuMemUnmap(at + 2 * PAGE, PAGE)[0] == invalid  # nothing there
    assert cu.cuMemAddressFree(at, PAGE)[0] == invalid  # not what was reserved


def test_a_part_of_a_large_mapping_cannot_go(device: Device) -> None:
    at = device.reserve(2 * PAGE)
    handle = device.create(2 * PAGE)
    ok(cu.cuMemMap(at, 2 * PAGE, 0, handle, 0))
    for call in (lambda: cu.cuMemUnmap(at, PAGE)[0], lambda: device.grant(at + PAGE, PAGE)):
        assert call() == Result.CUDA_ERROR_INVALID_VALUE
    ok(cu.cuMemUnmap(at, 2 * PAGE))
    ok(cu.cuMemRelease(handle))
    ok(cu.cuMemAddressFree(at, 2 * PAGE))


def test_device_memory_is_limited(emulator: Emulator) -> None:
    emulator.reset("memory=8MiB")
    device = Device()
    handles = [device.create(PAGE) for _ in range(4)]
    assert cu.cuMemCreate(PAGE, device.properties, 0)[0] == Result.CUDA_ERROR_OUT_OF_MEMORY
    for handle in handles:
        ok(cu.cuMemRelease(handle))
    device.close()


def test_without_a_context_or_cuinit(emulator: Emulator) -> None:
    assert cu.cuDeviceGetCount()[0] == Result.CUDA_ERROR_NOT_INITIALIZED
    ok(cu.cuInit(0))
    assert cu.cuStreamCreate(0)[0] == Result.CUDA_ERROR_INVALID_CONTEXT
    assert cu.cuMemGetInfo()[0] == Result.CUDA_ERROR_INVALID_CONTEXT


# What the documentation leaves undefined: `text` is what the emulator says of it.
def released_twice(device: Device, mapped: Mapped) -> None:
    handle = device.create(PAGE)
    ok(cu.cuMemRelease(handle))
    cu.cuMemRelease(handle)


def used_after_release(device: Device, mapped: Mapped) -> None:
    handle = device.create(PAGE)
    ok(cu.cuMemRelease(handle))
    cu.cuMemMap(mapped.at + 2 * PAGE, PAGE, 0, handle, 0)


def freed_with_mappings(device: Device, mapped: Mapped) -> None:
    cu.cuMemAddressFree(mapped.at, 4 * PAGE)


def written_without_access(device: Device, mapped: Mapped) -> None:
    handle = device.create(PAGE)
    ok(cu.cuMemMap(mapped.at + 2 * PAGE, PAGE, 0, handle, 0))
    cu.cuMemsetD8(mapped.at + 2 * PAGE, 1, 8)
    ok(cu.cuMemUnmap(mapped.at + 2 * PAGE, PAGE))
    ok(cu.cuMemRelease(handle))


def written_read_only(device: Device, mapped: Mapped) -> None:
    read = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    assert device.grant(mapped.at, PAGE, read) == Result.CUDA_SUCCESS
    cu.cuMemsetD8(mapped.at, 1, 8)


def read_past_the_end(device: Device, mapped: Mapped) -> None:
    cu.cuMemcpyDtoH(bytearray(16), mapped.at + 2 * PAGE - 8, 16)


def stream_destroyed_twice(device: Device, mapped: Mapped) -> None:
    stream = ok(cu.cuStreamCreate(0))
    ok(cu.cuStreamDestroy(stream))
    cu.cuStreamDestroy(stream)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (released_twice, "cuMemRelease"),
        (used_after_release, "cuMemMap"),
        (freed_with_mappings, "live mapping"),
        (written_without_access, "access"),
        (written_read_only, "is read-only"),
        (read_past_the_end, "mapped"),
        (stream_destroyed_twice, "cuStreamDestroy"),
    ],
)
def test_what_is_undefined_is_a_violation(
    emulator: Emulator, device: Device, mapped: Mapped, wrong: Any, text: str
) -> None:
    wrong(device, mapped)
    seen = emulator.violations()
    assert any(text in violation for violation in seen), seen


def test_unmapping_under_an_unfinished_kernel(
    emulator: Emulator, device: Device, mapped: Mapped
) -> None:
    stream = ok(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))
    emulator.hold(True)
    emulator.read_kernel(int(stream), mapped.at, PAGE)
    handle = device.create(PAGE)
    ok(cu.cuMemUnmap(mapped.at, PAGE))
    assert any("unfinished" in violation for violation in emulator.violations())
    emulator.hold(False)
    cu.cuStreamSynchronize(stream)  # the kernel has read what was no longer there
    emulator.violations()
    ok(cu.cuMemMap(mapped.at, PAGE, 0, mapped.handles[0], 0))
    ok(cu.cuMemRelease(handle))
    ok(cu.cuStreamDestroy(stream))


def test_memory_of_another_device_needs_its_own_grant(emulator: Emulator, device: Device) -> None:
    other = Device(1)
    at = device.reserve(PAGE)
    handle = other.create(PAGE)
    ok(cu.cuMemMap(at, PAGE, 0, handle, 0))
    assert other.grant(at, PAGE) == Result.CUDA_SUCCESS
    ok(cu.cuMemsetD8(at, 1, PAGE))  # by device 1, whose context is current
    ok(cu.cuCtxPushCurrent(device.context))
    cu.cuMemsetD8(at, 1, PAGE)  # by device 0, which was granted nothing
    assert any("access" in violation for violation in emulator.violations())
    ok(cu.cuCtxPopCurrent())
    ok(cu.cuMemUnmap(at, PAGE))
    ok(cu.cuMemRelease(handle))
    ok(cu.cuMemAddressFree(at, PAGE))
    other.close()


def test_what_is_left_at_exit_is_a_leak(run_client: Any) -> None:
    program = """
from cuda.bindings import driver as cu
cu.cuInit(0)
cu.cuDevicePrimaryCtxRetain(cu.cuDeviceGet(0)[1])
cu.cuMemAddressReserve(2 << 20, 0, 0, 0)
"""
    said = run_client(program, "expect=leak")
    assert "leak: 1 address reservations left at exit" in said
    with pytest.raises(AssertionError, match="leak: 1 address reservations"):
        run_client(program, "")


def test_the_emulator_says_what_it_is(device: Device) -> None:
    name = ok(cu.cuDeviceGetName(64, device.device))
    assert b"kvspan emulator (no GPU)" in name
    assert ctypes.CDLL("libcuda.so.1").kvspan_emulator_reset is not None
