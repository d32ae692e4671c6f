"""A teacher that writes the completions it is to score: a dump's options, and those of sampling."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kdstore.align import tokenizer_digest
from kdstore.completion import Sampling
from kdstore.errors import UsageError
from kdstore.filesystem import Folder
from kdstore.generate.blocks import CompletionBuilder, CompletionCounters
from kdstore.generate.prompts import PromptSource
from kdstore.generate.stage import Generation, open_generation
from kdstore.inputs.prompts import PromptBuilder
from kdstore.teachers.scoring import Scoring
from kdstore.writers.dump import DumpSource

BACKENDS = ("hf", "vllm")
BLOCK_TOKENS = 1 << 18  # of completions at most, so much can a crash lose


def open_completions(
    scoring: Scoring, sampling: Sampling, folder: Folder, *, quiet: bool = False
) -> Generation:
    """The completions of the prompts in ``scoring``'s data, drawn with its seed.

    Raises UsageError for a backend that does not generate, and what ``open_generation`` raises.
    """
    options, info, config = scoring.options, scoring.backend.info, scoring.source.builder.config
    if options.backend not in BACKENDS:
        raise UsageError(
            "this backend does not generate",
            where="--generate",
            expected=f"--backend {' or '.join(BACKENDS)}",
            got=f"--backend {options.backend}",
        )
    stops = stop_ids(info.path, scoring.tokenizer, vocab_size=info.vocab_size)
    sampling = replace(sampling, seed=scoring.config.seed, stop_ids=stops)
    rows = scoring.source.rows
    source = PromptSource(
        rows=rows,
        builder=PromptBuilder(scoring.tokenizer, config, rows.name, locate=rows.locate),
        max_length=config.max_length,
        overlong=config.overlong,
    )
    identity = _identity(scoring, source, sampling)
    return open_generation(
        folder, source, sampling, identity, vocab_size=info.vocab_size, quiet=quiet
    )


def with_completions(scoring: Scoring, generation: Generation) -> Scoring:
    """The same teacher and options, over finished completions."""
    rows, settings = generation.completions(), generation.settings
    counters = CompletionCounters(
        num_prompts=settings.num_prompts, num_prompts_too_long=settings.num_too_long
    )
    builder = CompletionBuilder(
        scoring.tokenizer,
        scoring.source.builder.config,
        rows.name,
        locate=rows.locate,
        counters=counters,
    )
    return replace(scoring, source=DumpSource(rows, builder, scoring.source.score))


def stop_ids(path: Path, tokenizer: Any, *, vocab_size: int) -> tuple[int, ...]:
    """What ends a completion: EOS by the checkpoint's two configs and by its tokenizer."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = path / name
        eos = json.loads(file.read_bytes()).get("eos_token_id") if file.exists() else None
        found |= set(eos) if isinstance(eos, list) else {eos}
    return tuple(sorted(token for token in found if token is not None and token < vocab_size))


def _identity(scoring: Scoring, source: PromptSource, sampling: Sampling) -> dict[str, Any]:
    """What completions are, as JSON has it."""
    block_tokens = min(BLOCK_TOKENS, scoring.config.unit_tokens or BLOCK_TOKENS)
    return {
        "teacher": scoring.backend.info.identity,
        "tokenizer_digest": tokenizer_digest(scoring.tokenizer),
        "tokenization": source.builder.policy(),
        "input": source.builder.config.to_dict(),
        "max_length": source.max_length,
        "prompts": source.rows.fingerprint(),
        "sampling": {**asdict(sampling), "stop_ids": list(sampling.stop_ids)},
        "block_rows": max(1, block_tokens // (sampling.num_samples * sampling.max_tokens)),
    }
