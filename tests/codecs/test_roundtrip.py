"""Select, encode, decode: ids exact, values within their grid, sums of one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdstore.codecs import IdOrder, Positions, codec_for
from kdstore.codecs.base import SignalCodec
from kdstore.codecs.order import Successors
from kdstore.codecs.planes import Memory
from kdstore.codecs.ranked import FLOOR, VALUE_STEPS
from kdstore.errors import CorruptShardError, SignalError
from kdstore.hashing import RowKeys
from kdstore.signal import SparseSignal
from tests.select.dense import SPECS, hard_rows, keys_for, select_rows

VOCABS = (257, 32_000, 131_073, 151_936, 262_144)
SCALARS = ("label_logprob", "label_rank", "entropy", "lse")


def order_of(vocab_size: int) -> IdOrder:
    """Any order, with successors after the tokens 0 to 9."""
    random = np.random.default_rng(0)
    following = [random.permutation(vocab_size)[: vocab_size // 8] for _ in range(10)]
    lengths = [len(ids) for ids in following] + [0] * (vocab_size - 10)
    successors = Successors(
        np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(following).astype(np.int32)
    )
    return IdOrder.from_counts(random.integers(0, 40, vocab_size), successors)


def positions_of(
    num: int, *, splits: list[int] | None = None, keys: RowKeys | None = None
) -> Positions:
    """Positions after the tokens 0 to 11 in turn, two of which nothing was seen to follow."""
    previous = (np.arange(num) % 12).astype(np.int32)
    return Positions(keys or keys_for(num), np.array(splits or [0, num]), previous)


def round_trip(signal: SparseSignal, codec: SignalCodec) -> SparseSignal:
    positions = positions_of(len(signal), splits=[0, len(signal) // 2, len(signal)])
    planes = codec.encode(signal, positions)
    assert set(planes) == set(codec.planes)
    assert all(plane.offsets[-1] == len(plane.data) for plane in planes.values())
    return codec.decode(planes, positions.previous_S)


def check_against(signal: SparseSignal, decoded: SparseSignal, name: str) -> None:
    total = decoded.kept_mass_S + np.exp(decoded.rest_S.astype(np.float64))
    np.testing.assert_allclose(total, 1, atol=1e-6, err_msg=name)
    assert np.isfinite(decoded.logprobs_N).all(), name
    kept = ids_that_must_survive(signal, decoded)
    np.testing.assert_array_equal(decoded.ids_N, signal.ids_N[kept], err_msg=name)
    assert (np.diff(decoded.rows_N * (1 << 18) + decoded.ids_N) > 0).all(), name


def ids_that_must_survive(signal: SparseSignal, decoded: SparseSignal) -> np.ndarray:
    """All but lone tail tokens, and heads below half of tau, that were rounded to nothing."""
    if signal.tail_N is None:
        return np.ones(signal.num_entries, dtype=bool)
    tau = float(signal.selection.partition("=")[2])
    width = 1 << 18
    found = np.isin(signal.rows_N * width + signal.ids_N, decoded.rows_N * width + decoded.ids_N)
    lone = signal.tail_N & (signal.tail_counts_S == 1)[signal.rows_N]
    light = np.exp(signal.logprobs_N) < np.where(lone, tau / 3, tau / 2) + 1e-6
    assert (found | ((lone | ~signal.tail_N) & light)).all()
    return found


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("spec", SPECS)
def test_hard_rows_survive(spec: str, vocab_size: int) -> None:
    order = order_of(vocab_size)
    for name, logits in hard_rows(vocab_size).items():
        signal = select_rows(logits, spec, scalars=SCALARS)
        codec = codec_for(signal.selection, order=order, scalars=SCALARS)
        check_against(signal, round_trip(signal, codec), name)


@given(st.integers(0, 10_000), st.floats(0.1, 12), st.sampled_from(SPECS), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_any_row_survives(seed: int, scale: float, spec: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 500, generator=generator) * scale
    signal = select_rows(logits, spec, scalars=SCALARS, seed=seed)
    codec = codec_for(signal.selection, order=order_of(500), scalars=SCALARS)
    check_against(signal, round_trip(signal, codec), f"{seed} {scale}")


@pytest.mark.parametrize("spec", ["topk:k=50", "topp:p=0.95"])
def test_ranked_values_are_within_half_a_step_before_scaling(spec: str) -> None:
    signal = select_rows(torch.randn(200, 2000) * 3, spec)
    codec = codec_for(signal.selection, order=order_of(2000), scalars=())
    decoded = round_trip(signal, codec)
    roots = np.sqrt(np.exp(signal.logprobs_N.astype(np.float64)))
    nearest = np.rint(roots * VALUE_STEPS)
    stored = np.where(nearest == 0, FLOOR, (nearest / VALUE_STEPS) ** 2)
    kept = -np.expm1(decoded.rest_S.astype(np.float64))
    total = np.bincount(signal.rows_N, weights=stored)
    want = stored * (kept / total)[signal.rows_N]
    np.testing.assert_allclose(np.exp(decoded.logprobs_N), want, rtol=1e-5)
    np.testing.assert_allclose(kept / total, 1, atol=0.05)


def test_pps_heads_are_within_one_step_of_the_grid() -> None:
    tau = 0.06
    signal = select_rows(torch.randn(400, 2000) * 4, f"pps:tau={tau}")
    decoded = round_trip(signal, codec_for(signal.selection, order=order_of(2000), scalars=()))
    kept = ids_that_must_survive(signal, decoded)
    assert decoded.tail_N is not None
    before, after = np.exp(signal.logprobs_N[kept]), np.exp(decoded.logprobs_N)
    largest = np.zeros(len(signal))
    np.maximum.at(largest, signal.rows_N, np.exp(signal.logprobs_N))
    is_largest = (before == largest[signal.rows_N[kept]]) & ~decoded.tail_N
    others = ~is_largest & ~decoded.tail_N
    assert others.sum() > 300
    assert np.abs(after - before)[others].max() <= tau / 2
    np.testing.assert_allclose(after[others] / (tau / 2) % 1 % 0.99999, 0, atol=1e-4)
    assert np.abs(after - before)[is_largest].max() <= tau / 2 + tau / 3
    assert np.abs(after - before)[decoded.tail_N].max() <= tau / 3


def test_pps_positions_that_rounding_could_empty_are_exact() -> None:
    """Eight equal heads and a tail too heavy for its grid: nothing may be rounded."""
    heads = [0.1] * 8
    signal = SparseSignal.from_arrays(
        "pps:tau=0.06", [0, 9], range(9), np.log([*heads, 0.2]), tail_N=[False] * 8 + [True]
    )
    codec = codec_for(signal.selection, order=order_of(300), scalars=())
    planes = codec.encode(signal, positions_of(1))
    assert planes["counts"].data.tolist() == [0]
    assert planes["more"].data.tolist() == [8, 0, 1, 0]
    np.testing.assert_allclose(round_trip(signal, codec).logprobs_N, signal.logprobs_N, atol=1e-5)


def test_full_is_float16_of_the_log_probability() -> None:
    logits = torch.randn(20, 300) * 3
    logits[:, 7] = -torch.inf
    signal = select_rows(logits, "full")
    decoded = round_trip(signal, codec_for("full", order=order_of(300), scalars=()))
    assert 7 not in decoded.ids_N
    np.testing.assert_allclose(decoded.logprobs_N, signal.logprobs_N, rtol=2**-10)


def test_counts_are_exact() -> None:
    signal = select_rows(torch.randn(30, 500), "counts:n=300")
    decoded = round_trip(signal, codec_for("counts:n=300", order=order_of(500), scalars=()))
    np.testing.assert_array_equal(decoded.counts_N, signal.counts_N)


def test_scalars_keep_their_error_bounds_and_have_no_bias() -> None:
    logits = torch.randn(20_000, 40) * torch.linspace(0.5, 8, 20_000)[:, None]
    signal = select_rows(logits, "topk:k=1", scalars=("label_logprob", "label_rank", "entropy"))
    codec = codec_for("topk:k=1", order=order_of(40), scalars=tuple(signal.scalars))
    decoded = round_trip(signal, codec)
    error = {name: decoded.scalars[name] - signal.scalars[name] for name in signal.scalars}
    assert np.abs(error["label_logprob"]).max() <= 1 / 64 + 1e-4
    assert np.abs(error["entropy"]).max() <= 0.02
    assert (error["label_rank"] == 0).all()
    for name in ("label_logprob", "entropy"):
        assert abs(error[name].mean()) < 4 * (1 / 64 / np.sqrt(12 * 20_000)) + 1e-4


def test_ranks_are_exact_to_255_and_within_five_percent_beyond() -> None:
    ranks = np.unique(np.geomspace(1, 262_144, 5000).astype(np.int64))
    signal = SparseSignal.from_arrays(
        "topk:k=1",
        np.arange(len(ranks) + 1),
        np.zeros(len(ranks)),
        np.zeros(len(ranks)),
        scalars={"label_rank": ranks},
    )
    codec = codec_for("topk:k=1", order=order_of(10), scalars=("label_rank",))
    got = round_trip(signal, codec).scalars["label_rank"]
    np.testing.assert_array_equal(got[ranks <= 255], ranks[ranks <= 255])
    np.testing.assert_allclose(got, ranks, rtol=0.05)
    assert abs((got / ranks - 1).mean()) < 1e-3


def test_a_label_without_probability_stays_so() -> None:
    signal = SparseSignal.from_arrays(
        "topk:k=1", [0, 1], [0], [0.0], scalars={"label_logprob": [-np.inf]}
    )
    codec = codec_for("topk:k=1", order=order_of(10), scalars=("label_logprob",))
    assert round_trip(signal, codec).scalars["label_logprob"].tolist() == [-np.inf]


@pytest.mark.parametrize("spec", SPECS)
def test_ids_beyond_the_logits_are_refused_never_masked(spec: str) -> None:
    signal = select_rows(torch.arange(1 << 17)[None] / 1e3, spec)
    codec = codec_for(signal.selection, order=order_of(1000), scalars=())
    with pytest.raises((SignalError, IndexError)):
        round_trip(signal, codec)


@pytest.mark.parametrize("spec", SPECS)
def test_truncated_planes_are_corrupt_not_garbage(spec: str) -> None:
    signal = select_rows(torch.randn(8, 1000) * 3, spec)
    codec = codec_for(signal.selection, order=order_of(1000), scalars=())
    positions = positions_of(8)
    planes = codec.encode(signal, positions)
    for name, plane in planes.items():
        if len(plane.data) < 2:
            continue
        cut = {**planes, name: type(plane)(plane.data[:-1], plane.offsets)}
        with pytest.raises(CorruptShardError):
            codec.decode(cut, positions.previous_S)


def test_the_same_signal_gives_the_same_bytes_in_any_batch() -> None:
    signal = select_rows(torch.randn(30, 800) * 3, "pps:tau=0.06")
    codec = codec_for(signal.selection, order=order_of(800), scalars=tuple(signal.scalars))
    keys, previous = keys_for(30), np.arange(30, dtype=np.int32) % 12
    whole = codec.encode(signal, Positions(keys, np.array([0, 10, 30]), previous))
    part = codec.encode(signal[10:], Positions(keys[10:], np.array([0, 20]), previous[10:]))
    for name in codec.planes:
        assert whole[name].cell(1) == part[name].cell(0), name


@pytest.mark.parametrize(
    ("ids", "logprobs", "tail", "words"),
    [
        ([3, 3], [0.5, 0.5], [False, True], "ascending"),
        ([5, 3], [0.5, 0.5], [False, True], "ascending"),
        ([3, 5], [0.5, 0.2], [False, True], "sum to one"),
        ([3, 5, 7], [0.5, 0.2, 0.3], [False, True, True], "one weight"),
        ([3, 5], [0.5, np.nan], [False, True], "log-probability"),
        ([3, 5], [1.5, 0.1], [False, True], "log-probability"),
    ],
)
def test_signals_that_contradict_themselves_are_refused(
    ids: list[int], logprobs: list[float], tail: list[bool], words: str
) -> None:
    signal = SparseSignal.from_arrays(
        "pps:tau=0.5", [0, len(ids)], ids, np.log(logprobs), tail_N=tail
    )
    codec = codec_for("pps:tau=0.5", order=order_of(10), scalars=())
    with pytest.raises(SignalError, match=words):
        codec.encode(signal, positions_of(1))


def test_an_id_stored_twice_in_a_position_is_corrupt() -> None:
    """Head and tail are separate runs, so only decoding can see that they name the same token."""
    signal = SparseSignal.from_arrays(
        "pps:tau=0.5", [0, 2], [3, 5], np.log([0.6, 0.4]), tail_N=[False, True]
    )
    codec = codec_for("pps:tau=0.5", order=IdOrder.identity(10), scalars=())
    positions = positions_of(1)
    planes = codec.encode(signal, positions)
    twice = {**planes, "tail": planes["top"]}
    with pytest.raises(CorruptShardError, match="twice"):
        codec.decode(twice, positions.previous_S)


@pytest.mark.parametrize("spec", ["pps:tau=0.06", "counts:n=50", "topk:k=5"])
def test_memory_that_is_used_again(spec: str) -> None:
    memory = Memory()
    arrays = []
    for rows in (3, 40, 2):
        signal = select_rows(torch.randn(rows, 300), spec)
        codec = codec_for(signal.selection, order=order_of(300), scalars=())
        planes, previous = codec.encode(signal, positions_of(rows)), positions_of(rows).previous_S
        fresh, reused = (
            codec.decode(planes, previous),
            codec.decode(planes, previous, memory=memory),
        )
        for name in ("indptr", "ids_N", "logprobs_N", "rest_S", "counts_N", "tail_N"):
            if (expected := getattr(fresh, name)) is not None:
                np.testing.assert_array_equal(getattr(reused, name), expected)
        arrays.append(reused.ids_N)
    assert np.shares_memory(arrays[1], arrays[2])
    assert not np.shares_memory(arrays[0], arrays[1])  # it had to grow
