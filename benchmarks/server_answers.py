"""What a server's answer costs to read: bytes of JSON an entry, and CPU time a token, by flavour.

The answers are made up in the shapes of vLLM 0.32 and SGLang 0.5. The server's own time to write
them is not in here.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from kdstore.sample import Sample
from kdstore.teachers.openai_answers import FLAVOURS
from kdstore.teachers.top_logprobs import signal_of

TOKENS, VOCAB, REPEATS = 1024, 128_000, 5


def vllm_answer(tops: list[list[tuple[int, float]]], ids: list[int]) -> dict[str, Any]:
    """Every position but the first, with the text of tokens as vLLM has it."""
    rows: list[dict[str, Any] | None] = [None]
    for top, token in zip(tops, ids[1:], strict=True):
        row = {str(token): {"logprob": -14.123456954956055, "rank": 999, "decoded_token": " token"}}
        for rank, (other, logprob) in enumerate(top, 1):
            row[str(other)] = {"logprob": logprob, "rank": rank, "decoded_token": " token"}
        rows.append(row)
    return {"choices": [{"prompt_logprobs": rows}], "usage": {"prompt_tokens": len(ids)}}


def sglang_answer(tops: list[list[tuple[int, float]]], ids: list[int]) -> dict[str, Any]:
    """Every position, the first without logprobs."""
    own = [[None, ids[0], None], *([-14.123456954956055, token, None] for token in ids[1:])]
    pairs = [None, *([[logprob, token, None] for token, logprob in top] for top in tops)]
    meta = {"prompt_tokens": len(ids), "input_token_logprobs": own, "input_top_logprobs": pairs}
    return {"meta_info": meta}


def main() -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(VOCAB // 2, VOCAB - 1, TOKENS, dtype=np.int32)
    sample = Sample("sample", ids, runs=((1, TOKENS),))
    for k in (20, 50):
        probabilities = generator.dirichlet(np.full(k + 1, 0.3), TOKENS - 1)[:, :k]
        logprobs = np.log(np.maximum(probabilities, 1e-30)).astype(np.float32).astype(np.float64)
        tokens = [generator.choice(VOCAB // 2, k, replace=False).tolist() for _ in logprobs]
        tops = [
            list(zip(*pair, strict=True)) for pair in zip(tokens, logprobs.tolist(), strict=True)
        ]
        for name, made in (("vllm", vllm_answer), ("sglang", sglang_answer)):
            text = json.dumps(made(tops, ids.tolist()))
            best_s = min(read_s(name, text, sample, k=k) for _ in range(REPEATS))
            print(
                f"{name}, k={k}: {len(text) / TOKENS / k:.0f} bytes an entry, "
                f"{1e6 * best_s / TOKENS:.0f} µs a token"
            )


def read_s(name: str, text: str, sample: Sample, *, k: int) -> float:
    """Seconds from JSON to a signal."""
    flavour = FLAVOURS[name]
    started_s = time.perf_counter()
    answer = flavour.read(json.loads(text), sample, k=k, vocab_size=VOCAB)
    signal_of(answer, f"topk:k={k}", flavour.scalars, num_ids=VOCAB)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
