"""What this machine offers to kvspan, and what is in the way: the work behind ``kvspan doctor``.

Nothing is concluded from settings that can be tried: the host backend is run end to end in a small
pool, and huge pages are asked for, since the kernel's switches do not tell whether it gives them.
"""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import torch

import kvspan
from kvspan._gpu import Gpu, look_for_gpu
from kvspan._gpu_trial import format_trial, try_gpu
from kvspan._machine import Limits, read_limits, read_thp

__all__ = ["examine", "format_report", "format_trial", "format_versions", "try_gpu"]

TRIAL_PAGES = 4
HUGE_PAGE = 2 << 20


@dataclasses.dataclass(frozen=True)
class HostBackend:
    """The outcome of a trial: tokens written and read back through a cache of the host's memory.

    Attributes
    ----------
    works : bool
        Whether the bytes came back.
    error : str
        Why not; empty if it works.
    page_sizes : tuple of int
        Smallest, default and largest page, in bytes.
    huge_bytes, tried_bytes : int
        How much of the trial's memory came as huge pages, and of how much.
    huge_refusal : str
        The kernel's reason for giving fewer; empty if all are huge.
    """

    works: bool
    error: str = ""
    page_sizes: tuple[int, int, int] = (64 << 10, HUGE_PAGE, 64 << 20)
    huge_bytes: int = 0
    tried_bytes: int = 0
    huge_refusal: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """All of it.

    Attributes
    ----------
    versions : dict of str to str
        kvspan, Python, torch, kernel, architecture.
    host : HostBackend
        The trial of the host backend.
    limits : Limits
        What bounds it.
    transparent_hugepage : dict of str to str
        The kernel's switches.
    gpu : Gpu
        The CUDA device, or why there is none.
    advice : tuple of str
        What could be changed, one sentence each.
    """

    versions: dict[str, str]
    host: HostBackend
    limits: Limits
    transparent_hugepage: dict[str, str]
    gpu: Gpu
    advice: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Convert to what `json` can write."""
        return dataclasses.asdict(self)


def examine() -> Report:
    """Look at the machine and try its backends.

    Returns
    -------
    Report
        What was found. Nothing is raised: what fails is part of the report.
    """
    host = try_host()
    limits = read_limits()
    return Report(
        versions=_versions(),
        host=host,
        limits=limits,
        transparent_hugepage=read_thp(),
        gpu=try_cuda(),
        advice=tuple(_advice(host, limits)),
    )


def _versions() -> dict[str, str]:
    return {
        "kvspan": kvspan.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release(),
        "arch": platform.machine(),
    }


def format_versions() -> str:
    """Return the line that every report begins with."""
    v = _versions()
    return (
        f"kvspan {v['kvspan']}, Python {v['python']}, torch {v['torch']}, "
        f"Linux {v['kernel']} {v['arch']}"
    )


def try_host() -> HostBackend:
    """Write tokens into a small cache of host memory, read them back, and count the huge pages.

    Returns
    -------
    HostBackend
        What came of it.
    """
    capacity = TRIAL_PAGES * HUGE_PAGE
    try:
        with kvspan.Pool(device="cpu", capacity=capacity, preallocate=capacity) as pool:
            stats = pool.stats()
            with kvspan.KVCache(
                pool,
                n_layers=1,
                n_kv_heads=1,
                head_dim=64,
                dtype=torch.float32,
                max_seqs=1,
                max_seq_len=1024,
            ) as cache:
                _round_trip(cache)
    except (kvspan.Error, OSError) as error:
        return HostBackend(works=False, error=str(error))
    return HostBackend(
        works=True,
        huge_bytes=stats.huge_bytes,
        tried_bytes=capacity,
        huge_refusal=stats.huge_refusal,
    )


def _round_trip(cache: kvspan.KVCache) -> None:
    with cache.sequence() as sequence:
        sequence.extend(100)
        for tensor in sequence.layer(0):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
        for tensor in sequence.layer(0):
            if not torch.equal(tensor.flatten(), torch.arange(tensor.numel()).to(tensor.dtype)):
                raise OSError("the bytes read back are not those that were written")


def try_cuda() -> Gpu:
    """Look for a CUDA device, and create a small pool on the first.

    Returns
    -------
    Gpu
        Usable only if the pool could be created.
    """
    gpu = look_for_gpu()
    if gpu.usable:
        try:
            kvspan.Pool(device="cuda:0", capacity=TRIAL_PAGES * HUGE_PAGE).close()
        except (kvspan.Error, OSError) as error:
            return dataclasses.replace(gpu, usable=False, why_not=str(error))
    return gpu


def _advice(host: HostBackend, limits: Limits) -> list[str]:
    advice = []
    if host.works and host.huge_bytes < host.tried_bytes:
        advice.append(
            "Pages are backed by 4 KiB entries: unmapping and streaming reads are slower. Linux 6.1"
            " or newer collapses them into huge pages."
        )
    if limits.max_map_count is not None and limits.max_map_count < 65530:
        advice.append(
            f"vm.max_map_count is {limits.max_map_count}: large pools run out of mappings."
            " sysctl -w vm.max_map_count=1048576 raises it."
        )
    if limits.address_space is not None:
        advice.append(
            "RLIMIT_AS limits the address space, which reservations use up without using memory."
            " ulimit -v unlimited lifts it."
        )
    if limits.file_size is not None:
        advice.append(
            "RLIMIT_FSIZE limits the memfd that frames lie in. ulimit -f unlimited lifts it."
        )
    return advice


def format_report(report: Report) -> str:
    """Render a report for a person.

    Parameters
    ----------
    report : Report
        What `examine` found.

    Returns
    -------
    str
        Lines of text.
    """
    host, limits, gpu = report.host, report.limits, report.gpu
    smallest, default, largest = map(_size, host.page_sizes)
    lines = [
        format_versions(),
        "",
        f"host backend     {'works' if host.works else 'DOES NOT WORK: ' + host.error}",
        f"  page sizes     {smallest} to {largest}, {default} by default",
    ]
    if host.works:
        refusal = f": {host.huge_refusal}" if host.huge_refusal else ""
        lines.append(
            f"  huge pages     {_size(host.huge_bytes)} of {_size(host.tried_bytes)} tried{refusal}"
        )
    lines.append(
        f"  hugetlb        {_size(limits.hugetlb)} set aside in pages of 2 MiB, "
        f"{_size(limits.hugetlb_free)} free"
    )
    switches = ", ".join(f"{name} {value}" for name, value in report.transparent_hugepage.items())
    lines += [
        f"  kernel's THP   {switches or 'not there'}",
        f"memory           {_size(limits.memory_total)}, of it available "
        f"{_size(limits.memory_available)}",
        f"  cgroup limit   {_limit(limits.cgroup_limit)}",
        f"  NUMA nodes     {limits.numa_nodes or 'not there'}",
        "limits",
        f"  vm.max_map_count  {limits.max_map_count or 'unknown'}",
        f"  RLIMIT_AS         {_limit(limits.address_space)}",
        f"  RLIMIT_FSIZE      {_limit(limits.file_size)}",
        f"  RLIMIT_MEMLOCK    {_limit(limits.locked_memory)}",
        f"GPU              {'usable' if gpu.usable else 'none usable: ' + gpu.why_not}",
    ]
    if gpu.driver:
        lines.append(f"  driver         CUDA {gpu.driver}")
    lines += [f"  device {i}       {name}" for i, name in enumerate(gpu.devices)]
    lines.append(f"  torch's CUDA   {gpu.torch_cuda or 'none'}")
    if report.advice:
        lines += ["", *(f"note: {sentence}" for sentence in report.advice)]
    return "\n".join(lines)


def _size(n_bytes: int) -> str:
    value, unit = float(n_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def _limit(n_bytes: int | None) -> str:
    return "none" if n_bytes is None else _size(n_bytes)
