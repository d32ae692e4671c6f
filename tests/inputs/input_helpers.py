"""What tests of samples share: rows in, readable spans out."""

from __future__ import annotations

from typing import Any

from kdstore.inputs import InputConfig, SampleBuilder
from kdstore.sample import Sample

Spoken = tuple[str, str, bool]


def builder(tokenizer: Any, **options: Any) -> SampleBuilder:
    return SampleBuilder(tokenizer, InputConfig(**options), "src")


def one_sample(tokenizer: Any, row: dict[str, Any], **options: Any) -> Sample:
    (sample,) = builder(tokenizer, **options).samples(0, row)
    return sample


def readable(tokenizer: Any, sample: Sample) -> list[Spoken]:
    """(kind, decoded text, supervised) of each span; checks that spans cover the tokens."""
    borders = [0, *(span.end for span in sample.spans)]
    assert [span.start for span in sample.spans] == borders[:-1]
    assert borders[-1] == sample.num_tokens
    return [
        (span.kind, tokenizer.decode(sample.input_ids_T[span.start : span.end]), span.supervised)
        for span in sample.spans
    ]


def supervised(tokenizer: Any, sample: Sample) -> list[str]:
    """The decoded runs of scored tokens under the rule "supervised"."""
    runs = sample.with_score_rule("supervised").runs
    return [tokenizer.decode(sample.input_ids_T[start:end]) for start, end in runs]


def chat(*texts: str, roles: tuple[str, ...] = ("user", "assistant")) -> dict[str, Any]:
    """A row of messages whose roles take turns."""
    return {
        "messages": [
            {"role": roles[i % len(roles)], "content": text} for i, text in enumerate(texts)
        ]
    }
