"""ChatTemplate: a tokenizer's chat template and what can be learned about it once."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
from typing import Any

from kdstore.errors import InputError
from kdstore.hashing import canonical_json, sha256_hex
from kdstore.inputs.config import InputConfig
from kdstore.inputs.marks import Skeleton
from kdstore.inputs.messages import Message

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = tuple(f"kdmark0q{number}z" for number in range(3))
_SKELETONS = 256  # forms of conversations whose skeleton is kept

CharRange = tuple[int, int]


def common_length(left: str, right: str) -> int:
    """Number of characters that two texts begin with alike."""
    pairs = zip(left, right, strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return sum(1 for _ in same)


class ChatTemplate:
    """Renders conversations, and knows what begins and what ends an assistant's turn."""

    def __init__(self, tokenizer: Any, config: InputConfig) -> None:
        self._tokenizer = tokenizer
        self._options = dict(config.template_options)
        self._date = datetime.date.fromisoformat(config.template_date)
        self._skeleton = functools.lru_cache(maxsize=_SKELETONS)(self._render_skeleton)

    @functools.cached_property
    def sha256(self) -> str | None:
        """SHA-256 of the template (of the canonical JSON of several), None if there is none."""
        template = self._tokenizer.chat_template
        if template is None:
            return None
        named = template if isinstance(template, str) else canonical_json(template).decode("utf-8")
        return sha256_hex(named.encode("utf-8"))

    def __str__(self) -> str:
        return f"chat template {(self.sha256 or 'none')[:12]} of {self._name}"

    def generates(self, tools: list[dict[str, Any]] | None, where: str) -> bool:
        """Whether the template marks what the assistant generates with ``{% generation %}``."""
        return _GENERATION.search(self._source(tools, where)) is not None

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        where: str,
        *,
        prompt: bool = False,
    ) -> str:
        """The conversation as one text, ``prompt`` adds what makes the assistant answer.

        Raises InputError if there is no template or it refuses the conversation.
        """
        source = self._source(tools, where)
        try:
            return self._apply(messages, tools, source, prompt=prompt)
        except Exception as error:  # a template is a program: it may raise anything
            raise self._refused(where, error) from error

    def render_generated(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, where: str
    ) -> tuple[str, list[CharRange]]:
        """The conversation, and the characters that the template marks as generated.

        The same rendering as ``apply_chat_template(return_assistant_tokens_mask=True)``, whose
        token mask is not used: where a boundary falls on a letter of several tokens or on white
        space that a tokenizer drops, it loses tokens or whole turns.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self._source(tools, where)
        try:
            texts, ranges = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=source,
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **self._variables(source)},
            )
        except Exception as error:
            raise self._refused(where, error) from error
        return texts[0], ranges[0]

    def skeleton(
        self, marked: list[Message], tools: list[dict[str, Any]] | None, where: str
    ) -> Skeleton:
        """The skeleton of marked messages, rendered unless one of this form was."""
        source = self._source(tools, where)
        try:
            return self._skeleton(json.dumps([marked, tools]), source)
        except Exception as error:
            raise self._refused(where, error) from error

    def after_calls(self, marked: Message, tools: list[dict[str, Any]] | None) -> str:
        """What follows the last text of a marked message with tool calls, were it the last one.

        "" if the template cannot be asked.
        """
        asked = [{"role": "user", "content": "?"}, marked]
        try:
            return self.skeleton(asked, tools, "probe").pieces[-1]
        except InputError:
            return ""

    @functools.cached_property
    def headers(self) -> tuple[str, ...]:
        """What asks the assistant for an answer, such as ``<|im_start|>assistant\\n``.

        Longest first; one that opens a thought is followed by itself without it, for earlier turns.
        Empty if the template has none or cannot be asked.
        """
        asked = [{"role": "user", "content": _PROBE[0]}]
        try:
            plain = self.render(asked, None, "probe").rpartition(_PROBE[0])[2]
            after = self.render(asked, None, "probe", prompt=True).rpartition(_PROBE[0])[2]
        except InputError:
            return ()
        start = common_length(plain, after)
        # Phi 3 writes <|endoftext|> where it does not ask <|assistant|>: "<|" is no common text.
        cut = [m.start() for m in self.specials.finditer(after) if m.start() < start < m.end()]
        header = after[min([start, *cut]) :]
        forms = (header, header.partition("<think>")[0])
        return tuple(dict.fromkeys(form for form in forms if form.strip()))

    @functools.cached_property
    def closers(self) -> frozenset[str]:
        """Special tokens that may end a turn: those after a last answer, and EOS."""
        return frozenset([*self.specials.findall(self._after[0]), self._tokenizer.eos_token or ""])

    @functools.cached_property
    def endings(self) -> tuple[str, ...]:
        """What ends turns, longest first; empty if no special token does.

        The first special tokens after a last answer, as many as follow each other, and the first
        after an earlier one (``<|return|>`` and ``<|end|>`` of gpt-oss).
        """
        last, earlier = self._after
        first = self.specials.search(last)
        end = first.end() if first else 0
        while match := self.specials.match(last, end):
            end = match.end()
        found = [last[first.start() : end]] if first else []
        if other := self.specials.search(earlier):
            found.append(other.group())
        return tuple(sorted(set(found), key=len, reverse=True))

    @functools.cached_property
    def _after(self) -> tuple[str, str]:
        """What follows a last answer and an earlier one; "" if the template cannot be asked."""
        roles = ("user", "assistant", "user")
        asked = [{"role": r, "content": c} for r, c in zip(roles, _PROBE, strict=True)]
        try:
            last = Skeleton.of(self.render(asked[:2], None, "probe")).pieces
            earlier = Skeleton.of(self.render(asked, None, "probe")).pieces
        except InputError:
            return "", ""
        return last[-1], earlier[-2] if len(earlier) == 4 else ""

    @functools.cached_property
    def specials(self) -> re.Pattern[str]:
        """Matches any special token in a text, the longest first."""
        added = self._tokenizer.added_tokens_decoder.values()
        names = {str(token) for token in added if token.special}
        names.update(self._tokenizer.all_special_tokens)
        ordered = sorted((name for name in names if name), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    @property
    def _name(self) -> str:
        return f"tokenizer {self._tokenizer.name_or_path or type(self._tokenizer).__name__}"

    def _render_skeleton(self, form: str, source: str) -> Skeleton:
        marked, tools = json.loads(form)
        return Skeleton.of(self._apply(marked, tools, source))

    def _apply(self, messages: Any, tools: Any, source: str, *, prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            **self._variables(source),
        )
        return str(text)

    def _source(self, tools: list[dict[str, Any]] | None, where: str) -> str:
        try:
            return str(self._tokenizer.get_chat_template(None, tools=tools))
        except ValueError as error:
            raise InputError(
                "the tokenizer has no chat template",
                where=where,
                expected=f"a chat template in {self._name}",
                got=str(error).partition("!")[0],
                todo="use a chat model's tokenizer, set tokenizer.chat_template, or give rows as "
                "text, prompt and completion, or input_ids",
            ) from error

    def _variables(self, source: str) -> dict[str, Any]:
        if "strftime_now" not in source:
            return self._options
        return {**self._options, "strftime_now": self._date.strftime}

    def _refused(self, where: str, error: Exception) -> InputError:
        return InputError(
            "the chat template refuses this conversation",
            where=f"{where}, {self}",
            expected="roles and contents that the template takes",
            got=f"{type(error).__name__}: {error}",
            todo="correct the row, or use the template that the data was made for",
        )
