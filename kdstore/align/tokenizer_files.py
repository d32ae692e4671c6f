"""The files of STORE/tokenizer/: all that a reader needs of the teacher's tokenizer."""

from __future__ import annotations

import re
from typing import Any

from kdstore.align.backend import backend_state
from kdstore.align.token_table import TokenTable
from kdstore.errors import TeacherError
from kdstore.hashing import canonical_json, sha256_hex

TOKENIZER_FILE = "tokenizer.json"
TABLE_FILE = "table.arrow"
TEMPLATE_FILE = "chat_template.jinja"

_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def tokenizer_digest(tokenizer: Any) -> str:
    """The ``tokenizer_digest``: SHA-256 hex of the ``tokenizer.json`` that a store keeps.

    Equal before and after calls that pad or truncate. ``TeacherError`` for a slow tokenizer.
    """
    return sha256_hex(canonical_json(backend_state(tokenizer)))


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """File name -> bytes of what a store keeps in ``tokenizer/``; deterministic.

    * ``tokenizer.json`` as canonical JSON, without the state of the last padding or truncation
    * ``table.arrow``: the ``TokenTable``
    * ``chat_template.jinja`` if there is one; named ones under ``additional_chat_templates/``,
      as transformers lays them out

    ``TeacherError`` for a slow tokenizer, an unknown kind or a template without a usable name.
    """
    state = backend_state(tokenizer)
    return {
        TOKENIZER_FILE: canonical_json(state),
        TABLE_FILE: TokenTable.from_backend_state(state).to_bytes(),
        **_template_files(getattr(tokenizer, "chat_template", None)),
    }


def _template_files(template: str | dict[str, str] | None) -> dict[str, bytes]:
    if template is None:
        return {}
    named = {"default": template} if isinstance(template, str) else template
    return {_template_path(name): named[name].encode() for name in sorted(named)}


def _template_path(name: str) -> str:
    if name == "default":
        return TEMPLATE_FILE
    if not _TEMPLATE_NAME.fullmatch(name):
        raise TeacherError(
            "a chat template whose name cannot be a file name",
            expected="letters, digits, '_', '-' and '.'",
            got=repr(name),
            todo="rename the template in the tokenizer's chat_template",
        )
    return f"additional_chat_templates/{name}.jinja"
