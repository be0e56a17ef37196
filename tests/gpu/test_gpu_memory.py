"""Device memory: other libraries' tensors over it, the end of it, and what lies beyond a length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvspan

DEVICE = "cuda:0"
ROOT = Path(__file__).resolve().parents[2]


def test_torch_opens_a_view_of_the_same_bytes(cache: kvspan.KVCache) -> None:
    sequence = cache.sequence()
    sequence.extend(300)
    mine, other = cache.layer(0)[1], torch.from_dlpack(cache.view(0, 1))
    assert other.device == torch.device(DEVICE)
    assert other.data_ptr() == mine.data_ptr()
    mine[sequence.slot, :300] = 4
    assert (other[sequence.slot, :300] == 4).all()


def test_a_tensor_keeps_the_memory(pool: kvspan.Pool) -> None:
    cache = kvspan.KVCache(pool, 1, 8, 128, torch.float16, max_seqs=2, max_seq_len=4096)
    sequence = cache.sequence()
    sequence.extend(1000)
    k, _ = sequence.layer(0)
    k.fill_(3)
    cache.close()
    pool.close()
    del cache, sequence
    assert (k == 3).all()


def test_cupy_reads_and_writes(cache: kvspan.KVCache) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    sequence = cache.sequence()
    sequence.extend(300)
    k, _ = sequence.layer(0)
    k.fill_(2)
    torch.cuda.synchronize()
    array = cupy.from_dlpack(cache.view(0, 0))
    assert array.data.ptr == cache.layer(0)[0].data_ptr()
    assert bool((array[sequence.slot, :300] == 2).all())
    array[sequence.slot, 299] = 5
    cupy.cuda.Device().synchronize()
    assert (k[299] == 5).all()


def test_a_full_device_is_an_answer() -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    left = 1 << 30
    if free < 3 * left:
        pytest.skip(f"only {free} bytes of the device are free")
    hog = torch.empty(free - left, dtype=torch.uint8, device=DEVICE)
    pool = kvspan.Pool(DEVICE, capacity="2GiB", reserve="64MiB", background=False)
    cache = kvspan.KVCache(pool, 1, 8, 128, torch.float16, max_seqs=8, max_seq_len=1 << 19)
    sequence = cache.sequence()
    sequence.extend(1000)
    for plane in sequence.layer(0):
        plane.fill_(6)
    before = cache.stats().mapped_bytes
    with pytest.raises(kvspan.OutOfMemory) as caught:
        sequence.extend(400_000)  # 1.5 GiB
    assert caught.value.free < caught.value.requested
    assert len(sequence) == 1000
    assert cache.stats().mapped_bytes <= before  # it tried to live on what was kept
    assert all((plane == 6).all() for plane in sequence.layer(0))
    del hog
    torch.cuda.empty_cache()
    sequence.extend(400_000)
    assert (sequence.layer(0)[0][:1000] == 6).all()


ACCESS = """
import torch, kvspan
pool = kvspan.Pool("cuda:0", capacity="64MiB")
cache = kvspan.KVCache(pool, 1, 8, 128, torch.float16, max_seqs=2, max_seq_len=16384)
sequence = cache.sequence()
sequence.extend(5)
k = cache.layer(0)[0]
print(k[{where}].float().sum().item())
"""


@pytest.mark.parametrize(
    ("where", "traps"),
    [
        ("0, :133", False),  # FlashAttention's largest tile
        ("0, 8192", True),
        ("1, 0", True),
    ],
)
def test_what_lies_beyond_a_length(where: str, traps: bool) -> None:
    """In a process of its own, whose context a trap ends."""
    done = subprocess.run(
        [sys.executable, "-c", ACCESS.format(where=where)], capture_output=True, text=True
    )
    assert (done.returncode != 0) == traps, done.stderr
    assert ("illegal memory access" in done.stderr) == traps, done.stderr


def test_the_backends_contract_holds() -> None:
    """Among others: two processes share a frame."""
    built = ROOT / "build" / "cpp" / "tests" / "cpp" / "kvspan_test_gpu"
    program = Path(os.environ.get("KVSPAN_TEST_GPU", built))
    if not program.exists():
        pytest.skip(f"{program} is not built: make test-cpp, or name it with KVSPAN_TEST_GPU")
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT A GPU RESULT" not in done.stdout
