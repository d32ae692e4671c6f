"""The same logits on a CPU and on a GPU; skipped where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdstore.select import parse_selection, select
from kdstore.signal import SparseSignal
from tests.select.dense import keys_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("label_logprob", "label_rank", "entropy", "lse", "lse_T2.0")


def signal_on(device: str, spec: str, vocab_size: int, rows: slice) -> SparseSignal:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(64, vocab_size, generator=generator) * 3).bfloat16()
    return select(
        logits[rows].to(device),
        torch.arange(64)[rows].to(device),
        selection=parse_selection(spec),
        keys=keys_for(64)[rows],
        scalars=NAMES,
        num_ids=vocab_size - 3,
    )


@pytest.mark.parametrize("vocab_size", [1000, 50_257, 151_936])
@pytest.mark.parametrize("spec", ["topk:k=50", "topp:p=0.9", "full", "pps:tau=0.06", "counts:n=50"])
def test_a_gpu_selects_what_a_cpu_selects(spec: str, vocab_size: int) -> None:
    """Up to draws that fall within float32's last bits of an edge; topk has none."""
    cpu, gpu = (signal_on(device, spec, vocab_size, slice(0, 64)) for device in ("cpu", "cuda"))
    alike = cpu.to_dense(vocab_size), gpu.to_dense(vocab_size)
    different = ((alike[0] > 0) != (alike[1] > 0)).sum()
    assert different <= (0 if spec.startswith(("topk", "full")) else cpu.num_entries / 1000 + 1)
    same = ((alike[0] > 0) == (alike[1] > 0)).all(1)
    np.testing.assert_allclose(alike[1][same], alike[0][same], rtol=1e-5)
    np.testing.assert_allclose(gpu.rest_S[same], cpu.rest_S[same], atol=1e-5)
    for name in NAMES:
        np.testing.assert_allclose(gpu.scalars[name], cpu.scalars[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [1000, 50_257])
@pytest.mark.parametrize("spec", ["topk:k=50", "topp:p=0.9", "pps:tau=0.06", "counts:n=50"])
def test_a_position_is_the_same_in_any_batch_on_a_gpu(spec: str, vocab_size: int) -> None:
    whole = signal_on("cuda", spec, vocab_size, slice(0, 64))
    for rows in (slice(0, 1), slice(3, 10), slice(63, 64)):
        part = signal_on("cuda", spec, vocab_size, rows)
        np.testing.assert_array_equal(part.ids_N, whole[rows].ids_N)
