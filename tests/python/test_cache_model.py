"""The cache against a plain Python model: random operations, every byte checked after each of them.

The model of a sequence is an array with the number that was written at each position. Every write
takes numbers of its own, and every element of every plane derives another value from them, so a
page that shows in the wrong place, or a copy that was not made, cannot hide. The load is that of a
beam search with speculation in too small a machine: growth by single tokens and by prompts, forks,
rejections, permuted batches, prompts that were seen before, memory running out.

The examples are the same in every run. KVSPAN_MODEL_EXAMPLES=500 takes so many random ones a case.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from device import IS_HOST, PAGE, SCALE
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kvspan

MAX_LEN = 400
WINDOW = 40
MAX_SEQS = 8
AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Model:
    """What one sequence holds."""

    def __init__(self) -> None:
        self.ids = torch.zeros(0, dtype=torch.int32)
        self.dropped = 0  # positions before it are gone in layers with a window
        self.is_pristine = True  # nothing was ever written past its length

    def copy(self) -> Model:
        other = Model()
        other.ids, other.dropped = self.ids, self.dropped
        return other


class PlaneBytes:
    """One plane's memory as integers, and what they are for given numbers."""

    def __init__(self, tensor: torch.Tensor, is_windowed: bool, index: int) -> None:
        item = tensor.element_size()
        self.is_windowed = is_windowed
        self.memory = tensor.view(AS_INTEGERS[item])
        self.record_bytes = self.memory.stride(1) * item
        n = self.memory.shape[2] * self.memory.shape[3]
        self.salt = (torch.arange(n, dtype=torch.int32) * 7 + index * 50_021) * 1_640_531_527

    def expected(self, ids: torch.Tensor) -> torch.Tensor:
        values = (ids[:, None] * 40_503 + self.salt) >> 8
        return values.to(self.memory.dtype).reshape(len(ids), *self.memory.shape[2:])


