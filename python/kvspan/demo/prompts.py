"""What the prompts of act two say: the trace has lengths only."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from .tokenizer import BpeTokenizer, Tokenizer


def make_prompts(
    lengths: Sequence[int], tokenizer: Tokenizer, vocab_size: int, seed: int
) -> tuple[list[Tensor], str]:
    """Prompts of given lengths.

    With the real tokenizer they are seeded slices of the Python language reference, which every
    CPython carries for ``help()``; otherwise, or where a distribution left it out, seeded random
    token ids.

    Returns
    -------
    prompts : list of Tensor
        int64 ids.
    origin : str
        Where they come from, for the screen.
    """
    rng = random.Random(seed)
    ids = _reference_ids(tokenizer)
    if not ids:
        generator = torch.Generator().manual_seed(seed)
        random_ids = [torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths]
        return random_ids, "seeded random token ids"
    text = torch.tensor(ids)
    text = text.repeat(1 + max(lengths) // len(text))
    starts = [rng.randrange(len(text) - n + 1) for n in lengths]
    slices = [text[start : start + n] for start, n in zip(starts, lengths, strict=True)]
    return slices, "seeded slices of the Python language reference"


def _reference_ids(tokenizer: Tokenizer) -> list[int]:
    """Token ids of the Python language reference; none without it or without a real tokenizer."""
    if not isinstance(tokenizer, BpeTokenizer):
        return []
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
