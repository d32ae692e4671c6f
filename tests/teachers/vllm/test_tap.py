"""The tap without an engine: whatever the steps, its answers are those of ``select``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdstore.audit import AUDIT_SELECTION
from kdstore.hashing import RowKeys, sample_hash
from kdstore.select import parse_selection, select_with_audit
from kdstore.signal import SparseSignal
from kdstore.teachers.vllm import tap as tap_module
from kdstore.teachers.vllm.packing import unpack
from kdstore.teachers.vllm.request import OPEN_END, TapRequest, TapRule
from kdstore.teachers.vllm.shards import HeadShard
from kdstore.teachers.vllm.tap import Computed, Tap
from tests.teachers.vllm.helpers import assert_same_signal

V = 96
SCALARS = ("label_logprob", "label_rank", "entropy")


def head(hidden):
    """No matrix product, whose last bits depend on the rows that share it."""
    return 2 * hidden


def rule(selection="pps:tau=0.02", **changes) -> TapRule:
    options = {"scalars": SCALARS, "seed": 7, "draw": 0, "audit_fraction": 0.2, "num_ids": 90}
    return TapRule(selection=selection, **(options | changes))


class Text:
    """A sequence, its hidden states, and what is asked of it."""

    def __init__(self, key: int, length: int, runs, **rule_changes) -> None:
        generator = torch.Generator().manual_seed(key)
        self.hidden_TD = torch.randn(length, V, generator=generator)
        self.ids_T = torch.randint(0, 90, (length,), generator=generator)
        self.request = TapRequest(
            key=key, rule=rule(**rule_changes), sample_hash=sample_hash(f"s{key}"), runs=runs
        )

    def computed(self, first: int, count: int, offset: int) -> Computed:
        return Computed(self.request, first, count, offset, lambda at: self.ids_T[at])

    def expected(self) -> tuple[np.ndarray, SparseSignal, SparseSignal]:
        positions = self.request.positions_in(1, len(self.ids_T))
        asked = self.request.rule
        hashes = np.full(len(positions), self.request.sample_hash, np.uint64)
        signal, audit = select_with_audit(
            head(self.hidden_TD[positions - 1]),
            self.ids_T[positions],
            selection=parse_selection(asked.selection),
            keys=RowKeys(asked.seed, hashes, positions, asked.draw),
            audit_fraction=asked.audit_fraction,
            scalars=asked.scalars,
            num_ids=asked.num_ids,
        )
        return positions, signal, audit


def run(tap: Tap, steps: list[list[tuple[Text, int, int]]]) -> None:
    """Steps of (text, first row, rows), their hidden states one after the other."""
    for step in steps:
        hidden = torch.cat([text.hidden_TD[first : first + count] for text, first, count in step])
        offsets = np.cumsum([0, *(count for _, _, count in step)])
        tap.step(
            hidden,
            [
                text.computed(first, count, int(offset))
                for (text, first, count), offset in zip(step, offsets, strict=False)
            ],
        )


def taken(tap: Tap, texts: list[Text]):
    selection = texts[0].request.rule.selection
    keys = [text.request.key for text in texts]
    return unpack(tap.take(keys), selection=selection, audit=AUDIT_SELECTION)


def assert_answers(tap: Tap, texts: list[Text]) -> None:
    answers, tally = taken(tap, texts)
    assert not tally.error
    assert len(answers) == len(texts)
    for text, answer in zip(texts, answers, strict=True):
        positions, signal, audit = text.expected()
        np.testing.assert_array_equal(answer.positions_S, positions)
        assert_same_signal(answer.signal, signal)
        assert_same_signal(answer.audit, audit)


@pytest.fixture
def tap() -> Tap:
    return Tap(head, vocab_size=V)


@pytest.mark.parametrize(
    "selection", ["pps:tau=0.02", "topk:k=5", "topp:p=0.9,max_k=20", "counts:n=8", "full"]
)
def test_steps_and_neighbours_change_nothing(tap, selection, monkeypatch):
    """Chunked prefill, mixed lengths, several runs, small chunks: draw for draw the same."""
    monkeypatch.setattr(tap_module, "head_rows", lambda *_: 7)
    a = Text(1, 40, ((1, 40),), selection=selection)
    b = Text(2, 23, ((5, 9), (11, 23)), selection=selection)
    c = Text(3, 2, ((1, 2),), selection=selection)
    run(tap, [[(a, 0, 13), (b, 0, 23)], [(a, 13, 1)], [(c, 0, 2), (a, 14, 26)]])
    assert_answers(tap, [c, a, b])


def test_rows_that_come_again_are_scored_once(tap):
    """A preempted request begins anew, perhaps in other steps."""
    text = Text(1, 30, ((3, 30),))
    run(tap, [[(text, 0, 20)], [(text, 0, 5)], [(text, 5, 25)]])
    assert_answers(tap, [text])


def test_generated_tokens_are_scored_where_the_last_run_is_open(tap):
    text = Text(1, 20, ((8, OPEN_END),))
    run(tap, [[(text, 0, 10)], *[[(text, row, 1)] for row in range(10, 19)]])
    answers, _ = taken(tap, [text])
    np.testing.assert_array_equal(answers[0].positions_S, np.arange(8, 20))
    assert_same_signal(answers[0].signal, text.expected()[1])


def test_requests_of_different_rules_share_a_step(tap):
    a, b = Text(1, 12, ((1, 12),), seed=1), Text(2, 12, ((1, 12),), seed=2, draw=3)
    run(tap, [[(a, 0, 12), (b, 0, 12)]])
    assert_answers(tap, [a])
    assert_answers(tap, [b])


def test_what_was_taken_is_forgotten(tap):
    text = Text(1, 12, ((1, 12),))
    run(tap, [[(text, 0, 12)]])
    assert_answers(tap, [text])
    answers, tally = taken(tap, [text])
    assert (len(answers[0].positions_S), tally.num_positions) == (0, 0)
    run(tap, [[(text, 0, 12)]])
    assert_answers(tap, [text])


def test_rows_of_a_cached_prefix_are_missing_not_wrong(tap):
    text = Text(1, 30, ((3, 30),))
    run(tap, [[(text, 16, 14)]])
    answers, _ = taken(tap, [text])
    np.testing.assert_array_equal(answers[0].positions_S, np.arange(17, 30))


def test_a_rank_without_logits_runs_the_head_as_often(monkeypatch):
    monkeypatch.setattr(tap_module, "head_rows", lambda *_: 4)
    calls: list[int] = []
    tap = Tap(lambda hidden: calls.append(len(hidden)), vocab_size=V)
    text = Text(1, 12, ((1, 12),))
    run(tap, [[(text, 0, 12)]])
    answers, tally = taken(tap, [text])
    assert calls == [4, 4, 3]
    assert (len(answers[0].positions_S), tally.error) == (0, "")


def test_an_error_is_kept_for_whoever_asks_and_ranks_stay_in_step(monkeypatch):
    monkeypatch.setattr(tap_module, "head_rows", lambda *_: 4)
    calls: list[int] = []

    def broken(hidden):
        calls.append(len(hidden))
        return head(hidden) * (torch.nan if len(calls) == 2 else 1)

    tap = Tap(broken, vocab_size=V)
    text = Text(1, 12, ((1, 12),))
    run(tap, [[(text, 0, 12)]])
    _, tally = taken(tap, [text])
    assert calls == [4, 4, 3]
    assert "position 5" in tally.error
    assert "no NaN" in tally.error
    run(tap, [[(text, 0, 12)]])
    assert_answers(tap, [text])


def test_topk_comes_from_shards_of_the_head(monkeypatch):
    """One shard here; an error is kept, and the ranks' calls go on."""
    monkeypatch.setattr(tap_module, "head_rows", lambda *_: 4)
    calls: list[int] = []

    def gather(mine):
        calls.append(len(mine))
        return mine[None] * (torch.nan if len(calls) == 3 else 1)

    shard = HeadShard(head, 0, gather)
    tap = Tap(lambda hidden: pytest.fail("all logits"), vocab_size=V, shard=shard)
    text = Text(1, 12, ((1, 12),), selection="topk:k=5", audit_fraction=0.0)
    run(tap, [[(text, 0, 12)]])
    assert "position 5" in taken(tap, [text])[1].error
    assert calls == [4, 4, 4, 4, 3, 3]
    run(tap, [[(text, 0, 12)]])
    answers, tally = taken(tap, [text])
    positions, expected, _ = text.expected()
    np.testing.assert_array_equal(answers[0].positions_S, positions)
    np.testing.assert_array_equal(answers[0].signal.ids_N, expected.ids_N)
    np.testing.assert_allclose(answers[0].signal.logprobs_N, expected.logprobs_N, rtol=1e-6)
    assert (tally.num_positions, len(answers[0].audit)) == (11, 0)


def test_logits_of_another_width_are_an_error():
    tap = Tap(head, vocab_size=V + 1)
    text = Text(1, 5, ((1, 5),))
    run(tap, [[(text, 0, 5)]])
    assert f"vocab_size {V + 1}" in taken(tap, [text])[1].error


def test_padding_mass_and_positions_are_counted(tap):
    text = Text(1, 12, ((1, 12),))
    run(tap, [[(text, 0, 12)]])
    _, tally = taken(tap, [text])
    mass = head(text.hidden_TD[:11]).double().softmax(-1)[:, 90:].sum()
    assert tally.num_positions == 11
    assert tally.padding_mass == pytest.approx(mass.item(), rel=1e-5)


def test_a_request_survives_the_engines_transport():
    msgspec = pytest.importorskip("msgspec")
    request = Text(1, 5, ((1, 3), (4, OPEN_END))).request
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(request.to_extra_args()))
    assert TapRequest.of_extra_args(sent) == request
    assert TapRequest.of_extra_args({"other": 1}) is None
    assert TapRequest.of_extra_args(None) is None
