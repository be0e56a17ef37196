"""The byte-level BPE tokenizer built from GGUF lists, on a vocabulary made here."""

from __future__ import annotations

import pytest

from kvspan.demo.tokenizer import BpeTokenizer, SyllableTokenizer, tokenizer_json_from_gguf
from kvspan.demo.weights import Checkpoint, random_checkpoint

pytest.importorskip("tokenizers", reason="an extra of the demo")

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ t", "h e", "Ġt he", "1 2"]
    tokens = special + letters + [merge.replace(" ", "") for merge in merges]
    kinds = [3] * len(special) + [1] * (len(tokens) - len(special))
    text = tokenizer_json_from_gguf(tokens, merges, kinds)
    random = random_checkpoint(0)
    return BpeTokenizer(Checkpoint("made", random.config, {}, text, TEMPLATE, eos_id=2))


@pytest.mark.parametrize("text", ["the then  two\n\n", "naïve 漢字 🎉", "x = 1234;", " ", "don't"])
def test_round_trip(tokenizer: BpeTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_single_and_left_out_of_text(tokenizer: BpeTokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>the<|im_end|>")
    assert (ids[0], ids[-1], tokenizer.eos_id) == (1, 2, 2)
    assert tokenizer.decode(ids) == "the"


def test_merges_apply_but_digits_stay_single(tokenizer: BpeTokenizer) -> None:
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode("1212")) == 4


def test_chat_pieces_join_to_the_whole_template(tokenizer: BpeTokenizer) -> None:
    shared, rest = tokenizer.chat("Be brief.", "Why?")
    assert shared == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert rest == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def test_syllables_are_text() -> None:
    toy = SyllableTokenizer()
    assert toy.decode(toy.encode("as it was")) == "as it was"
    assert toy.decode([300, 4000]).isascii()
