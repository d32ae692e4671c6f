"""Tokens of rows that have no chat template: ids, text, prompt and completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import InputError, UsageError
from kdstore.inputs.config import InputConfig, TokenPolicy
from kdstore.inputs.spans import SpanPainter, TokenMap
from kdstore.sample import Span

_MAX_ID = 2**31 - 1
_UNSUPERVISED = -100  # labels[t] that Hugging Face losses ignore


@dataclass(frozen=True, eq=False)
class Encoded:
    """A row as tokens ``ids_T`` (int32) with spans that cover them.

    ``bos`` is how many leading tokens are a BOS that we added (0 or 1): pieces of a split repeat
    it.
    """

    ids_T: NDArray[np.int32]
    spans: tuple[Span, ...]
    bos: int = 0


EMPTY = Encoded(np.zeros(0, dtype=np.int32), ())


def encode_ids(row: dict[str, Any], where: str) -> Encoded:
    """``input_ids`` taken verbatim; ``labels`` of -100 mark what is not supervised.

    ``spans`` say of what kind and whether supervised tokens are; without them all are supervised
    text. Raises InputError for ids that are not integers in [0, 2^31), for labels of another length
    or that are neither their token nor -100 (they are not shifted: ``labels[t]`` is
    ``input_ids[t]``), for spans outside the row and for padding (zeros in ``attention_mask``).
    """
    ids_T = _integers(row["input_ids"], "input_ids", where)
    if bad := np.flatnonzero((ids_T < 0) | (ids_T > _MAX_ID))[:1].tolist():
        raise InputError(
            "token id out of range",
            where=f"{where}, input_ids[{bad[0]}]",
            expected=f"0 to {_MAX_ID}",
            got=int(ids_T[bad[0]]),
        )
    _refuse_padding(row.get("attention_mask"), where)
    painter = SpanPainter(len(ids_T))
    for span in _spans(row.get("spans"), len(ids_T), where):
        painter.paint(span.start, span.end, span.kind, supervised=span.supervised)
    painter.ignore(_ignored(row.get("labels"), ids_T, where))
    return Encoded(ids_T.astype(np.int32), painter.spans())


class TextEncoder:
    """Tokens of plain text under a resolved BOS and EOS policy.

    ``bos_id`` and ``eos_id`` are what is added, None for nothing. Raises UsageError if the config
    asks for a token that the tokenizer lacks.
    """

    def __init__(self, tokenizer: Any, config: InputConfig) -> None:
        self._tokenizer = tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self.bos_id = _resolve(config.add_bos, bos, name="BOS", auto=adds_bos)
        self.eos_id = _resolve(config.add_eos, eos, name="EOS", auto=eos is not None)

    def text(self, text: str) -> Encoded:
        """BOS, text, EOS: kind text; all but BOS supervised. An empty text has no tokens."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._framed(ids, boundary=0, kind="text")

    def prompt_completion(self, prompt: str, completion: str, where: str) -> Encoded:
        """BOS, prompt (kind user), completion and EOS (kind assistant, supervised).

        Both are tokenised as one text, so that the tokens are those of the text that the model
        sees; TokenMap says who owns a token across the boundary. Raises UsageError if the tokenizer
        cannot tell where its tokens are.
        """
        ids, offsets = tokenize_with_offsets(self._tokenizer, prompt + completion, where)
        boundary = TokenMap(prompt + completion, offsets).tokens(0, len(prompt))[1]
        return self._framed(ids, boundary=boundary, kind="assistant")

    def _framed(self, ids: list[int], *, boundary: int, kind: str) -> Encoded:
        if not ids:
            return EMPTY
        if ids[0] == self.bos_id:  # the text brings its own: it is ours from here on
            ids, boundary = ids[1:], max(boundary - 1, 0)
        bos = [] if self.bos_id is None else [self.bos_id]
        eos = [] if self.eos_id is None or ids[-1:] == [self.eos_id] else [self.eos_id]
        ids_T = np.array([*bos, *ids, *eos], dtype=np.int32)
        painter = SpanPainter(len(ids_T))
        painter.paint(len(bos), len(bos) + boundary, "user")
        painter.paint(len(bos) + boundary, len(ids_T), kind, supervised=True)
        return Encoded(ids_T, painter.spans(), bos=len(bos))


