"""Where the tap goes in: which model runner an engine has, and whether it is one we know.

vLLM calls neither runner's insides an interface. So their shape is checked by name and parameters
before the tap is put there, and an engine that differs gets no tap.
"""

from __future__ import annotations

import inspect
from typing import Any

from kdstore.errors import TeacherError
from kdstore.teachers.vllm import runner_v1, runner_v2
from kdstore.teachers.vllm.shards import head_shard
from kdstore.teachers.vllm.tap import Tap


def install(runner: Any, *, vocab_size: int, answers: bool = True) -> tuple[Tap, str]:
    """A tap on a worker's model runner, and which runner it is: ``v1`` or ``v2``.

    ``answers`` is of ``Tap``. Raises TeacherError if the runner is neither.
    """
    tap = Tap(
        lambda hidden: runner.model.compute_logits(hidden),
        vocab_size=vocab_size,
        answers=answers,
        shard=head_shard(getattr(runner, "model", None), vocab_size=vocab_size),
    )
    if hasattr(runner, runner_v2.ATTRIBUTE):
        if getattr(runner, runner_v2.ATTRIBUTE) is not None:  # only the last pipeline stage has one
            check_v2(getattr(runner, runner_v2.ATTRIBUTE))
            runner_v2.RunnerV2(runner, tap)
        return tap, "v2"
    check_v1(runner)
    runner_v1.RunnerV1(runner, tap)
    return tap, "v1"


def check_installed() -> str:
    """Why the tap does not fit the installed vLLM; empty if it does."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    try:
        check_v1(GPUModelRunner)
        check_v2(PromptLogprobsWorker)
    except TeacherError as error:
        return " ".join(str(error).split())
    return ""


def check_v1(runner: Any) -> None:
    """TeacherError unless the tap fits a V1 runner, an object or its class."""
    _check_method(runner, runner_v1.METHOD, runner_v1.PARAMETERS)


def check_v2(worker: Any) -> None:
    """TeacherError unless the tap fits a V2 runner's worker, an object or its class."""
    for name, parameters in runner_v2.METHODS.items():
        _check_method(worker, name, parameters)


def _check_method(owner: Any, name: str, parameters: tuple[str, ...]) -> None:
    method = getattr(owner, name, None)
    found = tuple(inspect.signature(method).parameters) if callable(method) else ()
    if found[-len(parameters) :] != parameters or len(set(found) - {"self"}) != len(parameters):
        raise TeacherError(
            "this version of vLLM is not known: the tap does not fit it",
            where=f"{getattr(owner, '__qualname__', type(owner).__qualname__)}.{name}",
            expected=f"a method of {', '.join(parameters)}",
            got=f"one of {', '.join(found)}" if callable(method) else "no such method",
            todo="install a version that docs/vllm.md lists, or use the hf backend",
        )
