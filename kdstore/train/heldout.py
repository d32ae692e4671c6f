"""Held-out samples: of a store, or text that is scored like the samples of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import kdstore
from kdstore.errors import StoreMismatchError
from kdstore.inputs import InputConfig, SampleBuilder, open_source
from kdstore.sample import Sample
from kdstore.train.config import EvalConfig
from kdstore.train.student import check_vocabulary, longest_sequence


def read_held_out(
    config: EvalConfig, tokenizer: Any, inputs: InputConfig, model: Any
) -> list[Sample]:
    """The samples of `eval.store`, or those of the text, tokenised as ``inputs`` says.

    Raises StoreMismatchError if they do not fit the student.
    """
    if config.store is None:
        samples = _of_text(config, tokenizer, inputs, model)
    else:
        samples = _of_store(config.store, tokenizer, model)
    return list(islice(samples, config.max_samples))


def _of_store(url: str, tokenizer: Any, model: Any) -> Iterator[Sample]:
    """Samples with what the teacher said of them."""
    store = kdstore.open(url)
    check_vocabulary(model, tokenizer, [store])
    limit = longest_sequence(model)
    for sample in store:
        if limit is not None and sample.num_tokens > limit:
            raise StoreMismatchError(
                "a held-out sample is longer than the student takes",
                where=f"{url}: sample {sample.sample_id!r}",
                expected=f"at most {limit} tokens (max_position_embeddings)",
                got=sample.num_tokens,
                todo="dump the held-out text with a smaller --max-length",
            )
        yield sample


def _of_text(
    config: EvalConfig, tokenizer: Any, inputs: InputConfig, model: Any
) -> Iterator[Sample]:
    """Text as samples, runs by the score rule.

    Rows longer than `eval.max_length` are split, whatever ``inputs`` does with them; by default
    that is the store's length or, if it is shorter, ``model``'s.
    """
    assert config.data is not None
    limit = longest_sequence(model)
    defaults = [length for length in (inputs.max_length, limit) if length]
    length = config.max_length or min(defaults, default=None)
    if limit is not None and length is not None and length > limit:
        raise StoreMismatchError(
            "held-out samples would be longer than the model takes",
            where="eval.max_length",
            expected=f"at most {limit} (max_position_embeddings)",
            got=length,
            todo="set eval.max_length",
        )
    source = open_source(config.data)
    inputs = replace(inputs, max_length=length, overlong="split")
    builder = SampleBuilder(tokenizer, inputs, source.name, locate=source.locate)
    for number, row in source.rows():
        for sample in builder.samples(number, row):
            yield sample.with_score_rule(config.score)
