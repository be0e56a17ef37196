"""The cache against a plain Python model: random operations, every byte checked after each.

The model of a sequence is the list of numbers written at its positions. Every write uses a number of
its own, so a page that shows in the wrong place, or a copy that was not made, cannot hide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvspan

PAGE = 64 << 10
MAX_LEN = 1200


@dataclass
class Model:
    """What one sequence holds, and from where on (layers with a window)."""

    values: list[int] = field(default_factory=list)
    dropped: int = 0

    def copy(self) -> Model:
        return Model(list(self.values), self.dropped)


class CacheMachine(RuleBasedStateMachine):
    """One cache in one pool; `options` and `pool_options` are set by the cases below."""

    options: dict[str, Any] = {}
    pool_options: dict[str, Any] = {}
    window = 40

    @initialize()
    def make(self) -> None:
        self.pool = kvspan.Pool(**{"capacity": 64 * PAGE, "page_size": PAGE, **self.pool_options})
        self.cache = kvspan.KVCache(self.pool, max_seqs=10, max_seq_len=MAX_LEN, **self.options)
        self.planes = [
            (plane, spec.window is not None)
            for i, spec in enumerate(self.cache.layers)
            for plane in self.cache.layer(i)
        ]
        self.has_window = any(windowed for _, windowed in self.planes)
        self.models: dict[kvspan.Sequence, Model] = {}
        self.batch: kvspan.Batch | None = None
        self.n_rows = 0
        self.n_written = 0

    def write(self, sequence: kvspan.Sequence, n: int) -> None:
        """Write n new numbers behind what the model holds."""
        model = self.models[sequence]
        begin = len(model.values)
        model.values += range(self.n_written, self.n_written + n)
        self.n_written += n
        new = torch.tensor(model.values[begin:], dtype=torch.float32)
        for j, (plane, _) in enumerate(self.planes):
            plane[sequence.slot, begin : begin + n] = (new + j / 64)[:, None, None]

    def attempt(self, call: Any, *args: Any) -> Any:
        """Call; None if memory or slots are short, which leaves everything as it was."""
        try:
            return call(*args)
        except (kvspan.OutOfMemory, kvspan.CapacityError):
            return None

    def pick(self, data: Any) -> kvspan.Sequence:
        return data.draw(st.sampled_from(list(self.models)), label="sequence")

    @rule(hint=st.sampled_from([0, 30, 500]))
    def sequence(self, hint: int) -> None:
        made = self.attempt(self.cache.sequence, hint)
        if made is not None:
            self.models[made] = Model()

    @precondition(lambda self: self.models)
    @rule(data=st.data(), n=st.sampled_from([1, 2, 13, 51, 52, 300, MAX_LEN]))
    def extend(self, data: Any, n: int) -> None:
        sequence = self.pick(data)
        self.attempt(sequence.extend, n)
        self.write(sequence, sequence.length - len(self.models[sequence].values))

    @precondition(lambda self: self.models)
    @rule(data=st.data(), share=st.floats(0, 1))
    def truncate(self, data: Any, share: float) -> None:
        sequence = self.pick(data)
        model = self.models[sequence]
        length = model.dropped + int(share * (len(model.values) - model.dropped))
        sequence.truncate(length)
        del model.values[length:]

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        sequence = self.pick(data)
        sequence.release()
        del self.models[sequence]

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        sequence = self.pick(data)
        child = self.attempt(sequence.fork)
        if child is not None:
            self.models[child] = self.models[sequence].copy()

    @precondition(lambda self: self.models)
    @rule(data=st.data(), n=st.sampled_from([1, 1, 20]))
    def step(self, data: Any, n: int) -> None:
        rows = data.draw(st.lists(st.sampled_from(list(self.models)), min_size=1, unique=True))
        batch = self.cache.batch(rows)
        before = [len(self.models[row].values) for row in rows]
        lengths = self.attempt(batch.step, n)
        if lengths is not None:
            assert lengths.tolist() == before
            for row in rows:
                self.write(row, n)
        assert batch.lengths.tolist() == [len(self.models[row].values) for row in rows]
        assert batch.slots.tolist() == [row.slot for row in rows]

    @precondition(lambda self: self.has_window and self.models)
    @rule(data=st.data(), share=st.floats(0, 1))
    def drop_before(self, data: Any, share: float) -> None:
        sequence = self.pick(data)
        model = self.models[sequence]
        position = int(share * max(0, len(model.values) + 1 - self.window))
        sequence.drop_before(position)
        model.dropped = max(model.dropped, position)

    @precondition(lambda self: self.batch is None)
    @rule(n=st.integers(1, 4))
    def adjacent_batch(self, n: int) -> None:
        self.batch, self.n_rows = self.attempt(self.cache.batch, n), n
        if self.batch is not None:
            self.models.update((row, Model()) for row in self.batch.sequences)

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
        models = [self.models[old[row]] for row in rows]
        for row in old:
            self.models.pop(row, None)
        self.models.update(
            (row, model.copy()) for row, model in zip(self.batch.sequences, models, strict=True)
        )

    @precondition(lambda self: self.batch is not None)
    @rule()
    def forget_batch(self) -> None:
        self.batch = None

    @rule()
    def trim(self) -> None:
        self.cache.trim()
        assert self.cache.stats().kept_bytes == 0

    @rule()
    def trim_pool(self) -> None:
        self.pool.trim()
        assert self.pool.stats().free_bytes == 0

    @invariant()
    def bytes_are_the_models(self) -> None:
        for sequence, model in self.models.items():
            assert sequence.length == len(model.values)
            values = torch.tensor(model.values, dtype=torch.float32)
            for j, (plane, windowed) in enumerate(self.planes):
                begin = model.dropped if windowed else 0
                shown = plane[sequence.slot, begin : len(values)]
                wanted = (values[begin:] + j / 64)[:, None, None].expand_as(shown)
                assert torch.equal(shown, wanted)

    @invariant()
    def figures_add_up(self) -> None:
        s, pool = self.cache.stats(), self.pool.stats()
        parts = (s.used_bytes, s.partial_bytes, s.ahead_bytes, s.kept_bytes)
        assert all(0 <= part <= s.mapped_bytes for part in parts)
        assert s.mapped_bytes == sum(parts)
        assert s.mapped_bytes - s.shared_bytes == pool.in_use_bytes
        assert pool.in_use_bytes + pool.free_bytes + pool.fresh_bytes == pool.capacity_bytes
        assert len(self.cache.page_map()) * PAGE == s.mapped_bytes
        assert s.n_sequences == len(self.models)
        if not self.has_window:
            n_tokens = sum(len(model.values) for model in self.models.values())
            assert s.used_bytes == n_tokens * self.cache.bytes_per_token

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for sequence in self.models:
            sequence.release()
        self.cache.trim()
        assert self.pool.stats().in_use_bytes == 0
        self.cache.close()


STRADDLING = {"n_layers": 2, "n_kv_heads": 5, "head_dim": 16, "dtype": torch.float32}  # 51.2 a page
WINDOWED = {
    "layers": [
        kvspan.LayerSpec(1, 32, torch.float32, window=CacheMachine.window if i % 2 else None)
        for i in range(4)
    ]
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "auto": (STRADDLING, {}),
    "one-layer-per-page": ({**STRADDLING, "layers_per_page": 1}, {}),
    "split-planes": ({**STRADDLING, "split_planes": True}, {}),
    "windows": (WINDOWED, {}),
    "large-frames": (STRADDLING, {"max_frame_size": 8 * PAGE}),
    "windows-large-frames": ({**WINDOWED, "layers_per_page": 2}, {"max_frame_size": 4 * PAGE}),
    "short-of-memory": (STRADDLING, {"capacity": 12 * PAGE}),
    "short-of-memory-large-frames": (
        STRADDLING,
        {"capacity": 16 * PAGE, "max_frame_size": 4 * PAGE},
    ),
    "scrub": ({**STRADDLING, "scrub": "reuse"}, {}),
    "fault-and-overread": ({**STRADDLING, "unmapped": "fault", "overread_tokens": 60}, {}),
    "keep-everything": ({**STRADDLING, "keep": "1GiB"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_model(case: str) -> None:
    options, pool_options = CASES[case]
    machine = type(
        f"Machine_{case}", (CacheMachine,), {"options": options, "pool_options": pool_options}
    )
    machine.TestCase.settings = settings(
        max_examples=25,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase().runTest()
