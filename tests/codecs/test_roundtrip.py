"""Select, encode, decode: ids exact, values within their grid, sums of one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdstore.codecs import IdOrder, codec_for
from kdstore.codecs.base import SignalCodec
from kdstore.codecs.grid import PROBABILITY_STEPS, cube_root_grid, probability_grid
from kdstore.codecs.pps import EXACT
from kdstore.codecs.ranked import FLOOR
from kdstore.errors import CorruptShardError, SignalError
from kdstore.hashing import RowKeys
from kdstore.signal import SparseSignal
from tests.select.dense import SPECS, hard_rows, keys_for, logits_of, select_rows

VOCABS = (257, 32_000, 131_073, 151_936, 262_144)
SCALARS = ("label_logprob", "label_rank", "entropy", "lse")


def order_of(vocab_size: int) -> IdOrder:
    return IdOrder.from_counts(np.random.default_rng(0).integers(0, 40, vocab_size))


def round_trip(
    signal: SparseSignal, codec: SignalCodec, keys: RowKeys | None = None
) -> SparseSignal:
    splits = np.array([0, len(signal) // 2, len(signal)])
    planes = codec.encode(signal, keys or keys_for(len(signal)), splits)
    assert set(planes) == set(codec.planes)
    assert all(plane.offsets[-1] == len(plane.data) for plane in planes.values())
    return codec.decode(planes, len(signal))


def check_against(signal: SparseSignal, decoded: SparseSignal, name: str) -> None:
    total = decoded.kept_mass_S + np.exp(decoded.rest_S.astype(np.float64))
    np.testing.assert_allclose(total, 1, atol=1e-6, err_msg=name)
    assert np.isfinite(decoded.logprobs_N).all(), name
    kept = ids_that_must_survive(signal, decoded)
    np.testing.assert_array_equal(decoded.ids_N, signal.ids_N[kept], err_msg=name)
    assert (np.diff(decoded.rows_N * (1 << 18) + decoded.ids_N) > 0).all(), name


def ids_that_must_survive(signal: SparseSignal, decoded: SparseSignal) -> np.ndarray:
    """All but the tail of positions whose tail weight was rounded to nothing."""
    if signal.tail_N is None:
        return np.ones(signal.num_entries, dtype=bool)
    dropped = (decoded.tail_counts_S == 0) & (signal.tail_counts_S > 0)
    weight = np.full(len(signal), np.inf)
    weight[signal.rows_N[signal.tail_N]] = np.exp(signal.logprobs_N[signal.tail_N])
    assert (weight[dropped] < probability_grid().levels[1]).all()
    return ~(signal.tail_N & dropped[signal.rows_N])


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
    roots = np.cbrt(np.exp(signal.logprobs_N.astype(np.float64)))
    nearest = cube_root_grid().nearest(roots) / PROBABILITY_STEPS
    stored = np.where(nearest == 0, FLOOR, nearest**3)
    assert np.abs(np.cbrt(stored) - roots).max() <= 0.5 / PROBABILITY_STEPS + 1e-9
    kept = -np.expm1(decoded.rest_S.astype(np.float64))
    total = np.bincount(signal.rows_N, weights=stored)
    want = stored * (kept / total)[signal.rows_N]
    np.testing.assert_allclose(np.exp(decoded.logprobs_N), want, rtol=1e-5)
    np.testing.assert_allclose(kept / total, 1, atol=0.05)


def test_pps_heads_are_within_one_step_of_the_grid() -> None:
    signal = select_rows(torch.randn(400, 2000) * 4, "pps:tau=0.06")
    decoded = round_trip(signal, codec_for(signal.selection, order=order_of(2000), scalars=()))
    kept = ids_that_must_survive(signal, decoded)
    assert decoded.tail_N is not None
    before, after = np.exp(signal.logprobs_N[kept]), np.exp(decoded.logprobs_N)
    largest = np.zeros(len(signal))
    np.maximum.at(largest, signal.rows_N, np.exp(signal.logprobs_N))
    grid = probability_grid()
    low = grid.below(before.astype(np.float64))
    inside = (after >= grid.levels[low] - 1e-6) & (after <= grid.levels[low + 1] + 1e-6)
    is_largest = (before == largest[signal.rows_N[kept]]) & ~decoded.tail_N
    assert inside[~is_largest].all()
    assert (~is_largest).sum() > 500


def test_pps_positions_that_rounding_could_empty_are_exact() -> None:
    """24 equal heads lie just above a level: rounding all up would leave the largest nothing."""
    signal = select_rows(logits_of([1 / 24] * 24, 300).repeat(50, 1), "pps:tau=0.04")
    codec = codec_for(signal.selection, order=order_of(300), scalars=())
    assert (codec.encode(signal, keys_for(50), np.array([0, 50]))["weight"].data == EXACT).all()
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
    planes = codec.encode(signal, keys_for(8), np.array([0, 8]))
    for name, plane in planes.items():
        if len(plane.data) < 2:
            continue
        cut = {**planes, name: type(plane)(plane.data[:-1], plane.offsets)}
        with pytest.raises(CorruptShardError):
            codec.decode(cut, 8)


def test_the_same_signal_gives_the_same_bytes_in_any_batch() -> None:
    signal = select_rows(torch.randn(30, 800) * 3, "pps:tau=0.06")
    codec = codec_for(signal.selection, order=order_of(800), scalars=tuple(signal.scalars))
    keys = keys_for(30)
    whole = codec.encode(signal, keys, np.array([0, 10, 30]))
    part = codec.encode(signal[10:], keys[10:], np.array([0, 20]))
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
        codec.encode(signal, keys_for(1), np.array([0, 1]))


def test_an_id_stored_twice_in_a_position_is_corrupt() -> None:
    """Head and tail are separate runs, so only decoding can see that they name the same token."""
    signal = SparseSignal.from_arrays(
        "pps:tau=0.5", [0, 2], [3, 5], np.log([0.6, 0.4]), tail_N=[False, True]
    )
    codec = codec_for("pps:tau=0.5", order=IdOrder.identity(10), scalars=())
    planes = codec.encode(signal, keys_for(1), np.array([0, 1]))
    gaps = planes["gap0"]
    twice = {**planes, "gap0": type(gaps)(np.array([3, 3], np.uint8), gaps.offsets)}
    with pytest.raises(CorruptShardError, match="twice"):
        codec.decode(twice, 1)
