"""``kdstore dump``: a teacher's signals over a data set, into a store."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, closing
from dataclasses import fields
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import click
from kdstore_cli.generating import generate, sampling_of
from kdstore_cli.output import print_json, print_table

from kdstore.errors import UsageError
from kdstore.filesystem import Folder
from kdstore.header import read_header

if TYPE_CHECKING:
    from kdstore.teacher import Teacher
    from kdstore.teachers.openai_options import ServerOptions
    from kdstore.teachers.ray_dump import RayOptions
    from kdstore.teachers.scoring import Scoring, ScoringOptions
    from kdstore.writers.overlay import OverlayWriter
    from kdstore.writers.pipeline import RunReport
    from kdstore.writers.plan import PlannedUnit
    from kdstore.writers.units import UnitWriter

ENGINE_OPTIONS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "quantization",
    "max_model_len",
    "gpu_memory_utilization",
)


@click.command()
@click.option("--teacher", required=True, help="Local folder of a causal LM.")
@click.option("--data", required=True, help="JSON lines, Parquet, text, a data set or its name.")
@click.option("--out", required=True, help="Folder or fsspec URL of the store.")
@click.option("--split", default="train", show_default=True, help="Split of a data set.")
@click.option("--backend", default="hf", show_default=True, help="hf, vllm or openai.")
@click.option("--server", help="URL of the backend openai: http://host:8000/v1.")
@click.option("--model", help="Its name for the teacher. Default: the only one that it has.")
@click.option(
    "--flavour",
    type=click.Choice(["vllm", "sglang"]),
    help="How it gives logprobs of prompts. Default: what it says it is.",
)
@click.option("--api-key-env", help="Variable that holds its key. Default: OPENAI_API_KEY, if set.")
@click.option("--concurrency", type=int, help="Requests in flight at most. Default: 32.")
@click.option("--requests-per-minute", type=float, help="Requests sent at most.")
@click.option("--timeout", "timeout_s", type=float, help="Seconds of silence. Default: 300.")
@click.option(
    "--select",
    "selection",
    default="pps:tau=0.02",
    show_default=True,
    help="topk:k=50, topp:p=0.95,max_k=100, pps:tau=0.02, counts:n=50 or full.",
)
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens of a sample at most.")
@click.option(
    "--overlong",
    type=click.Choice(["split", "truncate", "error"]),
    default="split",
    show_default=True,
    help="What happens to samples longer than --max-length; counted either way.",
)
@click.option(
    "--add-bos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="BOS before text rows; auto: as the tokenizer does it.",
)
@click.option(
    "--add-eos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="EOS after text rows, supervised; auto: if the tokenizer has one.",
)
@click.option("--template-date", default="2025-01-01", help="What chat templates see as today.")
@click.option("--template-options", default="{}", help="More chat template variables, as JSON.")
@click.option("--keep-text", is_flag=True, help="Store texts and messages beside the tokens.")
@click.option(
    "--score",
    type=click.Choice(["supervised", "all"]),
    default="supervised",
    show_default=True,
    help="Which positions get a signal: the supervised ones, or all but the first.",
)
@click.option(
    "--audit-fraction",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the scored positions whose full distribution is kept, for stats --fidelity.",
)
@click.option("--temperatures", default="", help="Record the log-sum-exp at these: 1.5,2.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=16_384,
    show_default=True,
    help="Tokens of a teacher's batch at most, padding included.",
)
@click.option(
    "--unit-tokens",
    type=click.IntRange(min=1),
    help="Tokens of a unit: one shard, one commit. Default: 4 Mi, fewer for large selections.",
)
@click.option(
    "--unit",
    "worker",
    default="0/1",
    help="i/N: only units i, i+N, i+2N, …; auto: i and N from Slurm or torchrun.",
)
@click.option("--generate", is_flag=True, help="Score what the teacher answers to prompts.")
@click.option("--num-samples", type=click.IntRange(min=1), help="Answers to a prompt. [1]")
@click.option("--temperature", type=float, help="Of --generate; 0: the most probable. [1.0]")
@click.option("--top-p", type=float, help="Of --generate: the fewest that reach p. [1.0]")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Of an answer. [512]")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="This process, or workers of a Ray cluster: that of RAY_ADDRESS, or one of its own.",
)
@click.option(
    "--ray-workers", type=click.IntRange(min=1), help="Default: as many as there is room for."
)
@click.option(
    "--ray-resources",
    help='Of a worker: {"num_gpus": 1}. Default: GPUs for all parts of a teacher, or CPUs.',
)
@click.option("--device", help="Default: cuda where there is one, else cpu.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16.")
@click.option("--tensor-parallel-size", type=click.IntRange(min=1), help="Of vLLM's engine.")
@click.option("--pipeline-parallel-size", type=click.IntRange(min=1), help="Of vLLM's engine.")
@click.option("--quantization", help="Of vLLM's engine: fp8, awq, …")
@click.option("--max-model-len", type=click.IntRange(min=2), help="Of vLLM's engine.")
@click.option("--gpu-memory-utilization", type=click.FloatRange(0, 1), help="Of vLLM's engine.")
@click.option("--vllm-options", default="{}", help="More of vLLM's engine options, as JSON.")
@click.option("--overlay", help="Add to a finished store, under this name, what comes next.")
@click.option("--draw", type=click.IntRange(min=1), help="Another draw of its selection.")
@click.option("--scalars", help="More scalars: lse, lse_T1.5.")
@click.option("--plan-only", is_flag=True, help="Write header, id order and plan, then stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def dump(**options: Any) -> None:
    """Score a data set with a teacher and store the signals. Run it again to resume."""
    with ExitStack() as resources:
        _dump(options, resources)


def _dump(options: dict[str, Any], resources: ExitStack) -> None:
    from kdstore.teachers.generating import open_completions, with_completions
    from kdstore.teachers.scoring import Scoring
    from kdstore.writers.pipeline import RunReport
    from kdstore.writers.run import run_units
    from kdstore.writers.worker import worker_of

    ray = _ray_options(options)
    worker, num_workers = worker_of(options["worker"], os.environ)
    folder = Folder(options["out"])
    _check_overlay_options(options)
    if options["overlay"] is not None:
        read_header(folder)  # there must be a store, which a dump would make
    sampling = sampling_of(options)
    scoring = Scoring.of(_scoring_options(options))
    load_teacher = cache(partial(_loaded, resources, scoring))
    if sampling is not None:
        generation = open_completions(scoring, sampling, folder, quiet=options["quiet"])
        pending = generation.pending_blocks(worker=worker, num_workers=num_workers)
        if not generate(generation, pending, load_teacher, options):
            return
        scoring = with_completions(scoring, generation)
    store = scoring.open_store(folder, quiet=options["quiet"])
    writer = store if options["overlay"] is None else _open_overlay(options)
    pending = writer.pending_units(worker=worker, num_workers=num_workers)
    report, quiet = RunReport(), options["quiet"]
    if pending and not options["plan_only"]:
        planned = [store.plan.unit(unit) for unit in pending]
        if ray is not None:
            report = _run_over_ray(scoring.options, options["out"], ray, planned, quiet=quiet)
        else:
            teacher, source = load_teacher(), scoring.source
            report = run_units(writer, teacher, source, planned, quiet=quiet, stop_on_signals=True)
    writer.seal()
    _report(writer, report, as_json=options["as_json"], quiet=quiet)


def _loaded(resources: ExitStack, scoring: Scoring) -> Teacher:
    return resources.enter_context(closing(scoring.load_teacher()))


def parse_options(text: str, option: str) -> dict[str, Any]:
    """The JSON object in an option; UsageError for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(
            f"cannot read {option}",
            where=option,
            expected='a JSON object such as {"name": false}',
            got=text,
        )
    return value


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _scoring_options(options: dict[str, Any]) -> ScoringOptions:
    from kdstore.select.scalars import LSE_T_PREFIX, temperature_of
    from kdstore.teachers.scoring import ScoringOptions

    names = {one.name for one in fields(ScoringOptions)}
    given = {name: value for name, value in options.items() if name in names}
    temperatures = [f"{LSE_T_PREFIX}{part}" for part in _parts(options["temperatures"])]
    return ScoringOptions(
        **given
        | {
            "path": options["teacher"],
            "server": _server(options),
            "select": options["selection"],
            "temperatures": list(map(temperature_of, temperatures)),
            "template_options": parse_options(options["template_options"], "--template-options"),
            "vllm": _engine_options(options),
        }
    )


