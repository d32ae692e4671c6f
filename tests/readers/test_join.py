"""Several teachers of one text, in one batch."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import kdstore
from kdstore.errors import StoreMismatchError
from kdstore.readers.dataset import PositionFilter
from tests.conftest import make_texts, write_jsonl

Dump = Callable[..., Path]


def test_another_teachers_signal_of_the_same_samples(dump: Dump) -> None:
    main, other = kdstore.open(dump()), kdstore.open(dump("other", select="topk:k=4", seed=3))
    joined = kdstore.Join(main, {"other": other})
    assert len(joined) == 60
    for sample, one, two in zip(joined, main, other, strict=True):
        assert sample.sample_id == one.sample_id == two.sample_id
        partner = sample.teachers["other"]
        assert sample.signal is not None
        assert partner.signal is not None
        np.testing.assert_array_equal(sample.signal.ids_N, one.signal.ids_N)  # type: ignore[union-attr]
        np.testing.assert_array_equal(partner.signal.ids_N, two.signal.ids_N)  # type: ignore[union-attr]


@pytest.mark.parametrize("unit_tokens", [500, 200])
def test_batches_have_both_signals_on_the_same_rows(dump: Dump, unit_tokens: int) -> None:
    """Units cut elsewhere only mean that samples are found by their ids."""
    main = kdstore.open(dump())
    other = kdstore.open(dump("other", select="topk:k=4", unit_tokens=unit_tokens))
    joined = kdstore.Join(main, {"other": other})
    by_name = {sample.sample_id: sample for sample in other}
    options = {"batch_tokens": 256, "pack": True, "max_length": 128, "seed": 1}
    alone = list(main.loader(**options))
    for batch, reference in zip(joined.loader(**options), alone, strict=True):
        assert batch.sample_ids == reference.sample_ids
        assert torch.equal(batch.signal.ids_N, reference.signal.ids_N)
        second = batch.of_teacher("other").to("cpu")
        assert second.input_ids is batch.input_ids
        assert second.signal.selection == "topk:k=4"
        assert torch.equal(second.logit_rows_S, batch.logit_rows_S)
        wanted = np.concatenate([by_name[name].signal.ids_N for name in batch.sample_ids])  # type: ignore[union-attr]
        assert second.signal.ids_N.tolist() == wanted.tolist()
        logits = torch.zeros(*batch.input_ids.shape, main.vocab_size)
        assert torch.isfinite(kdstore.losses.forward_kl(logits, second))


def test_other_teachers_may_score_other_positions(
    dump: Dump, tmp_path: Path, kdstore_cli: Callable[..., tuple[int, str, str]]
) -> None:
    main = kdstore.open(dump(audit_fraction=0.2))
    joined = kdstore.Join(main, {"audit": main.with_signal("audit")})
    batch = next(iter(joined.loader(batch_size=20)))
    audit = batch.of_teacher("audit")
    assert 0 < len(audit.signal) < len(batch.signal)
    assert set(audit.logit_rows_S.tolist()) < set(batch.logit_rows_S.tolist())
    scored = audit.labels != -100
    assert torch.equal(audit.labels[scored], batch.labels[scored])
    assert scored.sum() == len(audit.signal)


def test_filters_and_cuts_apply_to_all_teachers(dump: Dump) -> None:
    main, other = kdstore.open(dump()), kdstore.open(dump("other", select="topk:k=4"))
    joined = kdstore.Join(main, {"other": other})
    keep = PositionFilter(entropy=(1.0, 3.0))
    options = {"batch_tokens": 64, "max_length": 24, "overlong": "split", "keep": keep}
    batches = list(joined.loader(**options))
    assert sum(len(batch.signal) for batch in batches) > 0
    for batch in batches:
        assert torch.equal(batch.of_teacher("other").logit_rows_S, batch.logit_rows_S)


def test_it_can_be_pickled_and_resumed(dump: Dump) -> None:
    main, other = kdstore.open(dump()), kdstore.open(dump("other", unit_tokens=200))
    joined = kdstore.Join(main, {"other": other})
    copy = pickle.loads(pickle.dumps(joined))
    loader = joined.loader(batch_size=9)
    batches = [batch.sample_ids for batch in loader]
    assert [batch.sample_ids for batch in copy.loader(batch_size=9)] == batches
    state = main.loader(batch_size=9).state_dict()
    with pytest.raises(StoreMismatchError, match="other data"):
        loader.load_state_dict(state)


def test_a_store_that_lacks_a_sample_or_has_another_text_is_refused(
    dump: Dump, tmp_path: Path
) -> None:
    main = kdstore.open(dump())
    rows = [{"id": f"row-{i}", "text": text} for i, text in enumerate(make_texts(60))]
    fewer = kdstore.open(dump("fewer", data=write_jsonl(tmp_path / "fewer.jsonl", rows[:50])))
    with pytest.raises(StoreMismatchError, match=r"has not seen[\s\S]*'row-55'"):
        kdstore.Join(main, {"fewer": fewer})[55]
    assert len(list(kdstore.Join(fewer, {"main": main}))) == 50
    changed = [
        {**row, "text": row["text"] + " and"} if n == 7 else row for n, row in enumerate(rows)
    ]
    other = kdstore.open(dump("changed", data=write_jsonl(tmp_path / "changed.jsonl", changed)))
    joined = kdstore.Join(main, {"changed": other})
    joined[6]
    with pytest.raises(StoreMismatchError, match=r"another text[\s\S]*'row-7'"):
        joined[7]


def test_another_vocabulary_is_refused(dump: Dump) -> None:
    main, path = kdstore.open(dump()), dump("other")
    header = json.loads((path / "kdstore.json").read_text())
    other = kdstore.open(path)
    other.header.identity["vocab_digest"] = header["identity"]["vocab_digest"][::-1]
    with pytest.raises(StoreMismatchError, match="different vocabularies"):
        kdstore.Join(main, {"other": other})
