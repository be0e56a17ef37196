"""Act one: a dozen questions behind one system prompt, answered together.

The system prompt is computed once. Every question is a fork of that sequence: whole pages are
shared, the partly filled last page is copied, and the question's own tokens follow. Then all rows
decode in one batch, and a row leaves it when the model ends its answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .model import Llama
from .stores import SpanKV
from .tokenizer import Tokenizer

SYSTEM_PROMPT = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face. You answer questions "
    "of all kinds for curious readers. Answer in plain English, in two or three short sentences, "
    "and get straight to the point. Do not repeat the question, do not use lists, and do not "
    "apologise. If a question can be answered with one fact, say that fact first and then explain "
    "it with a simple example from daily life."
)

QUESTIONS = (
    "Why is the sky blue?",
    "What does the heart do?",
    "How do plants make their food?",
    "Why do we have leap years?",
    "What is a black hole?",
    "How does a refrigerator keep food cold?",
    "Why do leaves change colour in autumn?",
    "What is the water cycle?",
    "How do vaccines protect us?",
    "What makes bread rise?",
    "What causes the tides?",
    "What is virtual memory in a computer?",
)


@dataclass
class Answer:
    """A question and what has been answered so far."""

    question: str
    text: str = ""
    is_done: bool = False


@dataclass(frozen=True)
class ChatResult:
    """What act one measured: wall-clock seconds; bytes when all prompts were computed."""

    n_system_tokens: int
    n_output_tokens: int
    prefill_s: float
    decode_s: float
    n_steps: int
    mapped_bytes: int
    shared_bytes: int
    calls_in_steps: int


def run_chat(
    model: Llama,
    tokenizer: Tokenizer,
    store: SpanKV,
    answers: Sequence[Answer],
    max_new_tokens: int,
    show: Callable[[], None],
) -> ChatResult:
    """Answer all questions together; `show` is called whenever `answers` grew."""
    prompts = [tokenizer.chat(SYSTEM_PROMPT, answer.question) for answer in answers]
    system_ids = tokenizer.encode(prompts[0][0])
    began = time.perf_counter()
    system = store.admit(len(system_ids))
    model.forward(torch.tensor([system_ids]), store.begin([system], len(system_ids)), store)

    rows: list[int] = []
    ids: list[list[int]] = []
    for _, question in prompts:
        row = store.fork(system)
        question_ids = tokenizer.encode(question)
        starts = store.begin([row], len(question_ids))
        logits = model.forward(torch.tensor([question_ids]), starts, store)
        rows.append(row)
        ids.append([int(logits.argmax())])
    prefilled = time.perf_counter()
    stats = store.cache.stats()

    calls_in_steps = n_steps = 0
    while True:
        for i, answer in enumerate(answers):
            if not answer.is_done:
                answer.is_done = ids[i][-1] == tokenizer.eos_id or len(ids[i]) >= max_new_tokens
                # A character may be split over tokens: its first part waits for the rest.
                answer.text = tokenizer.decode(ids[i]).rstrip("\ufffd").strip()
                if answer.is_done:
                    if ids[i][-1] != tokenizer.eos_id:
                        answer.text += " …"
                    store.release(rows[i])
        show()
        running = [i for i, answer in enumerate(answers) if not answer.is_done]
        if not running:
            break
        before = store.driver_work().calls
        starts = store.begin([rows[i] for i in running], 1)
        calls_in_steps += store.driver_work().calls - before
        logits = model.forward(torch.tensor([[ids[i][-1]] for i in running]), starts, store)
        for i, token in zip(running, logits.argmax(dim=-1).tolist(), strict=True):
            ids[i].append(token)
        n_steps += 1
    decoded = time.perf_counter()
    store.release(system)
    return ChatResult(
        n_system_tokens=len(system_ids),
        n_output_tokens=sum(len(tokens) for tokens in ids),
        prefill_s=prefilled - began,
        decode_s=decoded - prefilled,
        n_steps=n_steps,
        mapped_bytes=stats.mapped_bytes,
        shared_bytes=stats.shared_bytes,
        calls_in_steps=calls_in_steps,
    )
