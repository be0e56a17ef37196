"""A chat whose turns compute only what is new, then several answers that share the conversation.

    pip install kvspan[hf]
    python examples/chat.py                       # a small model with random weights: no download
    python examples/chat.py --model PATH_OR_NAME  # any causal language model of transformers

Every turn's prompt is the whole conversation so far. A plain cache computes all of it again; here
a turn begins with the pages that the turns before it committed.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import kvspan
from kvspan.transformers import SpanCache

TURNS, SAID, ANSWERED, N_BEST = 6, 400, 60, 8


def load(name: str | None) -> torch.nn.Module:
    """Return the named model, or a Llama of 4 layers with random weights."""
    torch.manual_seed(0)
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, attn_implementation="kvspan").eval()
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=32768,
        attn_implementation="kvspan", eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def cache_for(config: AutoConfig, dtype: torch.dtype) -> kvspan.KVCache:
    """Return one cache for all calls, shaped like the model's."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return kvspan.KVCache(
        kvspan.Pool(capacity="2GiB"),
        config.num_hidden_layers,
        config.num_key_value_heads,
        dim,
        dtype,
        max_seqs=N_BEST + 1,
        max_seq_len=32768,
    )


def mib(n_bytes: int) -> str:
    """Return a size as people read it."""
    return f"{n_bytes / 2**20:.0f} MiB"


def main() -> None:
    """Run the chat."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a path, or a name on the hub")
    model = load(parser.parse_args().model)
    cache = cache_for(model.config.get_text_config(), model.dtype)
    vocabulary = model.config.get_text_config().vocab_size

    ids = torch.empty(1, 0, dtype=torch.long)
    for turn in range(1, TURNS + 1):
        ids = torch.cat([ids, torch.randint(0, vocabulary, (1, SAID))], dim=1)
        start = time.perf_counter()
        with SpanCache(cache, token_ids=ids) as rows:
            known, n_prompt = rows.get_seq_length(), ids.shape[1]
            ids = model.generate(
                ids, past_key_values=rows, max_new_tokens=ANSWERED, do_sample=False
            )
            rows.commit(ids)
        print(
            f"turn {turn}: a prompt of {n_prompt} tokens, {known} known, {n_prompt - known} "
            f"computed; {time.perf_counter() - start:.2f} s"
        )

    rows_of = ids.repeat(N_BEST, 1)
    with SpanCache(cache, token_ids=rows_of) as rows:
        answers = model.generate(
            rows_of, past_key_values=rows, max_new_tokens=ANSWERED, do_sample=True
        )
        stats = cache.stats()
        in_use = cache.pool.stats().in_use_bytes
        print(
            f"{N_BEST} answers of {answers.shape[1] - ids.shape[1]} tokens to a conversation of "
            f"{ids.shape[1]}: {mib(in_use)} of memory, {mib(stats.mapped_bytes)} without sharing"
        )
    prefixes = cache.stats().prefixes
    print(f"in all, {prefixes.n_hit_tokens} tokens were not computed again")


if __name__ == "__main__":
    main()
