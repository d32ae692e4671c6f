"""SampleBuilder: rows become samples, whatever fields they come with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kdstore.errors import InputError
from kdstore.inputs.base import Row
from kdstore.inputs.chat import ChatEncoder
from kdstore.inputs.config import InputConfig
from kdstore.inputs.messages import Conversation, Message, read_messages, read_tools
from kdstore.inputs.overlong import fit
from kdstore.inputs.tokenize import Encoded, TextEncoder, encode_ids
from kdstore.sample import Sample


@dataclass
class InputCounters:
    """What happened to the rows so far; ``tokens_dropped`` is what truncation cut off."""

    num_rows: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_empty: int = 0
    num_split: int = 0
    num_truncated: int = 0
    tokens_dropped: int = 0
    num_unsupervised: int = 0

    def to_dict(self) -> dict[str, int]:
        """All counters by name."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Read:
    """A row as tokens, with what ``keep_text`` keeps of it."""

    encoded: Encoded
    text: str | None = None
    messages: list[Message] | None = None


class SampleBuilder:
    """Turns rows into samples under one tokenizer and config.

    A row uses the first of these that it has: ``input_ids`` (with ``labels`` or ``spans``),
    ``messages`` (with ``tools``), ``prompt`` and ``completion`` (strings, or lists of messages of
    which only the completion's are supervised), ``text``. ``id`` names the sample, else
    ``{source_name}:{row}``; ``metadata`` is kept. A row without any token gives no sample and is
    counted in ``num_empty``; one without supervised tokens is a sample and is counted in
    ``num_unsupervised``. ``locate`` says in words where a row is (``Source.locate``), for error
    messages.

    Raises UsageError for a BOS or EOS policy that the tokenizer cannot follow.
    """

    usable: tuple[tuple[str, ...], ...] = (
        ("input_ids",),
        ("messages",),
        ("prompt", "completion"),
        ("text",),
    )

    def __init__(
        self,
        tokenizer: Any,
        config: InputConfig,
        source_name: str,
        *,
        locate: Callable[[int], str] | None = None,
    ) -> None:
        self.config = config
        self.counters = InputCounters()
        self._source_name = source_name
        self._locate = locate
        self._text = TextEncoder(tokenizer, config)
        self._chat = ChatEncoder(tokenizer, config)

    def policy(self) -> dict[str, Any]:
        """What "auto" came to with this tokenizer and which chat template speaks; JSON-able."""
        return {
            "add_bos": self._text.bos_id is not None,
            "bos_token_id": self._text.bos_id,
            "add_eos": self._text.eos_id is not None,
            "eos_token_id": self._text.eos_id,
            "chat_template_sha256": self._chat.template.sha256,
        }

    def samples(self, row_number: int, row: Row) -> list[Sample]:
        """The samples of a row: none if it is empty, several if it was split.

        Raises InputError, naming the row, if its fields cannot be used or it is longer than the
        config allows.
        """
        try:
            samples = self._samples(row_number, row, f"row {row_number} of {self._source_name}")
        except InputError:
            if self._locate is None:
                raise
            # Finding a line may mean reading a file, so only now. It fails again, saying where.
            samples = self._samples(row_number, row, self._locate(row_number))
        self.counters.num_rows += 1
        self.counters.num_samples += len(samples)
        for sample in samples:
            self.counters.num_tokens += sample.num_tokens
            self.counters.num_unsupervised += not any(span.supervised for span in sample.spans)
        return samples

    def _samples(self, row_number: int, row: Row, where: str) -> list[Sample]:
        sample_id = _sample_id(row.get("id"), f"{self._source_name}:{row_number}", where)
        metadata = _metadata(row.get("metadata"), where)
        read = self._read(row, where)
        if not len(read.encoded.ids_T):
            self.counters.num_empty += 1
            return []
        pieces = fit(read.encoded, self.config, self.counters, f"{where}, sample {sample_id!r}")
        return [
            Sample(
                f"{sample_id}#{index}" if len(pieces) > 1 else sample_id,
                piece.ids_T,
                piece.spans,
                text=read.text if index == 0 else None,
                messages=read.messages if index == 0 else None,
                metadata=metadata,
            )
            for index, piece in enumerate(pieces)
        ]

    def _read(self, row: Row, where: str) -> Read:
        for names in self.usable:
            if all(row.get(name) is not None for name in names):
                reader = getattr(self, f"_read_{names[0]}")
                read: Read = reader(row, where)
                return read if self.config.keep_text else Read(read.encoded)
        raise InputError(
            "a row without usable fields",
            where=where,
            expected=", or ".join(" and ".join(names) for names in self.usable),
            got=_fields_found(row),
            todo="rename the fields of your data to these",
        )

    def _read_input_ids(self, row: Row, where: str) -> Read:
        text = row.get("text")
        return Read(encode_ids(row, where), text=text if isinstance(text, str) else None)

    def _read_messages(self, row: Row, where: str) -> Read:
        messages = read_messages(row["messages"], "messages", where)
        return self._conversation(messages, row, where, first_supervised=0)

    def _read_prompt(self, row: Row, where: str) -> Read:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            asked = read_messages(prompt, "prompt", where)
            answered = read_messages(completion, "completion", where)
            return self._conversation([*asked, *answered], row, where, first_supervised=len(asked))
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            raise InputError(
                "prompt and completion of the wrong type",
                where=where,
                expected="two strings or two lists of messages",
                got=f"{type(prompt).__name__} and {type(completion).__name__}",
            )
        encoded = self._text.prompt_completion(prompt, completion, where)
        return Read(encoded, text=prompt + completion)

    def _read_text(self, row: Row, where: str) -> Read:
        text = row["text"]
        if not isinstance(text, str):
            raise InputError(
                "text is not a string",
                where=f"{where}, text",
                expected="a string",
                got=f"{type(text).__name__}: {text!r:.60}",
            )
        return Read(self._text.text(text), text=text)

    def _conversation(
        self, messages: list[Message], row: Row, where: str, *, first_supervised: int
    ) -> Read:
        tools = read_tools(row.get("tools"), where)
        chat = Conversation(messages, where, tools, first_supervised)
        return Read(self._chat.encode(chat), messages=messages)


def _sample_id(value: Any, default: str, where: str) -> str:
    if value is None:
        return default
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return str(value)
    raise InputError(
        "id cannot name a sample",
        where=f"{where}, id",
        expected="a string or an integer",
        got=f"{type(value).__name__}: {value!r:.60}",
        todo=f"leave it out to get {default!r}",
    )


def _metadata(value: Any, where: str) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        found = json.loads(value) if isinstance(value, str) else value
        if isinstance(found, dict):
            json.dumps(found, allow_nan=False)
            return found
        got = f"{type(value).__name__}: {value!r:.60}"
    except (TypeError, ValueError) as error:
        got = str(error)
    raise InputError(
        "metadata cannot be kept",
        where=where,
        expected="an object of JSON values, or its text",
        got=got,
    )


def _fields_found(row: Row) -> str:
    if not row:
        return "an empty row"
    return ", ".join(
        f"{name} ({'null' if value is None else type(value).__name__})"
        for name, value in row.items()
    )
