"""``kdstore dump``: a teacher's signals over a data set, into a store."""

from __future__ import annotations

import json
from typing import Any

import click

from kdstore.errors import UsageError


@click.command()
@click.option("--teacher", required=True, help="Local folder of a causal LM.")
@click.option("--data", required=True, help="JSON lines, Parquet, text, a data set or its name.")
@click.option("--out", required=True, help="Folder or fsspec URL of the store.")
@click.option("--split", default="train", show_default=True, help="Split of a data set.")
@click.option("--backend", type=click.Choice(["hf"]), default="hf", show_default=True)
@click.option("--select", "selection", default="pps:tau=0.06", show_default=True)
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens of a sample at most.")
@click.option(
    "--overlong",
    type=click.Choice(["split", "truncate", "error"]),
    default="split",
    show_default=True,
    help="What happens to samples longer than --max-length; counted either way.",
)
@click.option("--add-bos", type=click.Choice(["auto", "always", "never"]), default="auto")
@click.option("--add-eos", type=click.Choice(["auto", "always", "never"]), default="auto")
@click.option("--keep-text", is_flag=True, help="Store texts and messages beside the tokens.")
@click.option("--score", type=click.Choice(["supervised", "all"]), default="supervised")
@click.option("--temperatures", default="", help="Temperatures whose log-sum-exp is recorded.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--batch-tokens", type=click.IntRange(min=1), default=16_384, show_default=True)
@click.option("--unit-tokens", type=click.IntRange(min=1), default=1 << 22, show_default=True)
@click.option("--unit", "worker", default="0/1", help="i/N: only units i, i+N, i+2N, …")
@click.option("--device", help="Default: cuda where there is one, else cpu.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16.")
@click.option("--plan-only", is_flag=True, help="Write header, id order and plan, then stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def dump(**options: Any) -> None:
    """Score a data set with a teacher and store the signals. Run it again to resume."""
    from kdstore.inputs import InputConfig, SampleBuilder, open_source
    from kdstore.teachers.hf_load import default_device, describe_checkpoint, load_tokenizer
    from kdstore.writers.dump import DumpConfig, DumpSource, open_dump, run_units

    worker, num_workers = parse_worker(options["worker"])
    config = DumpConfig(
        selection=_canonical(options["selection"]),
        scalars=_scalars(options["temperatures"]),
        score=options["score"],
        unit_tokens=options["unit_tokens"],
        seed=options["seed"],
    )
    device = options["device"] or default_device()
    info = describe_checkpoint(options["teacher"], dtype=options["dtype"], device=device)
    tokenizer = load_tokenizer(info.path)
    rows = open_source(options["data"], split=options["split"])
    input_config = InputConfig(
        max_length=_max_length(options["max_length"], info.max_length),
        overlong=options["overlong"],
        add_bos=options["add_bos"],
        add_eos=options["add_eos"],
        keep_text=options["keep_text"],
    )
    source = DumpSource(rows, SampleBuilder(tokenizer, input_config, rows.name), config.score)
    writer = open_dump(
        _folder(options["out"]),
        source,
        teacher=info.identity,
        vocab_size=info.vocab_size,
        tokenizer=tokenizer,
        config=config,
        quiet=options["quiet"],
    )
    counted = source.builder.counters()
    pending = writer.pending_units(worker=worker, num_workers=num_workers)
    if pending and not options["plan_only"]:
        teacher = _teacher(info, tokenizer, device, options["batch_tokens"])
        run_units(writer, teacher, source, pending, quiet=options["quiet"])
    complete = writer.seal()
    _report(writer, counted, complete=complete, as_json=options["as_json"])


def parse_worker(text: str) -> tuple[int, int]:
    """The pair (i, N) in ``i/N``; UsageError unless 0 <= i < N."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UsageError("cannot read the worker", where="--unit", expected="i/N, i < N", got=text)
    return int(index), int(count)
