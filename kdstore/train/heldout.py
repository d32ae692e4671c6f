"""Held-out text as samples that are scored like those of a store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdstore.errors import StoreMismatchError
from kdstore.inputs import InputConfig, SampleBuilder, open_source
from kdstore.sample import Sample
from kdstore.train.config import EvalConfig
from kdstore.train.student import longest_sequence


def read_held_out(
    config: EvalConfig, tokenizer: Any, inputs: InputConfig, model: Any
) -> list[Sample]:
    """The samples of the held-out text, tokenised as ``inputs`` says, runs by the score rule.

    Rows longer than `eval.max_length` are split, whatever ``inputs`` does with them; by default
    that is the store's length or, if it is shorter, ``model``'s. Raises StoreMismatchError if it
    is set to more than ``model`` takes.
    """
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
    samples = [sample for number, row in source.rows() for sample in builder.samples(number, row)]
    return [sample.with_score_rule(config.score) for sample in samples]