class CacheMachine(RuleBasedStateMachine):
    """One cache in one pool; the cases below set the options."""

    options: ClassVar[dict[str, Any]] = {}
    pool_options: ClassVar[dict[str, Any]] = {}

    @initialize()
    def make(self) -> None:
        self.pool = kvspan.Pool(**{"capacity": 64 * PAGE, "page_size": PAGE, **self.pool_options})
        self.cache = kvspan.KVCache(
            self.pool, max_seqs=MAX_SEQS, max_seq_len=MAX_LEN, **self.options
        )
        tensors = [
            (plane, spec.window is not None)
            for i, spec in enumerate(self.cache.layers)
            for plane in self.cache.layer(i)
        ]
        self.planes = [PlaneBytes(*tensor, i) for i, tensor in enumerate(tensors)]
        self.has_window = any(plane.is_windowed for plane in self.planes)
        self.models: dict[kvspan.Sequence, Model] = {}
        self.batch: kvspan.Batch | None = None
        self.n_rows = 0
        self.n_written = 1
        self.committed: list[torch.Tensor] = []
        for length in (120, 70):
            sequence = self.cache.sequence()
            sequence.extend(length)
            self.models[sequence] = Model()
            self.write(sequence, length)
            self.publish(sequence, length, merge=False)

    # Operations of the model

    def attempt(self, call: Any, *args: Any) -> Any:
        """Call; None if memory or slots are short, which leaves everything as it was."""
        before = self.cache.stats()
        try:
            return call(*args)
        except (kvspan.OutOfMemory, kvspan.CapacityError):
            after = self.cache.stats()
            for figure in ("used_bytes", "partial_bytes", "n_sequences"):
                assert getattr(before, figure) == getattr(after, figure)
            # Which it tried to live on.
            assert after.kept_bytes + after.ahead_bytes <= before.kept_bytes + before.ahead_bytes
            return None

    def write(self, sequence: kvspan.Sequence, n: int, new: torch.Tensor | None = None) -> None:
        """Fill the newest n positions, as a kernel would."""
        model = self.models[sequence]
        begin, slot = len(model.ids), sequence.slot
        assert sequence.length == begin + n
        if new is None:
            new = torch.arange(self.n_written, self.n_written + n, dtype=torch.int32)
            self.n_written += n
        for plane in self.planes:
            place = plane.memory[slot, begin : begin + n]
            if self.cache_zeroes_everything and model.is_pristine:
                assert not place.any(), "bytes of another sequence"
            place[...] = plane.expected(new)
        model.ids = torch.cat([model.ids, new])

    def publish(self, sequence: kvspan.Sequence, n: int, merge: bool) -> None:
        ids = self.models[sequence].ids[:n]
        known = sequence.commit(ids, merge=merge)
        assert 0 <= known <= n
        if known > 0:
            self.committed.append(ids[:known])

    @property
    def cache_zeroes_everything(self) -> bool:
        return self.options.get("scrub") == "reuse"

    def pick(self, data: Any) -> kvspan.Sequence:
        # By its number: hypothesis would keep a drawn object alive.
        return list(self.models)[data.draw(st.integers(0, len(self.models) - 1))]

    # Rules

    @rule(hint=st.sampled_from([0, 30, MAX_LEN]))
    def sequence(self, hint: int) -> None:
        made = self.attempt(self.cache.sequence, hint)
        assert (made is None) == (len(self.models) == MAX_SEQS or self.is_all_leased())
        if made is not None:
            assert made.length == 0
            self.models[made] = Model()

    def is_all_leased(self) -> bool:
        leased = 0 if self.batch is None else self.n_rows
        outside = len(self.models)
        if self.batch is not None:
            outside -= sum(row in self.models for row in self.batch.sequences)
        return leased + outside == MAX_SEQS

    @precondition(lambda self: self.models)
    @rule(data=st.data(), n=st.sampled_from([1, 2, 13, 52, 100, 120, 200]))
    def extend(self, data: Any, n: int) -> None:
        sequence = self.pick(data)
        before = sequence.length
        self.attempt(sequence.extend, n)
        self.write(sequence, sequence.length - before)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), share=st.floats(0, 1))
    def truncate(self, data: Any, share: float) -> None:
        sequence = self.pick(data)
        model = self.models[sequence]
        length = model.dropped + round(share * (len(model.ids) - model.dropped))
        sequence.truncate(length)
        model.is_pristine &= length == len(model.ids)
        model.ids = model.ids[:length]

    @precondition(lambda self: self.models)
    @rule(data=st.data(), by_name=st.booleans())
    def release(self, data: Any, by_name: bool) -> None:
        sequence = self.pick(data)
        in_batch = self.batch is not None and sequence in self.batch.sequences
        del self.models[sequence]
        if by_name or in_batch:
            sequence.release()
            assert sequence.is_released
        # Else the last reference goes here.

    @precondition(lambda self: self.models)
    @rule(data=st.data(), n=st.sampled_from([1, 1, 3]), share=st.sampled_from([0.3, 0.8, 1, 1]))
    def fork(self, data: Any, n: int, share: float) -> None:
        parent = self.pick(data)
        model = self.models[parent]
        length = model.dropped + round(share * (len(model.ids) - model.dropped))
        children = self.attempt(lambda: parent.fork(n, length=length))
        for child in children or ():
            self.models[child] = model.copy()
            self.models[child].ids = model.ids[:length]

    @precondition(lambda self: self.models)
    @rule(data=st.data(), share=st.sampled_from([0.5, 1, 1]), merge=st.booleans())
    def commit(self, data: Any, share: float, merge: bool) -> None:
        sequence = self.pick(data)
        self.publish(sequence, round(share * len(self.models[sequence].ids)), merge=merge)

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), share=st.sampled_from([0.4, 1, 1]), n_more=st.sampled_from([0, 1, 60]))
    def begin_with_known(self, data: Any, share: float, n_more: int) -> None:
        known = data.draw(st.sampled_from(self.committed), label="known")
        known = known[: round(share * len(known))]
        prompt = torch.cat([known, -torch.ones(n_more, dtype=torch.int32)])
        made = self.attempt(lambda: self.cache.sequence(token_ids=prompt))
        if made is not None:
            assert made.length <= max(0, min(len(known), len(prompt) - 1))
            self.models[made] = Model()
            self.models[made].ids = known[: made.length]

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def compute_again(self, data: Any) -> None:
        ids = data.draw(st.sampled_from(self.committed), label="ids")
        made = self.attempt(self.cache.sequence)
        if made is not None:
            self.models[made] = Model()
            if self.attempt(lambda: made.extend(len(ids)) or True):
                self.write(made, len(ids), ids)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), n=st.integers(1, 4))
    def reorder(self, data: Any, n: int) -> None:
        live = list(self.models)
        chosen = data.draw(
            st.lists(st.integers(0, len(live) - 1), min_size=1, max_size=n, unique=True)
        )
        parents = data.draw(
            st.lists(st.integers(0, len(chosen) - 1), min_size=len(chosen), max_size=len(chosen))
        )
        rows = [live[i] for i in chosen]
        slots = [row.slot for row in rows]
        done = self.attempt(lambda: self.cache.reorder(rows, parents) or True)
        assert [row.slot for row in rows] == slots
        if not done:
            return
        models = [self.models[row] for row in rows]
        for i, (row, parent) in enumerate(zip(rows, parents, strict=True)):
            heir = parent if parents[parent] == parent else parents.index(parent)
            self.models[row] = models[parent] if heir == i else models[parent].copy()

    @precondition(lambda self: self.models)
    @rule(data=st.data(), n=st.sampled_from([1, 1, 20]))
    def step(self, data: Any, n: int) -> None:
        rows = data.draw(
            st.lists(st.integers(0, len(self.models) - 1), min_size=1, unique=True), label="rows"
        )
        live = list(self.models)
        self.step_batch(self.cache.batch([live[row] for row in rows]), n)

    def step_batch(self, batch: kvspan.Batch, n: int) -> None:
        rows = batch.sequences
        before = [len(self.models[row].ids) for row in rows]
        lengths = self.attempt(batch.step, n)
        if lengths is not None:
            assert lengths.tolist() == before
            for row in rows:
                self.write(row, n)
        assert batch.lengths.tolist() == [len(self.models[row].ids) for row in rows]
        assert batch.slots.tolist() == [row.slot for row in rows]

    @precondition(lambda self: self.has_window and self.models)
    @rule(data=st.data(), share=st.sampled_from([0.5, 1, 1]))
    def drop_before(self, data: Any, share: float) -> None:
        sequence = self.pick(data)
        model = self.models[sequence]
        position = round(share * max(0, len(model.ids) + 1 - WINDOW))
        sequence.drop_before(position)
        model.dropped = max(model.dropped, position)

    @precondition(lambda self: self.batch is None)
    @rule(n=st.integers(1, 4))
    def adjacent_batch(self, n: int) -> None:
        self.batch, self.n_rows = self.attempt(self.cache.batch, n), n
        if self.batch is not None:
            slots = self.batch.slots.tolist()
            assert slots == list(range(slots[0], slots[0] + n))
            self.models.update((row, Model()) for row in self.batch.sequences)

    @precondition(lambda self: self.batch is not None)
    @rule(n=st.sampled_from([1, 30]))
    def step_adjacent(self, n: int) -> None:
        assert self.batch is not None
        if all(row in self.models for row in self.batch.sequences):
            self.step_batch(self.batch, n)

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data())
    def select(self, data: Any) -> None:
        assert self.batch is not None
        old = self.batch.sequences
        alive = [i for i, row in enumerate(old) if row in self.models]
        if not alive:
            self.batch = None
            return
        rows = data.draw(st.lists(st.sampled_from(alive), min_size=1, max_size=self.n_rows))
        addresses = [plane.data_ptr() for plane in self.batch.layer(0)]
        try:
            self.batch.select(rows)
        except kvspan.OutOfMemory:
            assert self.batch.sequences == old
            return
        assert [plane.data_ptr() for plane in self.batch.layer(0)] == addresses
        for i, row in enumerate(rows):
            stays = row < len(rows) and rows[row] == row
            heir = row if stays else rows.index(row)
            assert (self.batch.sequences[i] is old[row]) == (i == heir)
        models = {row: self.models[row] for row in old if row in self.models}
        for row in models:
            del self.models[row]
            assert row.is_released == (row not in self.batch.sequences)
        for row, was in zip(self.batch.sequences, rows, strict=True):
            self.models[row] = models[row] if row in models else models[old[was]].copy()

    @precondition(lambda self: self.batch is not None)
    @rule()
    def forget_batch(self) -> None:
        self.batch = None

    @rule(pool_only=st.booleans())
    def trim(self, pool_only: bool) -> None:
        free = self.pool.stats().free_bytes
        assert self.pool.trim() == free
        assert self.pool.stats().free_bytes == 0
        if pool_only:
            return
        before, in_use = self.cache.stats(), self.pool.stats().in_use_bytes
        trimmed = self.cache.trim()
        after = self.cache.stats()
        assert trimmed == in_use - self.pool.stats().in_use_bytes
        if before.prefix_bytes > 0:
            return
        # What was kept for later and what was mapped ahead goes alike.
        surplus = before.kept_bytes + before.ahead_bytes
        # But not what others hold as well: a slot that is still read keeps that, too.
        surplus -= before.shared_bytes - after.shared_bytes
        assert trimmed + after.kept_bytes + after.ahead_bytes == surplus
        # A frame of several pages goes whole or not at all.
        assert after.kept_bytes == 0 or "max_frame_size" in self.pool_options

    @precondition(lambda self: self.cache.stats().prefix_bytes > 0)
    @rule()
    def be_short_of_memory(self) -> None:
        """Another cache takes what can be had, which makes this one forget what nobody maps."""
        was = self.cache.stats()
        n_pages = self.pool.capacity // PAGE
        # A token a page.
        with kvspan.KVCache(
            self.pool, 1, 1, PAGE // 2, torch.int8, max_seqs=1, max_seq_len=2 * n_pages,
            overread_tokens=0,
        ) as other:  # fmt: skip
            greedy, n = other.sequence(), n_pages
            while n > 0:
                try:
                    greedy.extend(n)
                except kvspan.OutOfMemory as error:
                    n //= 2
                    left = error.reclaimable
            if "max_frame_size" not in self.pool_options:
                assert left == 0
                assert self.pool.stats().in_use_bytes == self.pool.capacity
            now = self.cache.stats()
            assert now.used_bytes == was.used_bytes
            assert now.prefix_bytes <= was.prefix_bytes

    # What always holds

    @invariant()
    def bytes_are_the_models(self) -> None:
        for sequence, model in self.models.items():
            assert len(sequence) == len(model.ids)
            slot = sequence.slot
            for plane in self.planes:
                begin = model.dropped if plane.is_windowed else 0
                shown = plane.memory[slot, begin : len(model.ids)]
                assert torch.equal(shown, plane.expected(model.ids[begin:]))

    @invariant()
    def figures_add_up(self) -> None:
        s, pool = self.cache.stats(), self.pool.stats()
        parts = (s.used_bytes, s.partial_bytes, s.ahead_bytes, s.kept_bytes)
        assert all(0 <= part <= s.mapped_bytes for part in parts)
        assert s.mapped_bytes == sum(parts)
        assert s.mapped_bytes + s.prefix_bytes - s.shared_bytes == pool.in_use_bytes
        assert pool.in_use_bytes + pool.free_bytes + pool.fresh_bytes == pool.capacity_bytes
        assert pool.n_failures == 0
        assert s.n_sequences == len(self.models)
        if not self.has_window:
            n_tokens = sum(len(model.ids) for model in self.models.values())
            assert s.used_bytes == n_tokens * self.cache.bytes_per_token

    @invariant()
    def page_map_covers_the_tokens(self) -> None:
        entries = self.cache.page_map()
        assert len(entries) * PAGE == self.cache.stats().mapped_bytes
        uses = Counter(entry.frame_id for entry in entries)
        if "max_frame_size" not in self.pool_options:
            # Every other reference is the prefix index's.
            others = {e.frame_id: e.n_references - uses[e.frame_id] for e in entries}
            assert set(others.values()) <= {0, 1}
            assert sum(others.values()) * PAGE <= self.cache.stats().prefix_bytes
        mapped = {(entry.slot, entry.lane, entry.page) for entry in entries}
        for sequence, model in self.models.items():
            if len(model.ids) == 0:
                continue
            readable = len(model.ids) + self.cache.overread_tokens
            for lane, tokens_per_page in enumerate(self.cache.tokens_per_page):
                n_pages = -(-readable * round(PAGE / tokens_per_page) // PAGE)
                begin = 0 if model.dropped == 0 else int(model.dropped // tokens_per_page)
                for page in range(begin, n_pages):
                    assert (sequence.slot, lane, page) in mapped

    @invariant()
    def unmapped_reads_as_zeros(self) -> None:
        if not IS_HOST or self.options.get("unmapped") == "fault":
            return
        ends = [0] * MAX_SEQS
        for entry in self.cache.page_map():
            ends[entry.slot] = max(ends[entry.slot], (entry.page + 1) * PAGE)
        for slot, end in enumerate(ends):
            for plane in self.planes:
                first = -(-end // plane.record_bytes)
                assert not plane.memory[slot, first : first + 2].any()
                assert first >= MAX_LEN or not plane.memory[slot, -1].any()

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.models.clear()
        self.batch = None
        self.cache.trim()
        assert self.cache.stats().mapped_bytes == 0
        assert self.pool.stats().in_use_bytes == 0
        self.pool.trim()
        assert self.pool.stats().fresh_bytes == self.pool.capacity
        self.planes.clear()
        self.cache.close()


# Records of 1,280 B, and of 384 B a layer, where pages are of 64 KiB.
STRADDLING = {
    "n_layers": 2,
    "n_kv_heads": 5,
    "head_dim": 16 * SCALE,
    "dtype": torch.float32,
    "layers_per_page": 2,
}
LAYERS = {"n_layers": 4, "n_kv_heads": 3, "head_dim": 32 * SCALE, "dtype": torch.bfloat16}
HYBRID = {
    "layers": [
        kvspan.LayerSpec(2, 192 * SCALE, torch.float16, window=window)
        for window in (None, WINDOW, None, WINDOW)
    ]
}
QUANTIZED = {  # records of 1,060 B, of three dtypes, K and V and their scales
    "layers": [
        kvspan.LayerSpec(
            planes=(
                kvspan.Plane("k", 4, 128 * SCALE, torch.int8),
                kvspan.Plane("v", 4, 128 * SCALE, torch.float8_e4m3fn),
                kvspan.Plane("scales", 1, 9 * SCALE, torch.float32),
            )
        )
    ]
    * 2
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "straddling": (STRADDLING, {}),
    "one-layer-per-page": ({**LAYERS, "layers_per_page": 1}, {}),
    "two-layers-per-page": ({**LAYERS, "layers_per_page": 2}, {}),
    "all-layers-per-page": ({**LAYERS, "layers_per_page": 4}, {}),
    "split-planes": ({**STRADDLING, "split_planes": True}, {}),
    "planes-of-several-dtypes": (QUANTIZED, {}),
    "windows": (HYBRID, {}),
    "windows-large-frames": ({**HYBRID, "layers_per_page": 2}, {"max_frame_size": 8 * PAGE}),
    "large-frames": (STRADDLING, {"max_frame_size": 8 * PAGE}),
    "short-of-memory": (STRADDLING, {"capacity": 12 * PAGE}),
    "short-of-memory-large-frames": (
        STRADDLING,
        {"capacity": 16 * PAGE, "max_frame_size": 8 * PAGE},
    ),
    "scrub-reuse": ({**STRADDLING, "scrub": "reuse"}, {"capacity": 24 * PAGE}),
    "scrub-reuse-large-frames": (
        {**STRADDLING, "scrub": "reuse"},
        {"capacity": 32 * PAGE, "max_frame_size": 8 * PAGE},
    ),
    "fault-and-overread": ({**STRADDLING, "unmapped": "fault", "overread_tokens": 60}, {}),
    "fault-and-overread-short-of-memory": (
        {**STRADDLING, "unmapped": "fault", "overread_tokens": 60},
        {"capacity": 16 * PAGE, "max_frame_size": 8 * PAGE},
    ),
    "keep-everything": ({**STRADDLING, "keep": "1GiB"}, {"capacity": 32 * PAGE}),
    "keep-nothing": ({**STRADDLING, "keep": 0}, {}),
}
N_EXAMPLES = int(os.environ.get("KVSPAN_MODEL_EXAMPLES", "0"))


@pytest.mark.parametrize("case", CASES)
def test_cache_does_what_the_model_does(case: str) -> None:
    options, pool_options = CASES[case]
    machine = type("Machine", (CacheMachine,), {"options": options, "pool_options": pool_options})
    if N_EXAMPLES == 0:
        machine = seed(case)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=N_EXAMPLES or (40 if SCALE == 1 else 5),  # larger pages take longer
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
