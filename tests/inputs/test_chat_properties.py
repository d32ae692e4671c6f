"""Any text may be said: the supervised text is the answer and its end-of-turn token."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inputs.input_helpers import builder, chat, one_sample, readable, supervised
from tests.inputs.input_tokenizers import CHATML, CHATML_GENERATION, LLAMA3, byte_level

LETTERS = st.sampled_from(
    [*"ab \n\té😀\u0301\u200d\u3000\xa0ſ", "👩‍👩‍👧", "assistant", "<|im_end|>"]
)
TEXTS = st.one_of(
    st.lists(LETTERS, max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
CHATS = st.lists(TEXTS, min_size=1, max_size=6)

PLAIN_BUILDER = builder(byte_level(CHATML))
GENERATION_BUILDER = builder(byte_level(CHATML_GENERATION))


@settings(deadline=None, max_examples=300)
@given(CHATS)
def test_supervised_is_what_was_said_and_its_end(texts: list[str]) -> None:
    row = chat(*texts)
    (sample,) = PLAIN_BUILDER.samples(0, row)
    answers = supervised(byte_level(), sample)
    said = [text + "<|im_end|>" for text in texts[1::2]]
    for answer, whole in zip(answers, said, strict=True):  # a first line break may be the header's
        assert answer == whole or (whole[0] == "\n" and answer == whole[1:])


@settings(deadline=None, max_examples=300)
@given(CHATS)
def test_the_same_as_a_template_that_says_what_it_generates(texts: list[str]) -> None:
    row = chat(*texts)
    (found,) = PLAIN_BUILDER.samples(0, row)
    (told,) = GENERATION_BUILDER.samples(0, row)
    assert found.input_ids_T.tolist() == told.input_ids_T.tolist()
    assert found.spans == told.spans


@settings(deadline=None, max_examples=300)
@given(CHATS)
def test_the_same_as_the_mask_of_transformers(texts: list[str]) -> None:
    """But for a token that answer and header share: theirs counts it, ours cannot be generated."""
    tokenizer = byte_level(CHATML_GENERATION)
    (told,) = GENERATION_BUILDER.samples(0, chat(*texts))
    theirs = tokenizer.apply_chat_template(
        chat(*texts)["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"] == told.input_ids_T.tolist()
    ours = np.zeros(told.num_tokens, dtype=np.int64)
    for span in told.spans:
        ours[span.start : span.end] = span.supervised
    differing = np.flatnonzero(ours != np.array(theirs["assistant_masks"]))
    shared = tokenizer("\n\n")["input_ids"]
    assert all([told.input_ids_T[position]] == shared for position in differing)


@settings(deadline=None, max_examples=200)
@given(CHATS)
def test_a_stripping_template(texts: list[str]) -> None:
    tokenizer = byte_level(LLAMA3)
    sample = one_sample(tokenizer, chat(*texts))
    said = [text.strip() + "<|eot_id|>" for text in texts[1::2]]
    assert supervised(tokenizer, sample) == said


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=30).filter(str.isprintable), st.text(max_size=30).filter(str.isprintable))
def test_prompt_and_completion_keep_every_token(prompt: str, completion: str) -> None:
    tokenizer = byte_level()
    samples = builder(tokenizer).samples(0, {"prompt": prompt, "completion": completion})
    if prompt + completion == "":
        assert samples == []
        return
    spans: list[Any] = readable(tokenizer, samples[0])
    ids = tokenizer(prompt + completion)["input_ids"]
    assert samples[0].input_ids_T.tolist() == [*ids, tokenizer.eos_token_id]
    assert spans[-1][0] == "assistant"
    assert spans[-1][2] is True
    answer = spans[-1][1].removesuffix("</s>")
    shared = max(len(answer) - len(completion), 0)
    assert answer[:shared].strip(" ") == ""
