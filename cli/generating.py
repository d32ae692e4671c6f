"""``kdstore dump --generate``: the stage that comes before the dump."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kdstore_cli.output import print_json, print_table

from kdstore.errors import UsageError

if TYPE_CHECKING:
    from kdstore.completion import Sampling
    from kdstore.generate.stage import Generation

SAMPLING_OPTIONS = {  # option -> field of Sampling
    "num_samples": "num_samples",
    "temperature": "temperature",
    "top_p": "top_p",
    "max_new_tokens": "max_tokens",
}


def sampling_of(options: dict[str, Any]) -> Sampling | None:
    """How to generate, None for not at all; UsageError for such options without --generate."""
    from kdstore.completion import Sampling

    given = {name: options[name] for name in SAMPLING_OPTIONS if options[name] is not None}
    if not options["generate"]:
        if given:
            raise UsageError(
                "an option of generation without it",
                expected="--generate",
                got=", ".join(f"--{name.replace('_', '-')}" for name in given),
            )
        return None
    if options["keep_text"]:
        raise UsageError(
            "completions are kept as tokens",
            expected="--generate without --keep-text",
            got="both",
            todo="leave --keep-text out, and decode input_ids",
        )
    return Sampling(**{SAMPLING_OPTIONS[name]: value for name, value in given.items()})


def generate(
    generation: Generation,
    pending: list[int],
    load_teacher: Callable[[], Any],
    options: dict[str, Any],
) -> bool:
    """Complete this worker's pending blocks; whether all blocks are there, else says which not."""
    if pending and not options["plan_only"]:
        generation.run(load_teacher(), pending, quiet=options["quiet"])
    missing, total = generation.pending_blocks(), generation.settings.num_blocks
    found = {
        "url": generation.folder.url,
        "complete": False,
        "generated": f"{total - len(missing)} of {total} blocks",
        "missing": ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else ""),
        "to do": "once all blocks are there, run the same command again to score them",
    }
    if missing and options["as_json"]:
        print_json(found)
    elif missing and not options["quiet"]:
        print_table(found.items())
    return not missing
