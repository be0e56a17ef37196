"""A pytest plugin: transformers' own tests, with a SpanCache wherever they make a DynamicCache.

From a checkout of transformers at the installed release or near it, with and without ``-p``::

    PYTHONPATH=.../tests/transformers pytest -p span_for_dynamic tests/utils/test_cache_utils.py
"""

from __future__ import annotations

import sys
from typing import Any

import transformers
from transformers import cache_utils

import kvspan
from kvspan.transformers import SpanCache

# By another name: what is called DynamicCache is replaced, here as well.
ORIGINAL = cache_utils.DynamicCache
POOL = kvspan.Pool(capacity="4GiB", page_size="64KiB")


class SpanForDynamic(SpanCache):
    """A SpanCache with the arguments of a DynamicCache; those that offload stay what they were."""

    def __new__(cls, *data: Any, offloading: bool = False, **options: Any) -> Any:
        if offloading:
            return ORIGINAL(*data, offloading=True, **options)
        return super().__new__(cls)

    n_made = 0

    def __init__(self, ddp_cache_data: Any = None, config: Any = None, **options: Any) -> None:
        super().__init__(config, pool=POOL)
        SpanForDynamic.n_made += 1
        for layer, (keys, values, *_) in enumerate(ddp_cache_data or ()):
            if keys is not None:
                self.update(keys, values, layer)


def pytest_configure(config: Any) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("DynamicCache") is ORIGINAL:
            module.DynamicCache = SpanForDynamic  # type: ignore[attr-defined]
    assert transformers.DynamicCache is SpanForDynamic


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{SpanForDynamic.n_made} caches were a SpanCache")
