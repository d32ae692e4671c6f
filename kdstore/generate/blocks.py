"""Blocks of completions: what one file of ``generated/`` holds, and the rows that it gives."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdstore.codecs.rows import PLAIN_COLUMNS, span_dict
from kdstore.completion import Completion
from kdstore.filesystem import Folder
from kdstore.hashing import canonical_json
from kdstore.inputs import InputConfig, InputCounters, Row, SampleBuilder
from kdstore.inputs.files import InputFile, file_system_of
from kdstore.inputs.parquet import ParquetSource
from kdstore.layout import GENERATED, block_path
from kdstore.sample import Sample, Span

ANNOTATION = "generation"  # key in a sample's metadata
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        *((name, PLAIN_COLUMNS[name]) for name in ("input_ids", "spans", "metadata")),
    ]
)


def block_bytes(completed: Sequence[tuple[Sample, Completion]]) -> bytes:
    """A Parquet file of rows as a dump takes them: each sample with what followed it."""
    rows = [_row(prompt, completion) for prompt, completion in completed]
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _row(prompt: Sample, completion: Completion) -> Row:
    ids_T = np.concatenate([prompt.input_ids_T, completion.ids_T])
    answer = Span(prompt.num_tokens, len(ids_T), "assistant", supervised=True)
    said = {"prompt": prompt.sample_id, "finish_reason": completion.finish_reason}
    metadata = {**(prompt.metadata or {}), ANNOTATION: said}
    return {
        "id": completion.sample_id,
        "input_ids": ids_T,
        "spans": [span_dict(span) for span in (*prompt.spans, answer)],
        "metadata": canonical_json(metadata).decode("utf-8"),
    }


class CompletionSource(ParquetSource):
    """The rows of all blocks, in order of their prompts. ``identity`` says how they were made."""

    kind = "generated"

    def __init__(self, folder: Folder, *, num_blocks: int, identity: dict[str, Any]) -> None:
        locations = [folder.location(block_path(block)) for block in range(num_blocks)]
        files = [InputFile(*file_system_of(location), location) for location in locations]
        super().__init__(files, name=GENERATED, location=folder.location(GENERATED))
        self._identity = identity

    def fingerprint(self) -> dict[str, Any]:
        """Also how the completions were made."""
        return {**super().fingerprint(), ANNOTATION: self._identity}


@dataclass
class CompletionCounters(InputCounters):
    """Also of completions: their tokens, and how many ended for want of room."""

    num_prompts: int = 0
    num_prompts_too_long: int = 0
    num_completion_tokens: int = 0
    num_completions_cut: int = 0


class CompletionBuilder(SampleBuilder):
    """Samples of completions, counted."""

    counters: CompletionCounters

    def __init__(
        self,
        tokenizer: Any,
        config: InputConfig,
        source_name: str,
        *,
        locate: Callable[[int], str] | None = None,
        counters: CompletionCounters,
    ) -> None:
        super().__init__(tokenizer, config, source_name, locate=locate)
        self.counters = counters

    def samples(self, row_number: int, row: Row) -> list[Sample]:
        """The sample of a row, as ``SampleBuilder`` gives it."""
        samples = super().samples(row_number, row)
        for sample in samples:
            said = (sample.metadata or {})[ANNOTATION]
            self.counters.num_completions_cut += said["finish_reason"] == "length"
            self.counters.num_completion_tokens += sample.spans[-1].end - sample.spans[-1].start
        return samples
