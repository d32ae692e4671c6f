"""How far a dump has come, and who is at it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from kdstore.commit import Commit
from kdstore.readers.store import Store
from kdstore.writers.trace import Trace, read_traces

RECENT = 100  # the last commits by unit, whose rate is told
RUNNING, FAILED, STALE = "running", "failed", "stale"


def dump_status(store: Store, *, stale_after_s: float) -> dict[str, Any]:
    """Units and tokens done, running, failed and left; tokens a second, and seconds to the end.

    A record that is older than ``stale_after_s`` is stale: its worker was probably killed. The rate
    is that of the workers whose records are younger; it is None where there is none.
    """
    header, commits = store.header, store.commits
    traces = read_traces(store.folder, committed=set(commits.units.tolist()))
    records = [_record(trace, None, stale_after_s) for trace in traces]
    states = [record["state"] for record in records]
    tokens, planned = int(store.shard_tokens.sum()), header.plan.get("num_tokens")
    workers = {(r["host"], r["pid"]) for r in records if r["state"] == RUNNING}
    rate = _rate(commits[-RECENT:]) * len(workers) or None
    for name, overlay in store.overlays.found.items():
        traces = read_traces(overlay.folder, committed=overlay.commits)
        records += [_record(trace, name, stale_after_s) for trace in traces]
    return {
        "complete": store.is_complete,
        "units": len(commits),
        "units_planned": header.num_units,
        **{f"units_{state}": states.count(state) for state in (RUNNING, FAILED, STALE)},
        "units_left": header.num_units - len(commits) - len(states),
        "samples": len(store),
        "tokens": tokens,
        "tokens_planned": planned,
        "scored": int(commits.numbers("scored").sum()),
        "seconds": sum(_seconds(commit, "seconds") for commit in commits),
        "workers": len(workers),
        "tokens_per_s": rate,
        "eta_s": (planned - tokens) / rate if rate and planned else None,
        "overlays": {name: o.progress for name, o in store.overlays.found.items()},
        "records": records,
    }


def _rate(commits: list[Commit]) -> float:
    """Tokens a second of one worker: of scoring, and of waiting for what is not overlapped."""
    names = ("seconds", "wait_seconds")
    seconds = sum(_seconds(commit, name) for commit in commits for name in names)
    return sum(commit.shard.tokens for commit in commits) / seconds if seconds else 0.0


def _seconds(commit: Commit, name: str) -> float:
    value = commit.provenance.get(name)  # for people: whatever it may be
    return max(0.0, float(value)) if isinstance(value, int | float) else 0.0


def _record(trace: Trace, overlay: str | None, stale_after_s: float) -> dict[str, Any]:
    age_s = max(0.0, time.time() - trace.since_s)
    state = STALE if age_s > stale_after_s else RUNNING
    found = asdict(trace) | {"state": FAILED if trace.error is not None else state}
    return {**found, "overlay": overlay, "age_s": age_s}
