"""How many threads the demo computes with.

More is not always faster: OpenMP's threads wait for each other by spinning, and on cores that other
programs use a step with all cores can take ten times as long as with one. So the number is tried,
not assumed.
"""

from __future__ import annotations

import os
import statistics
import time

import torch

from .model import Llama
from .stores import PreallocKV


def choose_threads(model: Llama, n_rows: int = 4, n_tokens: int = 32) -> int:
    """Set torch to the number of threads that decodes fastest here and now.

    Tries 1, 2, 4, ... and all cores of this process, a few steps each, over preallocated memory.

    Returns
    -------
    int
        The number, which is set.
    """
    n_cores = len(os.sched_getaffinity(0))
    candidates: list[int] = sorted({n_cores, *(2**i for i in range(n_cores.bit_length()))})
    store = PreallocKV(model.config, n_rows, n_tokens)
    rows = [store.admit(1) for _ in range(n_rows)]
    tokens = torch.zeros(n_rows, 1, dtype=torch.long)

    def step_s() -> float:
        began = time.perf_counter()
        model.forward(tokens, store.begin(rows, 1), store)
        return time.perf_counter() - began

    torch.set_num_threads(1)
    step_s()  # what is done once, such as the choice of kernels
    typical: dict[int, float] = {}
    for n in candidates:
        torch.set_num_threads(n)
        typical[n] = statistics.median(step_s() for _ in range(3))
    # A tie goes to more threads: prompts gain more from them than single steps.
    slack = 1.1 * min(typical.values())
    chosen = max(n for n in candidates if typical[n] <= slack)
    torch.set_num_threads(chosen)
    store.close()
    return chosen
