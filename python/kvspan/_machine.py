"""What bounds memory and mappings here, read from /proc, /sys and the resource limits."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Limits:
    """What bounds memory and mappings, in bytes or mappings; None where there is no limit.

    Attributes
    ----------
    max_map_count : int or None
        ``vm.max_map_count``: mappings that a process may have.
    address_space, file_size, locked_memory : int or None
        Soft limits RLIMIT_AS, RLIMIT_FSIZE (of the memfd that frames lie in), RLIMIT_MEMLOCK.
    memory_total, memory_available : int
        Of the machine.
    cgroup_limit : int or None
        The tightest memory limit among this process's cgroups.
    hugetlb, hugetlb_free : int
        Huge pages of 2 MiB that the administrator has set aside, and those that nobody has taken.
    numa_nodes : str
        The nodes that have memory, as the kernel writes lists: ``"0-1"``; empty without NUMA.
    """

    max_map_count: int | None
    address_space: int | None
    file_size: int | None
    locked_memory: int | None
    memory_total: int
    memory_available: int
    cgroup_limit: int | None
    hugetlb: int
    hugetlb_free: int
    numa_nodes: str


def read_limits() -> Limits:
    """Read the limits of this process and machine.

    Returns
    -------
    Limits
        In bytes; None stands for no limit.
    """
    memory = _meminfo()
    count = _read("/proc/sys/vm/max_map_count")
    return Limits(
        max_map_count=int(count) if count else None,
        address_space=_rlimit(resource.RLIMIT_AS),
        file_size=_rlimit(resource.RLIMIT_FSIZE),
        locked_memory=_rlimit(resource.RLIMIT_MEMLOCK),
        memory_total=memory.get("MemTotal", 0),
        memory_available=memory.get("MemAvailable", 0),
        cgroup_limit=_cgroup_limit(),
        hugetlb=_hugetlb("nr_hugepages"),
        hugetlb_free=_hugetlb("free_hugepages"),
        numa_nodes=_read("/sys/devices/system/node/has_memory"),
    )


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _rlimit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _hugetlb(name: str) -> int:
    return int(_read(f"/sys/kernel/mm/hugepages/hugepages-2048kB/{name}") or 0) << 21


def _meminfo() -> dict[str, int]:
    found = {}
    for line in _read("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[key] = int(value.split()[0]) * 1024
    return found


def _cgroup_limit() -> int | None:
    """Find the tightest of the memory limits from our cgroup up to the root that we can see."""
    tightest = None
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        folder = mount / path.lstrip("/")
        for place in (folder, *folder.parents):
            text = _read(place / name)
            # Version 1 writes "no limit" as a number close to 2^63.
            if text.isdigit() and int(text) < 1 << 60:
                tightest = min(tightest or int(text), int(text))
            if place == mount:
                break
    return tightest


def read_thp() -> dict[str, str]:
    """Read the kernel's switches for transparent huge pages.

    Returns
    -------
    dict of str to str
        ``enabled``, ``shmem_enabled`` and ``defrag``, as far as the kernel has them.
    """
    found = {}
    for name in ("enabled", "shmem_enabled", "defrag"):
        text = _read(f"/sys/kernel/mm/transparent_hugepage/{name}")
        if text:
            found[name] = text[text.find("[") + 1 : text.find("]")] if "[" in text else text
    return found
