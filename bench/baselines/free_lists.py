"""Other engines' free lists of blocks: their own classes, taken out of their files.

Importing those would take the whole engines, and a GPU.

- vLLM's BlockPool with prefix caching disabled, and the FreeKVCacheBlockQueue in it alone, which
  counts no references; of the wheel that `vllm_paged` installs.
- kvcached's KVCacheManager with its PageAllocator and Page, pages of 64 blocks. 0.1.5 is the last
  release where all of it is Python; since then the lists of the pages are C++ that needs CUDA to
  build. Only the lists are run: what maps pages, asks CUDA for the free memory or locks the memory
  shared with other processes (the latter two at every `alloc`) does nothing here, and there are no
  locks and no second thread.
"""

from __future__ import annotations

import ast
import functools
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from baselines import vllm_paged

KVCACHED_VERSION = "0.1.5"
KVCACHED = vllm_paged.FOLDER.parent / f"kvcached-{KVCACHED_VERSION}"

# kvcached's setup.py asks torch for CUDA, even to be unpacked: pip gets it a torch that says yes.
_TORCH_FOR_SETUP = {
    "torch/__init__.py": "class _C: _GLIBCXX_USE_CXX11_ABI = True",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": """
from setuptools import Extension as CUDAExtension
from setuptools.command.build_ext import build_ext as BuildExtension
include_paths = library_paths = list
""",
}


class FreeList(Protocol):
    """Blocks with ids, taken and given back."""

    def take(self, n: int) -> Any: ...
    def give(self, blocks: Any) -> None: ...
    def ids(self, blocks: Any) -> list[int]: ...
    def pair(self, n: int) -> Callable[[], object]:
        """Return what takes `n` blocks and gives them back, with nothing around it."""


def install_kvcached() -> None:
    """Download kvcached's source and keep the files that `KvcachedBlocks` reads."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, text in _TORCH_FOR_SETUP.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-build-isolation", "--no-binary=kvcached", f"--dest={name}"]
        command += [f"kvcached=={KVCACHED_VERSION}"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": name})
        root = f"kvcached-{KVCACHED_VERSION}"
        KVCACHED.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{root}.tar.gz") as archive:
            for file in ("locks.py", "page_allocator.py", "kv_cache_manager.py"):
                member = archive.extractfile(f"{root}/kvcached/{file}")
                assert member is not None
                (KVCACHED / file).write_bytes(member.read())


class VllmBlocks:
    """vLLM's BlockPool."""

    def __init__(self, n_blocks: int) -> None:
        core = vllm_paged.FOLDER / "vllm" / "v1" / "core"
        names: dict[str, Any] = {"MEDIUM_GPU": "GPU"}
        _define(names, core / "kv_cache_utils.py", "KVCacheBlock", "FreeKVCacheBlockQueue")
        _define(names, core / "block_pool.py", "BlockHashToBlockMap", "BlockPool")
        # One more: it keeps the first for itself.
        self.pool = names["BlockPool"](n_blocks + 1, enable_caching=False, hash_block_size=16)

    def take(self, n: int) -> list[Any]:
        blocks: list[Any] = self.pool.get_new_blocks(n)
        return blocks

    def give(self, blocks: list[Any]) -> None:
        self.pool.free_blocks(reversed(blocks))

    def ids(self, blocks: list[Any]) -> list[int]:
        return [block.block_id - 1 for block in blocks]

    def pair(self, n: int) -> Callable[[], object]:
        pool = self.pool
        return lambda: pool.free_blocks(reversed(pool.get_new_blocks(n)))


class VllmQueue(VllmBlocks):
    """The queue in it, without reference counts."""

    def __init__(self, n_blocks: int) -> None:
        super().__init__(n_blocks)
        self.queue = self.pool.free_block_queue

    def take(self, n: int) -> list[Any]:
        blocks: list[Any] = self.queue.popleft_n(n)
        return blocks

    def give(self, blocks: list[Any]) -> None:
        self.queue.prepend_n(blocks)

    def pair(self, n: int) -> Callable[[], object]:
        queue = self.queue
        return lambda: queue.prepend_n(queue.popleft_n(n))


class KvcachedBlocks:
    """kvcached's KVCacheManager, over blocks of 16 tokens of 2 KiB: Llama-3-8B's."""

    def __init__(self, n_blocks: int) -> None:
        names: dict[str, Any] = {
            **{"defaultdict": defaultdict, "deque": deque, "functools": functools, "time": time},
            **{"threading": threading, "logger": logging.getLogger("kvcached")},
            # As utils.py has them, less the thread that maps ahead.
            **{"PAGE_SIZE": 2 << 20, "SANITY_CHECK": False, "CONTIGUOUS_LAYOUT": True},
            **{"GPU_UTILIZATION": 0.95, "MIN_RESERVED_PAGES": 5, "MAX_RESERVED_PAGES": 10},
            "PAGE_PREALLOC_ENABLED": False,
            "MemInfoTracker": _Tracker,
            "torch": SimpleNamespace(cuda=SimpleNamespace(mem_get_info=lambda: (1 << 40, 1 << 40))),
            "kv_tensors_created": lambda **_: True,
            **dict.fromkeys(("map_to_kv_tensors", "unmap_from_kv_tensors"), _nothing),
            "_should_use_worker_ipc": lambda: False,
        }
        locks = ("LockLike", "ConditionLike", "NoOpLock", "NoOpCondition")
        _define(names, KVCACHED / "locks.py", *locks)
        _define(names, KVCACHED / "page_allocator.py", "Page", "PageAllocator")
        _define(names, KVCACHED / "kv_cache_manager.py", "synchronized", "KVCacheManager")
        self.manager = names["KVCacheManager"](n_blocks, 16, cell_size=2048, num_layers=32)

    def take(self, n: int) -> list[int]:
        blocks: list[int] = self.manager.alloc(n)
        return blocks

    def give(self, blocks: list[int]) -> None:
        self.manager.free(blocks)

    def ids(self, blocks: list[int]) -> list[int]:
        return blocks

    def pair(self, n: int) -> Callable[[], object]:
        manager = self.manager
        return lambda: manager.free(manager.alloc(n))


def _define(names: dict[str, Any], path: Path, *wanted: str) -> None:
    """Run the definitions of these names in a file, and nothing else of it."""
    tree = ast.parse(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, field\n"
        "from typing import Any, Callable, Dict, List, Optional, Protocol, Tuple, cast"
    )
    theirs = ast.parse(path.read_text(encoding="utf-8")).body
    definitions = (ast.ClassDef, ast.FunctionDef)
    tree.body += [x for x in theirs if isinstance(x, definitions) and x.name in wanted]
    names["__name__"] = __name__
    exec(compile(tree, str(path), "exec"), names)


def _nothing(*_: object, **__: object) -> None: ...


class _Tracker:
    check_and_get_resize_target = update_memory_usage = staticmethod(_nothing)

    def __init__(self, _: int) -> None: ...
