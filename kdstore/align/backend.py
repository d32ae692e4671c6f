"""The definition of a fast tokenizer: the parsed tokenizer.json of its backend.

Nothing here imports transformers or tokenizers; the object passed in brings them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kdstore.errors import TeacherError

# Left behind in the live backend by the last call that padded or truncated; no part of what the
# tokenizer is. Null is how tokenizer.json spells "none", and the loader wants the keys present.
_CALL_STATE = ("padding", "truncation")

_SEQUENCE_FIELDS = ("decoders", "normalizers", "pretokenizers")


def backend_state(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's tokenizer.json as parsed JSON, free of padding and truncation.

    ``TeacherError`` if the tokenizer has no Rust backend (a slow tokenizer).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TeacherError(
            "the tokenizer has no fast backend, so its tokens cannot be read",
            where=getattr(tokenizer, "name_or_path", None) or None,
            expected="a PreTrainedTokenizerFast (one that has a tokenizer.json)",
            got=type(tokenizer).__name__,
            todo="load it with AutoTokenizer.from_pretrained, or save a tokenizer.json for it",
        )
    state: dict[str, Any] = json.loads(backend.to_str())
    return state | dict.fromkeys(_CALL_STATE)


def components(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a decoder, normaliser or pre-tokenizer, with every Sequence unfolded.

    >>> list(components({"type": "Sequence", "decoders": [{"type": "Fuse"}]}))
    [{'type': 'Fuse'}]
    """
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for field in _SEQUENCE_FIELDS:
        for child in part.get(field, ()):
            yield from components(child)
