"""Text to token ids and back, for the real model and for the random one.

SmolLM2 has a byte-level BPE tokenizer (GPT-2's, with every digit on its own). It is built from the
vocabulary and merges in the GGUF file with the ``tokenizers`` package. The random model has no
language: `SyllableTokenizer` gives its ids pronounceable names, so that the same screen shows
something.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from .errors import require
from .weights import Checkpoint

_CONTROL_TOKEN = 3  # token_type of special tokens in GGUF files


class Tokenizer(Protocol):
    """What the demo asks of a tokenizer."""

    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it become single ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of ids, special tokens left out."""
        ...

    def chat(self, system: str, question: str) -> tuple[str, str]:
        """Write the chat prompt in two pieces: what all questions share, and the rest."""
        ...


def tokenizer_json_from_gguf(tokens: list[str], merges: list[str], token_types: list[int]) -> str:
    """Build a ``tokenizers`` description from the lists in a GGUF file.

    Parameters
    ----------
    tokens : list of str
        The vocabulary in byte-level notation; a token's place is its id.
    merges : list of str
        Pairs in order of priority, each as two tokens with a space between.
    token_types : list of int
        GGUF's type of each token; 3 marks special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token for token, kind in zip(tokens, token_types, strict=True) if kind == _CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    text: str = tokenizer.to_str()
    return text


class BpeTokenizer:
    """The real model's tokenizer and chat template."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        require("tokenizers", "to read and write text")
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_str(checkpoint.tokenizer_json)
        self._template = ImmutableSandboxedEnvironment().from_string(checkpoint.chat_template)
        self.eos_id = checkpoint.eos_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it become single ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def chat(self, system: str, question: str) -> tuple[str, str]:
        """Write the chat prompt in two pieces: what all questions share, and the rest."""
        opening = [{"role": "system", "content": system}]
        shared = self._template.render(messages=opening)
        whole = self._template.render(
            messages=[*opening, {"role": "user", "content": question}], add_generation_prompt=True
        )
        return shared, whole.removeprefix(shared)


class SyllableTokenizer:
    """A stand-in for random weights: bytes in, made-up words out.

    Ids below 256 are bytes; the others are words of two or three syllables, each with a leading
    space.
    """

    _SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")

    eos_id = -1

    def encode(self, text: str) -> list[int]:
        """Give the text's UTF-8 bytes."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Made-up words; bytes come out as the text they were."""
        return b"".join(self._piece(i) for i in ids).decode(errors="replace")

    def chat(self, system: str, question: str) -> tuple[str, str]:
        """Write the chat prompt in two pieces: what all questions share, and the rest."""
        return f"{system}\n", f"{question}\n"

    def _piece(self, token: int) -> bytes:
        if token < 256:
            return bytes([token])
        n = len(self._SYLLABLES)
        return f" {self._SYLLABLES[token % n]}{self._SYLLABLES[token // n % n]}".encode()