def _engine_options(options: dict[str, Any]) -> dict[str, Any]:
    """What vLLM's engine is told; UsageError for such options with another backend."""
    given = {name: options[name] for name in ENGINE_OPTIONS if options[name] is not None}
    given |= parse_options(options["vllm_options"], "--vllm-options")
    if given and options["backend"] != "vllm":
        raise UsageError(
            "an option of vLLM's engine without that engine",
            expected="--backend vllm",
            got=f"--backend {options['backend']} with {', '.join(given)}",
        )
    return given


def _server(options: dict[str, Any]) -> ServerOptions | None:
    """The server that the options name; UsageError for options of a server without one."""
    from kdstore.teachers.openai_options import ServerOptions

    names = [one.name for one in fields(ServerOptions) if one.name != "url"]
    given = {name: options[name] for name in names if options[name] is not None}
    if given and options["server"] is None:
        raise UsageError(
            f"{', '.join(given)} without a server", expected="--server http://host:8000/v1"
        )
    return None if options["server"] is None else ServerOptions(url=options["server"], **given)


def _check_overlay_options(options: dict[str, Any]) -> None:
    """UsageError unless draw and scalars come with an overlay, and it with one of the two."""
    given = [f"--{name}" for name in ("overlay", "draw", "scalars") if options[name] is not None]
    if given and options["backend"] == "openai":
        raise UsageError(
            "an overlay needs full logits, and a server gives the most probable tokens",
            where="--overlay",
            todo="use a backend that has full logits: hf or vllm",
        )
    if given not in ([], ["--overlay", "--draw"], ["--overlay", "--scalars"]):
        raise UsageError(
            "an overlay adds a draw, or scalars, to a store",
            expected="--overlay NAME with --draw N or with --scalars NAMES",
            got=" ".join(given),
        )


