"""Where a benchmark ran: machine and versions. A figure without them says nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Processor, caches, memory, kernel and the settings that decide about pages."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "arch": platform.machine(),
        "transparent_hugepage": {
            name: _chosen(_read(f"/sys/kernel/mm/transparent_hugepage/{name}"))
            for name in ("enabled", "shmem_enabled", "defrag")
        },
        "nr_hugepages": _read("/proc/sys/vm/nr_hugepages"),
        "max_map_count": _read("/proc/sys/vm/max_map_count"),
        "gpu": _gpu(),
    }


def versions() -> dict[str, str | None]:
    """Python, packages, compiler and the commit of the working tree."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("kvspan", "torch", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    compiler = os.environ.get("CXX") or shutil.which("c++")
    found["compiler"] = _first_line([compiler, "--version"]) if compiler else None
    commit = _first_line(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if commit and _first_line(["git", "-C", str(ROOT), "status", "--porcelain"]):
        commit += "-dirty"
    found["commit"] = commit
    return found


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _chosen(setting: str | None) -> str | None:
    """Pick the word in brackets: `always [madvise] never` says `madvise`."""
    if setting is None or "[" not in setting:
        return setting
    return setting[setting.index("[") + 1 : setting.index("]")]


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(index / name)) for name in ("level", "type", "size"))
        if level and kind and size:
            found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def _gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _first_line(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else None
