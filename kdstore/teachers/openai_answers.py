"""What servers are asked for a sample and what they answer, by flavour, checked before use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import KDStoreError, TeacherError
from kdstore.sample import Sample
from kdstore.teachers.top_logprobs import TopLogprobs

VLLM_MINUS_INFINITY = -9999.0  # JSON has no infinity, so vLLM writes this
LOGPROB_TOLERANCE = 1e-6  # of float32, above zero
SUM_TOLERANCE = 1e-3


class Flavour(ABC):
    """How one kind of server is asked for logprobs of a prompt.

    ``scalars`` are what it can give. ``version_path`` answers with its version.
    """

    name: ClassVar[str]
    path: ClassVar[str]
    version_path: ClassVar[str]
    scalars: ClassVar[tuple[str, ...]]

    @abstractmethod
    def body(self, sample: Sample, *, model: str, k: int) -> dict[str, Any]:
        """The request for a sample with scored positions."""

    @abstractmethod
    def parse(self, answer: Any, sample: Sample, *, k: int, vocab_size: int) -> TopLogprobs:
        """The answer, label-aligned; anything but the right shape may raise what it likes."""

    def read(self, answer: Any, sample: Sample, *, k: int, vocab_size: int) -> TopLogprobs:
        """The answer of the scored positions; TeacherError naming the sample if it is not one."""
        try:
            parsed = self.parse(answer, sample, k=k, vocab_size=vocab_size)
        except KDStoreError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise TeacherError(
                "the server's answer has not the shape that was asked for",
                where=f"sample {sample.sample_id!r}",
                expected=f"logprobs of the prompt as {self.name} gives them",
                got=f"{type(error).__name__}: {error}",
                todo="score with a vLLM or SGLang server, and name its --flavour",
            ) from error
        _check_values(parsed, sample, k=k, vocab_size=vocab_size)
        return parsed


class VLLM(Flavour):
    """`prompt_logprobs` of `/v1/completions`: a mapping for each token but the first.

    It has the k most probable and the token itself, which has a rank above k if it is not one of
    them. One token must be generated.
    """

    name = "vllm"
    path = "/v1/completions"
    version_path = "/version"
    scalars = ("label_logprob", "label_rank")

    def body(self, sample: Sample, *, model: str, k: int) -> dict[str, Any]:
        """All positions: vLLM has no way to leave out those that are not scored."""
        return {
            "model": model,
            "prompt": sample.input_ids_T.tolist(),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": k,
        }

    def parse(self, answer: Any, sample: Sample, *, k: int, vocab_size: int) -> TopLogprobs:
        """Raises TeacherError for another prompt than was sent."""
        (choice,) = answer["choices"]
        rows = choice["prompt_logprobs"]
        _check_count("tokens of the prompt", answer["usage"]["prompt_tokens"], sample)
        _check_count("positions with logprobs", len(rows), sample)
        tokens = sample.input_ids_T.tolist()
        for position, (row, token) in enumerate(zip(rows[1:], tokens[1:], strict=True), 1):
            if str(token) not in row:
                raise _other_prompt(sample, position, expected=token, got=f"logprobs of {[*row]}")
        scored = sample.positions_S.tolist()
        labels = [rows[t][str(tokens[t])] for t in scored]
        tops = [
            [(int(token), one["logprob"]) for token, one in rows[t].items() if one["rank"] <= k]
            for t in scored
        ]
        ids, logprobs = _columns(tops, sample, k=k)
        return TopLogprobs(
            ids,
            _with_infinity(logprobs),
            _with_infinity(np.asarray([one["logprob"] for one in labels], np.float64)),
            np.asarray([one["rank"] for one in labels], np.float64),
        )


class SGLang(Flavour):
    """`input_token_logprobs` and `input_top_logprobs` of `/generate`: [logprob, id, text] each.

    They are of the last tokens of the prompt, from `logprob_start_len` on, of which the first has
    none. The last id of the vocabulary is reported as 0.
    """

    name = "sglang"
    path = "/generate"
    version_path = "/get_server_info"
    scalars = ("label_logprob",)

    def body(self, sample: Sample, *, model: str, k: int) -> dict[str, Any]:
        """From the token before the first scored one, so that a masked prompt has no logprobs."""
        del model  # a server has one
        return {
            "input_ids": sample.input_ids_T.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": int(sample.positions_S[0]) - 1,
            "top_logprobs_num": k,
        }

    def parse(self, answer: Any, sample: Sample, *, k: int, vocab_size: int) -> TopLogprobs:
        """Raises TeacherError for another prompt than was sent."""
        meta = answer["meta_info"]
        own, tops = meta["input_token_logprobs"], meta["input_top_logprobs"]
        _check_count("tokens of the prompt", meta["prompt_tokens"], sample)
        scored = sample.positions_S - sample.num_tokens  # from the end, whose ids show where it is
        first = -int(scored[0])
        if not first <= len(own) == len(tops) <= sample.num_tokens:
            raise TeacherError(
                "the server's answer has another number of positions",
                where=f"sample {sample.sample_id!r}",
                expected=f"logprobs of at least the last {first} tokens, and of as many top ones",
                got=f"{len(own)} and {len(tops)}",
            )
        tokens = sample.input_ids_T[-len(own) :].tolist()
        for position, ((_, got, *_), token) in enumerate(zip(own, tokens, strict=True)):
            if got != (token if token < vocab_size - 1 else 0):
                at = sample.num_tokens - len(own) + position
                raise _other_prompt(sample, at, expected=token, got=got)
        ids, logprobs = _columns(
            [[(one[1], one[0]) for one in tops[t]] for t in scored.tolist()], sample, k=k
        )
        labels = np.asarray([own[t][0] for t in scored.tolist()], np.float64)
        return TopLogprobs(ids, logprobs, labels, None)


FLAVOURS: dict[str, Flavour] = {one.name: one for one in (VLLM(), SGLang())}


def _columns(
    tops: list[list[tuple[int, float]]], sample: Sample, *, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """ids and logprobs [S, k]; TeacherError unless every position has k different ids."""
    for position, top in zip(sample.positions_S, tops, strict=True):
        if len(top) != k or len({token for token, _ in top}) != k:
            raise TeacherError(
                "the server gives another number of tokens than was asked for",
                where=f"sample {sample.sample_id!r}, position {position}",
                expected=f"the {k} most probable",
                got=f"{len({token for token, _ in top})} different ones in {len(top)}",
            )
    pairs = np.asarray(tops, np.float64).reshape(len(tops), k, 2)
    return pairs[..., 0].astype(np.int64), pairs[..., 1]


def _with_infinity(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(logprobs <= VLLM_MINUS_INFINITY, -np.inf, logprobs)


def _check_count(what: str, got: Any, sample: Sample) -> None:
    if got != sample.num_tokens:
        raise TeacherError(
            "the server scored another prompt than it was sent",
            where=f"sample {sample.sample_id!r}",
            expected=f"{sample.num_tokens} {what}",
            got=got,
            todo="use a server that neither truncates prompts nor adds tokens to them",
        )


def _other_prompt(sample: Sample, position: int, *, expected: int, got: Any) -> TeacherError:
    return TeacherError(
        "the server scored another prompt than it was sent",
        where=f"sample {sample.sample_id!r}, position {position}",
        expected=f"logprobs of the token {expected}",
        got=got,
    )


def _check_values(answer: TopLogprobs, sample: Sample, *, k: int, vocab_size: int) -> None:
    """TeacherError for the first position whose values are no log-probabilities of its ids."""
    logprobs = np.concatenate([answer.logprobs_SK, answer.label_logprobs_S[:, None]], axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        wrong = {
            f"log-probabilities of at most {LOGPROB_TOLERANCE}": ~(
                logprobs <= LOGPROB_TOLERANCE
            ).all(1),
            f"a sum of at most {1 + SUM_TOLERANCE}": np.exp(answer.logprobs_SK).sum(1)
            > 1 + SUM_TOLERANCE,
            f"ids from 0 to {vocab_size - 1}": (
                (answer.ids_SK < 0) | (answer.ids_SK >= vocab_size)
            ).any(1),
        }
    if answer.label_ranks_S is not None:
        wrong["a rank of 1 or more"] = ~(answer.label_ranks_S >= 1)
    for expected, wrong_S in wrong.items():
        if wrong_S.any():
            row = int(wrong_S.argmax())
            raise TeacherError(
                "the server gives what is no distribution",
                where=f"sample {sample.sample_id!r}, position {sample.positions_S[row]}",
                expected=expected,
                got=f"ids {answer.ids_SK[row, :8].tolist()}, log-probabilities "
                f"{logprobs[row, [*range(min(k, 8)), -1]].tolist()}, the token's own last",
            )