def _ray_options(options: dict[str, Any]) -> RayOptions | None:
    """What the options say of Ray, None for another engine; UsageError for what does not fit."""
    over_ray = options["engine"] == "ray"
    names = {
        "--ray-workers": options["ray_workers"],
        "--ray-resources": options["ray_resources"],
        "--unit": None if options["worker"] == "0/1" else options["worker"],
        "--overlay": options["overlay"],
        "--generate": options["generate"] or None,
    }
    misfits = list(names)[2:] if over_ray else list(names)[:2]
    given = [name for name in misfits if names[name] is not None]
    if given:
        raise UsageError(
            f"the engine {options['engine']} does not take {', '.join(given)}",
            where="--engine",
            todo="leave it out" if over_ray else "give --engine ray",
        )
    if not over_ray:
        return None
    from kdstore.teachers.ray_dump import RayOptions, import_ray

    import_ray()  # before anything is planned
    resources = parse_options(options["ray_resources"] or "{}", "--ray-resources")
    return RayOptions(workers=options["ray_workers"], resources=resources)


def _run_over_ray(
    scoring: ScoringOptions,
    out: str,
    ray: RayOptions,
    planned: list[PlannedUnit],
    *,
    quiet: bool,
) -> RunReport:
    from kdstore.teachers.ray_dump import RayDump
    from kdstore.writers.run import run_engine

    return run_engine(
        lambda stopping: RayDump(scoring, out, ray, stopping=stopping),
        planned,
        quiet=quiet,
        stop_on_signals=True,
    )


def _open_overlay(options: dict[str, Any]) -> OverlayWriter:
    from kdstore.readers.store import Store
    from kdstore.teachers.scoring import scalar_names
    from kdstore.writers.overlay import OverlayWriter

    return OverlayWriter.open(
        Store(Folder(options["out"])),
        options["overlay"],
        draw=options["draw"] or 0,
        scalars=scalar_names(_parts(options["scalars"] or "")),
    )


def _report(writer: UnitWriter, run: RunReport, *, as_json: bool, quiet: bool) -> None:
    shards = [commit.shard for commit in writer.commits.values()]
    scored = sum(shard.scored for shard in shards)
    size = sum(shard.bytes for shard in shards)
    found = {
        "url": writer.folder.url,
        "complete": len(shards) == writer.header.num_units,
        "units": f"{len(shards)} of {writer.header.num_units}",
        "samples": sum(shard.rows for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "scored": scored,
        "bytes": size,
        "bytes_per_position": size / max(scored, 1),
        **run.to_dict(),
        **writer.header.plan.get("input", {}),
    }
    if as_json:
        print_json(found)
    elif not quiet:
        print_table(found.items())