def tokenize_with_offsets(
    tokenizer: Any, text: str, where: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and their character ranges, nothing added. Raises UsageError without offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            "this tokenizer does not say where in the text its tokens are",
            where=where,
            expected="a fast tokenizer (tokenizer.json)",
            got=f"{type(tokenizer).__name__} of {getattr(tokenizer, 'name_or_path', '?')}",
            todo="convert it to a fast tokenizer, or give rows of input_ids and labels",
        )
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoding["input_ids"], encoding["offset_mapping"]


def _resolve(policy: TokenPolicy, token_id: int | None, *, name: str, auto: bool) -> int | None:
    if policy == "never" or (policy == "auto" and not auto):
        return None
    if token_id is None:
        raise UsageError(
            f"the tokenizer has no {name} token",
            expected=f"a tokenizer with {name}, since add_{name.lower()} is 'always'",
            got="none",
            todo=f"set add_{name.lower()} to 'auto' or 'never'",
        )
    return token_id


def _spans(value: Any, num_tokens: int, where: str) -> list[Span]:
    """The spans of a row as a store has them, or one of all tokens."""
    if value is None:
        return [Span(0, num_tokens, "text", supervised=True)]
    try:
        spans = [Span(**item) for item in value]
    except TypeError:
        spans = None
    if spans is not None and all(_fits(span, num_tokens) for span in spans):
        return spans
    raise InputError(
        "spans that are none",
        where=f"{where}, spans",
        expected=f"start, end, kind and supervised of each, within {num_tokens} tokens",
        got=f"{value!r:.80}",
    )


def _fits(span: Span, num_tokens: int) -> bool:
    kinds = [type(value) for value in (span.start, span.end, span.kind, span.supervised)]
    return kinds == [int, int, str, bool] and 0 <= span.start <= span.end <= num_tokens


def _integers(value: Any, name: str, where: str) -> NDArray[np.int64]:
    """int64 of a list of integers; floats, booleans, strings and nested lists are refused."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise _not_integers(name, where, f"{type(value).__name__}: {value!r:.60}")
    for index, item in enumerate(value):
        if type(item) is not int:
            raise _not_integers(f"{name}[{index}]", where, f"{type(item).__name__}: {item!r:.60}")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError as error:
        raise _not_integers(name, where, str(error)) from error


def _not_integers(name: str, where: str, got: str) -> InputError:
    return InputError(
        "not a list of integers",
        where=f"{where}, {name}",
        expected="a list of integers",
        got=got,
    )


def _refuse_padding(mask: Any, where: str) -> None:
    if mask is None:
        return
    num_padding = int(np.count_nonzero(_integers(mask, "attention_mask", where) == 0))
    if num_padding:
        raise InputError(
            "padded input_ids",
            where=where,
            expected="attention_mask of ones",
            got=f"{num_padding} padding positions",
            todo="give rows without padding; kdstore pads or packs when it loads",
        )


def _ignored(labels: Any, ids_T: NDArray[np.int64], where: str) -> NDArray[np.bool_]:
    """bool [T]: where labels say that a token is not supervised."""
    if labels is None:
        return np.zeros(len(ids_T), dtype=np.bool_)
    labels_T = _integers(labels, "labels", where)
    if len(labels_T) != len(ids_T):
        raise InputError(
            "labels and input_ids differ in length",
            where=where,
            expected=f"{len(ids_T)} labels",
            got=len(labels_T),
        )
    ignored_T: NDArray[np.bool_] = labels_T == _UNSUPERVISED
    if bad := np.flatnonzero(~ignored_T & (labels_T != ids_T))[:1].tolist():
        raise InputError(
            "a label that is not its token",
            where=f"{where}, labels[{bad[0]}]",
            expected=f"{int(ids_T[bad[0]])} or {_UNSUPERVISED}",
            got=int(labels_T[bad[0]]),
            todo="give labels as Hugging Face does: labels[t] is input_ids[t], not shifted",
        )
    return ignored_T
