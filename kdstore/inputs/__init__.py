"""From ``--data`` to samples: sources of rows, and what makes samples of them.

    source = open_source("train.jsonl")
    builder = SampleBuilder(tokenizer, InputConfig(), source.name, locate=source.locate)
    for number, row in source.rows():
        samples = builder.samples(number, row)

Tokenizers are handed in; nothing here imports torch, and `datasets` only to read its kinds.
"""

from kdstore.inputs.base import Row, Source
from kdstore.inputs.config import InputConfig
from kdstore.inputs.rows import InputCounters, SampleBuilder
from kdstore.inputs.sources import open_source

__all__ = ["InputConfig", "InputCounters", "Row", "SampleBuilder", "Source", "open_source"]
