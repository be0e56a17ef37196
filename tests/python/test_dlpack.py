"""Tensors leave through DLPack: what a capsule says, who owns it, and that it is consumed once.

Capsules are read by ctypes as the DLPack ABI lays them out, so that no consumer's idea of it stands
between. They must be right in both ABIs: consumers that name version 1 or later get the versioned
one, the others the legacy one.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
import torch
from device import (
    DLPACK_DEVICE,
    IS_GPU,
    IS_HOST,
    PAGE,
    consume,
    holdings,
    name_of,
    only_on_the_host,
    pointer_of,
    tensor_of,
)

import kvspan

# dtype -> its code and bits in DLPack
DTYPES = {
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float8_e4m3fn: (10, 8),
    torch.float8_e5m2: (12, 8),
    torch.int8: (0, 8),
}
OF_NUMPY = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int8: np.int8,
}


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Legacy(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


KINDS = {b"dltensor": Legacy, b"dltensor_versioned": Versioned}


def read(capsule: object) -> Any:
    name = name_of(capsule)
    return KINDS[name].from_address(pointer_of(capsule, name))


def make_cache(dtype: torch.dtype, **options: Any) -> kvspan.KVCache:
    pool = kvspan.Pool(capacity=32 * PAGE, page_size=PAGE)
    return kvspan.KVCache(pool, 2, 3, 32, dtype, max_seqs=4, max_seq_len=400, **options)


@pytest.mark.parametrize(
    ("max_version", "kind"),
    [
        (None, Legacy),
        ((0, 8), Legacy),
        ((1, 0), Versioned),
        ((1, 1), Versioned),
        ((2, 0), Versioned),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_capsule_says_what_the_plane_is(
    dtype: torch.dtype, max_version: tuple[int, int] | None, kind: type
) -> None:
    cache = make_cache(dtype, layers_per_page=2)
    view = cache.view(1, 1)
    plane = cache.layer(1)[1]
    capsule = view.__dlpack__(max_version=max_version)
    managed = read(capsule)
    assert type(managed) is kind
    if kind is Versioned:
        assert (managed.major, managed.minor) <= max_version or managed.major == 1
        assert managed.flags == 0  # not read-only, not a copy
    tensor = managed.tensor
    assert (tensor.device_type, tensor.device_id) == view.__dlpack_device__() == DLPACK_DEVICE
    assert (tensor.code, tensor.bits, tensor.lanes) == (*DTYPES[dtype], 1)
    assert tensor.ndim == 4
    assert tuple(tensor.shape[:4]) == tuple(plane.shape) == (4, 400, 3, 32)
    assert tuple(tensor.strides[:4]) == plane.stride()
    assert plane.stride(1) >= 2 * 2 * 3 * 32  # two layers' K and V side by side
    assert tensor.data + tensor.byte_offset == plane.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_the_same_through_torch(dtype: torch.dtype) -> None:
    cache = make_cache(dtype)
    sequence = cache.sequence()
    sequence.extend(200)
    mine, other = cache.layer(0)[1], tensor_of(cache.view(0, 1))
    assert mine.dtype == other.dtype == dtype
    values = torch.randn(200, 3, 32).mul(8).to(dtype)
    mine[sequence.slot, :200] = values
    assert torch.equal(
        other[sequence.slot, :200].contiguous().view(torch.uint8), values.view(torch.uint8)
    )


@only_on_the_host("NumPy has arrays of host memory alone")
@pytest.mark.parametrize("dtype", OF_NUMPY)
def test_numpy_opens_what_it_has(dtype: torch.dtype) -> None:
    cache = make_cache(dtype)
    sequence = cache.sequence()
    sequence.extend(200)
    array = np.from_dlpack(cache.view(0, 0))
    assert array.dtype == OF_NUMPY[dtype]
    assert array.ctypes.data == cache.layer(0)[0].data_ptr()
    cache.layer(0)[0][sequence.slot, 199] = 7
    assert (array[sequence.slot, 199] == 7).all()
    if (
        array.flags.writeable
    ):  # an older NumPy, which asks for the legacy capsule, makes it read-only
        array[sequence.slot, 0] = 5
        assert (cache.layer(0)[0][sequence.slot, 0] == 5).all()


@pytest.mark.parametrize("max_version", [None, (1, 1)])
def test_capsule_is_consumed_once(max_version: tuple[int, int] | None) -> None:
    capsule = make_cache(torch.float32).view(0, 0).__dlpack__(max_version=max_version)
    assert name_of(capsule) in KINDS
    first = consume(capsule)
    assert name_of(capsule).startswith(b"used_dltensor")
    with pytest.raises(RuntimeError):
        consume(capsule)
    del capsule
    assert first.shape == (4, 400, 3, 32)
    if IS_HOST:
        assert not first[0, 399].any()


@pytest.mark.parametrize("max_version", [None, (1, 1)])
def test_capsule_that_nobody_consumes_is_freed(max_version: tuple[int, int] | None) -> None:
    cache = make_cache(torch.float32)
    cache.sequence().extend(60)
    capsule = cache.view(0, 0).__dlpack__(max_version=max_version)
    del cache
    assert IS_GPU or holdings().n_mappings > 0
    del capsule  # conftest.py looks whether that was all


@pytest.mark.parametrize("max_version", [None, (1, 1)])
def test_capsule_outlives_everything(max_version: tuple[int, int] | None) -> None:
    cache = make_cache(torch.float32)
    sequence = cache.sequence()
    sequence.extend(60)
    slot = sequence.slot
    cache.layer(0)[0][slot, :60] = 7
    capsule = cache.view(0, 0).__dlpack__(max_version=max_version)
    # Closing keeps what is mapped; releasing would let the pages go.
    cache.pool.close()
    cache.close()
    del cache, sequence
    plane = consume(capsule)
    assert (plane[slot, :60] == 7).all()
    plane[slot, :60] = 9
    assert (plane[slot, :60] == 9).all()


@pytest.mark.parametrize("max_version", [None, (1, 1)])
def test_deleter_needs_no_gil(max_version: tuple[int, int] | None) -> None:
    """A consumer may call it from any thread, also when Python is not running there."""
    cache = make_cache(torch.float32)
    cache.sequence().extend(60)
    capsule = cache.view(0, 0).__dlpack__(max_version=max_version)
    name = name_of(capsule)
    managed = read(capsule)
    address = ctypes.c_void_p(ctypes.addressof(managed))
    rename = ctypes.pythonapi.PyCapsule_SetName
    rename.argtypes = (ctypes.py_object, ctypes.c_char_p)
    used = b"used_" + name  # kept alive: a capsule does not copy its name
    assert rename(capsule, used) == 0
    del cache
    assert IS_GPU or holdings().n_mappings > 0
    # A CDLL call drops the GIL, and this one runs on a thread of its own.
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(managed.deleter)
    thread = threading.Thread(target=deleter, args=(address,))
    thread.start()
    thread.join()
    del capsule


def test_arrays_of_a_batch_outlive_it() -> None:
    cache = make_cache(torch.float32)
    batch = cache.batch(3)
    before, lengths, slots = batch.step(), batch.lengths, batch.slots
    assert (lengths.data_ptr(), slots.data_ptr()) == (
        batch.lengths.data_ptr(),
        batch.slots.data_ptr(),
    )
    batch.step(5)
    cache.close()
    del batch, cache
    assert all(array.dtype == torch.int32 for array in (before, lengths, slots))
    assert [array.tolist() for array in (before, lengths, slots)] == [[1] * 3, [6] * 3, [0, 1, 2]]
