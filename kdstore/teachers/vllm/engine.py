"""Starting a vLLM engine for scoring."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kdstore.errors import TeacherError, UsageError
from kdstore.teachers.hf_load import CheckpointInfo

WORKER_EXTENSION = "kdstore.teachers.vllm.worker.TapExtension"
_ENVIRONMENT = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # room for the one token that must be generated
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_OURS = ("model", "dtype", "tokenizer", "skip_tokenizer_init", "worker_extension_cls", "runner")


def start_engine(
    info: CheckpointInfo, options: Mapping[str, Any], *, batch_tokens: int, max_logprobs: int | None
) -> Any:
    """An ``LLMEngine`` over a checkpoint; ``options`` are further fields of its ``EngineArgs``.

    ``max_logprobs`` is for an engine without the tap. Raises UsageError for an option that vLLM
    does not have or that is not the user's, TeacherError if the engine does not start.
    """
    _check_options(options)
    with _environment():
        from vllm import EngineArgs, LLMEngine

        settings = _defaults(info, batch_tokens) | dict(options)
        if max_logprobs is not None:
            settings["max_logprobs"] = max_logprobs
        else:
            settings["worker_extension_cls"] = WORKER_EXTENSION
        try:
            return LLMEngine.from_engine_args(EngineArgs(**settings))
        except TypeError as error:
            raise _unknown_option(error) from error
        except (RuntimeError, ValueError, OSError) as error:
            raise TeacherError(
                "vLLM cannot start on the teacher",
                where=info.path,
                got=error,
                todo="vLLM's own messages are above; --vllm-options passes more engine options",
            ) from error


def _defaults(info: CheckpointInfo, batch_tokens: int) -> dict[str, Any]:
    from vllm.platforms import current_platform

    found: dict[str, Any] = {
        "model": str(info.path),
        "dtype": info.dtype,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "max_num_batched_tokens": batch_tokens,
        "max_num_seqs": min(256, batch_tokens),
        "enforce_eager": current_platform.is_cpu(),  # else compiling takes longer than a small dump
    }
    if info.max_length is not None:
        found["max_model_len"] = info.max_length + 1  # the one token that vLLM must generate
    return found


@contextmanager
def _environment() -> Iterator[None]:
    """What the engine's processes inherit; what the user has set stays as it is."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def engine_errors() -> Iterator[None]:
    """TeacherError for an engine that has died; its own messages went before."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise TeacherError(
            "the vLLM engine has died",
            got=error,
            todo="vLLM's own messages are above; run the same command again to resume",
        ) from error


def _check_options(options: Mapping[str, Any]) -> None:
    taken = [name for name in _OURS if name in options]
    if taken:
        raise UsageError(
            "an engine option that kdstore sets itself",
            where="--vllm-options",
            expected=f"none of {', '.join(_OURS)}",
            got=", ".join(taken),
            todo="use --teacher and --dtype",
        )


def _unknown_option(error: TypeError) -> UsageError:
    return UsageError(
        "vLLM has no such engine option",
        where="--vllm-options",
        expected="fields of vllm.EngineArgs, such as tensor_parallel_size",
        got=error,
    )
