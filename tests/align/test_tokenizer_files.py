"""What a store keeps of a tokenizer, and its digest."""

from __future__ import annotations

import hashlib

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kdstore.align import TokenTable, tokenizer_digest, tokenizer_files
from kdstore.errors import TeacherError
from tests.align.small_tokenizers import make_byte_fallback, make_byte_level, make_unigram, wrap

MAKERS = [make_byte_level, make_byte_fallback, make_unigram]


@pytest.mark.parametrize("make", MAKERS)
def test_files_rebuild_the_tokenizer(make) -> None:
    tokenizer = wrap(make())
    files = tokenizer_files(tokenizer)
    assert sorted(files) == ["table.arrow", "tokenizer.json"]
    again = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert again.to_str() == tokenizer.backend_tokenizer.to_str()
    table = TokenTable.from_bytes(files["table.arrow"])
    assert table.fingerprint() == TokenTable.from_tokenizer(tokenizer).fingerprint()


@pytest.mark.parametrize("make", MAKERS)
def test_files_and_digest_do_not_depend_on_the_object(make) -> None:
    one = wrap(make())
    other = wrap(Tokenizer.from_str(one.backend_tokenizer.to_str()))
    assert tokenizer_files(one) == tokenizer_files(other)
    digest = hashlib.sha256(tokenizer_files(one)["tokenizer.json"]).hexdigest()
    assert tokenizer_digest(one) == tokenizer_digest(other) == digest


def test_padding_and_truncation_leave_no_trace() -> None:
    backend = make_byte_level()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|end|>")
    digest, files = tokenizer_digest(tokenizer), tokenizer_files(tokenizer)
    tokenizer(["the dog", "the"], padding=True, truncation=True, max_length=3)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer.backend_tokenizer.padding is not None
    assert tokenizer_digest(tokenizer) == digest
    assert tokenizer_files(tokenizer) == files


def test_digest_tells_merges_that_the_fingerprint_ignores() -> None:
    one, other = make_byte_fallback(prefix_space=True), make_byte_fallback(prefix_space=False)
    tables = [TokenTable.from_tokenizer(wrap(backend)) for backend in (one, other)]
    assert tables[0].fingerprint() == tables[1].fingerprint()
    assert tokenizer_digest(wrap(one)) != tokenizer_digest(wrap(other))


def test_chat_template_is_verbatim() -> None:
    tokenizer = wrap(make_byte_level())
    tokenizer.chat_template = "{% for m in messages %}é{{ m.content }}\r\n{% endfor %}"
    files = tokenizer_files(tokenizer)
    assert files["chat_template.jinja"] == tokenizer.chat_template.encode()


def test_named_chat_templates() -> None:
    tokenizer = wrap(make_byte_level())
    tokenizer.chat_template = {"tool_use": "t", "default": "d"}
    files = tokenizer_files(tokenizer)
    assert files["chat_template.jinja"] == b"d"
    assert files["additional_chat_templates/tool_use.jinja"] == b"t"
    tokenizer.chat_template = {"../x": "t"}
    with pytest.raises(TeacherError, match="cannot be a file name"):
        tokenizer_files(tokenizer)


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(TeacherError, match="no fast backend"):
        tokenizer_digest(object())
