"""Completions by a vLLM engine, each with a seed of its own."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from kdstore.completion import Completion, Prompt, Sampling
from kdstore.errors import TeacherError
from kdstore.teachers.vllm.engine import engine_errors

MAX_BIASED_IDS = 1024  # vLLM's limit of ``logit_bias``
NEVER = -100.0  # the least bias it takes


def generate(
    engine: Any,
    groups: Iterable[Sequence[Prompt]],
    sampling: Sampling,
    *,
    limit: int,
    padding_ids: range,
) -> Iterator[Completion]:
    """The completions as the engine finishes them, at most ``limit`` in flight.

    ``padding_ids`` are those that the tokenizer does not have.
    """
    waiting = (prompt for group in groups for prompt in group)
    call, flying, asked = secrets.token_hex(4), dict[str, Prompt](), 0
    try:
        while True:
            for prompt in islice(waiting, limit - len(flying)):
                name, asked = f"kdstore-{call}-{asked}", asked + 1
                _submit(engine, name, prompt, _params(prompt, sampling, padding_ids))
                flying[name] = prompt
            if not flying:
                return
            with engine_errors():
                outputs = engine.step()
            for output in outputs:
                if output.finished:
                    yield _completion(flying.pop(output.request_id), output, padding_ids)
    finally:
        if flying:
            engine.abort_request(list(flying))


def _params(prompt: Prompt, sampling: Sampling, padding_ids: range) -> Any:
    """The engine has no tokenizer, so that what ends a completion is told by id."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    few = 0 < len(padding_ids) <= MAX_BIASED_IDS
    return SamplingParams(
        max_tokens=prompt.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=prompt.engine_seed(seed=sampling.seed),
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,  # what the engine read of the checkpoint is among our stop ids, or is not
        logit_bias=dict.fromkeys(padding_ids, NEVER) if few else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _submit(engine: Any, name: str, prompt: Prompt, params: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    try:
        engine.add_request(name, {"prompt_token_ids": prompt.input_ids_T.tolist()}, params)
    except (ValueError, VLLMValidationError) as error:
        limit = engine.vllm_config.model_config.max_model_len
        raise TeacherError(
            "vLLM does not take a prompt",
            where=f"sample {prompt.sample_id!r}",
            expected=f"prompt and completion within {limit} tokens",
            got=f"{prompt.num_tokens} + {prompt.max_tokens} tokens ({error})",
            todo="lower --max-length or --max-new-tokens",
        ) from error


def _completion(prompt: Prompt, output: Any, padding_ids: range) -> Completion:
    (drawn,) = output.outputs
    ids_T = np.array(drawn.token_ids, np.int32)
    found = ids_T[np.isin(ids_T, padding_ids)]
    if drawn.finish_reason in ("stop", "length") and len(ids_T) and not len(found):
        return Completion(prompt.sample_id, ids_T, drawn.finish_reason)
    raise TeacherError(
        "the engine gave no completion",
        where=f"sample {prompt.sample_id!r}",
        expected=f"tokens below {padding_ids.start}, and stop or length as the reason to end",
        got=f"{len(ids_T)} tokens, {found[:3].tolist()} among them, {drawn.finish_reason}",
    )
