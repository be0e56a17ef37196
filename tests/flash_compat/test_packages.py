"""Which package's function is called on a GPU, and with what; the packages are stand-ins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_compat import interface, packages

GPU = torch.device("cuda:0")


def fa3_with_kvcache(q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any = None,
                     page_table: Any = None, causal: bool = False) -> str:  # fmt: skip
    return "3"


def fa3_varlen(q: Any, k: Any, v: Any, causal: bool = False) -> str:
    return "3"


def fa2(q: Any, k: Any, v: Any, **options: Any) -> str:
    return "2"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Modules that there are, on a Hopper."""
    there = {"flash_attn_interface", "flash_attn"}
    fa3 = {"flash_attn_with_kvcache": fa3_with_kvcache, "flash_attn_varlen_func": fa3_varlen}

    def function(module: str, name: str) -> Any:
        if module not in there:
            return None
        return fa3.get(name) if module == "flash_attn_interface" else fa2

    monkeypatch.setattr(packages, "_function", function)
    monkeypatch.setattr(packages, "_is_hopper", lambda device: True)
    return there


def test_the_newest_package_that_knows_all_arguments(installed: set[str]) -> None:
    find = packages.find
    found = find("flash_attn_with_kvcache", GPU, {"block_table": 1, "causal": True})
    assert found is not None
    assert found.func is fa3_with_kvcache
    assert found.keywords == {"page_table": 1, "causal": True}
    for name, options in (
        ("flash_attn_with_kvcache", {"alibi_slopes": 1}),
        ("flash_attn_varlen_func", {"block_table": 1}),
    ):
        found = find(name, GPU, options)
        assert found is not None
        assert found.func is fa2
        assert found.keywords == options
    installed.remove("flash_attn")
    assert find("flash_attn_with_kvcache", GPU, {"alibi_slopes": 1}) is None


def test_only_what_is_not_at_its_default_is_handed_over(installed: set[str]) -> None:
    class OnGpu:
        device = GPU

    arguments = {**interface._defaults(interface.flash_attn_with_kvcache), "q": OnGpu()}
    found = interface._of_a_package(
        interface.flash_attn_with_kvcache,
        {**arguments, "cache_seqlens": 3, "causal": False, "window_size": (-1, -1), "local": 1},
    )
    assert found is not None
    assert found.keywords == {"cache_seqlens": 3}
