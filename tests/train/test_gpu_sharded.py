"""On GPUs: fused losses against whole logits, and Trainer with FSDP2 and ZeRO-3 against plain.

Not run where there is no GPU. With one, sharding is over one rank: it is the hooks that count.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from kdstore.train.head import DistillHead
from kdstore.train.objective import Objective
from tests.train.dense_losses import ALL
from tests.train.launch import run_on_ranks
from tests.train.test_distill_head import fused, make_batch, make_model, plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_fused_losses(name, dtype):
    batch, objective = make_batch().to("cuda"), Objective({name: ALL[name] or 1.0})
    exact = make_model("softcap", dtype).double().cuda()
    expected = plain(exact, batch, objective)
    model = make_model("softcap", dtype).cuda()
    DistillHead.attach(model, chunk_tokens=5)
    total, _, grads = fused(model, batch, objective)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert total.item() == pytest.approx(expected[0].item(), rel=tolerance, abs=tolerance)
    for key, grad in grads.items():
        error = (grad.double() - expected[2][key]).norm()
        assert error <= tolerance * expected[2][key].norm() + 1e-3, key


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_sharded_trainer_equals_plain(tmp_path, kind):
    if kind == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    ranks = 2 if torch.cuda.device_count() > 1 else 1
    for one in ("plain", kind):
        run_on_ranks("gpu_worker.py", str(tmp_path), one, ranks=ranks)
    found = load_file(tmp_path / kind / "model.safetensors")
    for name, expected in load_file(tmp_path / "plain" / "model.safetensors").items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
