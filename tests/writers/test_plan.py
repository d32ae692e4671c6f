"""Plans: whatever chunks they are gathered in, the same rows, digest and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from kdstore.errors import InputError
from kdstore.hashing import canonical_json, sha256_hex
from kdstore.sample import Sample
from kdstore.writers import plan as module
from kdstore.writers.plan import Plan, make_plan


def planned(ids: list[str]) -> Plan:
    rows = ((n, [Sample(name, np.arange(n % 5, dtype=np.int32))]) for n, name in enumerate(ids))
    return make_plan(rows, unit_tokens=10, vocab_size=8, where="here")[0]


@pytest.mark.parametrize("chunk", [1, 7, 20, 100])
def test_chunks_leave_no_trace(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    ids = [f"ü{n}" for n in range(20)]
    whole = planned(ids)
    monkeypatch.setattr(module, "CHUNK_SAMPLES", chunk)
    plan = planned(ids)
    assert plan.table.equals(whole.table)
    assert plan.to_bytes() == whole.to_bytes()
    numbers = [
        plan.table[name].to_numpy().astype("<i8").tobytes()
        for name in ("unit", "source_row", "num_tokens", "num_scored")
    ]
    assert plan.digest() == sha256_hex(b"".join([*numbers, canonical_json(ids)]))
    unit = plan.unit(1)
    rows = range(unit.first_row, unit.last_row)
    assert unit.ids_and_lengths == [(f"ü{n}", n % 5) for n in rows]
    assert unit.num_tokens == sum(n % 5 for n in rows) >= 10


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_an_id_that_comes_twice(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK_SAMPLES", chunk)
    with pytest.raises(InputError, match=r"two samples have the id 'b'[\s\S]*rows 1 and 4"):
        planned(["a", "b", "c", "d", "b", "e"])


def test_a_hash_that_comes_twice_is_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_SAMPLES", 2)
    monkeypatch.setattr(module, "sample_hash", lambda sample_id: ord(sample_id) // 2)
    assert planned(["a", "b", "c", "d"]).table["sample_id"].to_pylist() == ["a", "b", "c", "d"]
    with pytest.raises(InputError, match="rows 0 and 4"):
        planned(["a", "b", "c", "d", "a"])
