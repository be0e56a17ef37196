"""Frames and slots that a test took are given back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kvspan


@pytest.fixture
def pool() -> Iterator[kvspan.Pool]:
    """Pages of 64 KiB; nothing is left of them."""
    with kvspan.Pool(capacity="64MiB", page_size="64KiB") as made:
        yield made
        assert made.stats().in_use_bytes == 0
