"""What happens to rows longer than ``max_length``: split, truncated or refused."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kdstore.errors import InputError
from kdstore.inputs.config import InputConfig
from kdstore.inputs.spans import cut_spans
from kdstore.inputs.tokenize import Encoded
from kdstore.sample import Span


class OverlongCounters(Protocol):
    """The counters that this module moves."""

    num_split: int
    num_truncated: int
    tokens_dropped: int


def fit(
    encoded: Encoded, config: InputConfig, counters: OverlongCounters, where: str
) -> list[Encoded]:
    """The row in pieces of at most ``max_length`` tokens.

    Pieces do not overlap. A BOS that kdstore added begins every piece, so that each is scored as
    a text of its own; chats and ``input_ids`` are cut as they are. Raises InputError if the config
    refuses long rows.
    """
    length, limit = len(encoded.ids_T), config.max_length
    if limit is None or length <= limit:
        return [encoded]
    if config.overlong == "error":
        raise InputError(
            "a row longer than max_length",
            where=where,
            expected=f"at most {limit} tokens",
            got=f"{length} tokens",
            todo="raise max_length, or set overlong to 'split' or 'truncate'",
        )
    if config.overlong == "truncate":
        counters.num_truncated += 1
        counters.tokens_dropped += length - limit
        return [Encoded(encoded.ids_T[:limit], cut_spans(encoded.spans, 0, limit), encoded.bos)]
    counters.num_split += 1
    step = limit - encoded.bos
    return [_piece(encoded, start, start + step) for start in range(encoded.bos, length, step)]


def _piece(encoded: Encoded, start: int, end: int) -> Encoded:
    """Tokens ``[start, end)`` behind a BOS if the row has one."""
    bos = encoded.bos
    ids_T = np.concatenate([encoded.ids_T[:bos], encoded.ids_T[start:end]])
    ground = (Span(0, bos, "template", supervised=False),) if bos else ()
    return Encoded(ids_T, (*ground, *cut_spans(encoded.spans, start, end, shift=bos)), bos)
