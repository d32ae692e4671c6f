"""Attention of packed samples: ``varlen_sdpa`` next to transformers' ``sdpa``.

Forward and backward of a small Llama's body on one packed row, in turns, in one process. ``sdpa``
keeps samples apart by a mask of the row's length squared. Both give the same hidden states, which
is checked.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks.figures import machine, print_figure
from kdstore.train.attention import VARLEN_SDPA, register_varlen_sdpa

ATTENTIONS = ("sdpa", VARLEN_SDPA)


def make_model(attention: str, device: str) -> LlamaModel:
    """Four layers, 512 wide, of the same weights whatever the attention."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return LlamaModel(config).to(device)


def packed_row(tokens: int, longest: int, device: str) -> dict[str, torch.Tensor | bool]:
    """Samples of a half to the whole of ``longest`` tokens, one after the other."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        length = int(torch.randint(longest // 2, longest + 1, (1,), generator=generator))
        lengths.append(min(length, left))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.randint(32_000, (1, tokens), generator=generator)
    return {"input_ids": ids.to(device), "position_ids": positions.to(device), "use_cache": False}


def step(model: LlamaModel, inputs: dict[str, torch.Tensor | bool]) -> tuple[float, torch.Tensor]:
    """Seconds of forward and backward, and the hidden states."""
    began = time.perf_counter()
    hidden: torch.Tensor = model(**inputs).last_hidden_state
    hidden.square().mean().backward()  # type: ignore[no-untyped-call]
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, hidden.detach()


def compare(tokens: int, longest: int, *, rounds: int, device: str) -> None:
    """Print the time of each, and the ratio."""
    models = {name: make_model(name, device) for name in ATTENTIONS}
    inputs = packed_row(tokens, longest, device)
    first = {name: step(model, inputs)[1] for name, model in models.items()}
    torch.testing.assert_close(first["sdpa"], first[VARLEN_SDPA], rtol=1e-3, atol=1e-3)
    seconds = [
        {name: step(model, inputs)[0] for name, model in models.items()} for _ in range(rounds)
    ]
    more = {"tokens": tokens, "longest": longest, "device": device, "machine": machine()}
    for name in ATTENTIONS:
        median = statistics.median(one[name] for one in seconds)
        print_figure(f"attention.{name}.seconds", round(median, 3), "s", **more)
    ratio = statistics.median(one[VARLEN_SDPA] / one["sdpa"] for one in seconds)
    print_figure("attention.varlen_over_sdpa", round(ratio, 3), "ratio", **more)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    register_varlen_sdpa()
    rounds = 3 if options.quick else 7
    for tokens in (2048,) if options.quick else (2048, 8192):
        for longest in (256, 1024):
            compare(tokens, longest, rounds=rounds, device=options.device)


if __name__ == "__main__":
    main()
