"""Tokens per second from disk to packed batches of tensors, next to other libraries.

    scripts/bench load [--teacher PATH --data FILE.jsonl] [--peers streaming,litdata] [--quick]

All sides hold the same samples and give the same batches: 65,536 tokens of shuffled samples in one
row, with the signal in CSR form; ours of at most as many, theirs of as many samples as have that
many tokens on average. Each side runs in a process of its own, peers in environments of their own
under build/peers. Data have been read before, so they come from the page cache. Sides are timed in
turns, after an epoch that warms up; figures are medians over the rounds, ratios those of the
rounds' ratios. ``core`` means one core without workers.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.figures import machine, print_failure, print_figure
from benchmarks.load_payload import read_windows, repeated, score_stream, write_payload
from benchmarks.load_peers import PEERS, PeerError, Process, install, is_installed, start
from benchmarks.rate import write_store
from benchmarks.scored import SELECTIONS, Scored
from kdstore.readers.store import Store

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny"
STORES = {"pps": "pps06", "topk50": "topk50"}
WORKERS = (0, 1, 2)
BATCH_TOKENS = 65_536
PACK_TOKENS = (4096, BATCH_TOKENS)
EPOCHS_OF_MEMORY = (2, 20)
BARE_ROUNDS = 3
OURS = "kdstore"
# Peers keep log-probabilities in float16, DistillKit those of a fit.
TOLERANCE = {OURS: 1e-6, "distillkit": 0.1}
PEER_TOLERANCE = 1e-3
SPEED = "tokens/s"

Figure = tuple[str, float, str, dict[str, Any]]
Speeds = Mapping[tuple[str, int], Sequence[float]]


@dataclass(frozen=True)
class Run:
    """How much is measured: tokens of a store, tokens that are scored, and how often."""

    tokens: int
    scored: int
    rounds: int
    epochs: int


QUICK = Run(tokens=300_000, scored=100_000, rounds=3, epochs=2)
FULL = Run(tokens=2_000_000, scored=300_000, rounds=7, epochs=2)


class Payloads:
    """A store's samples as peers get them: all, or the first ones for a slow peer."""

    def __init__(self, folder: Path, store: Store, run: Run) -> None:
        self._folder, self._store, self._run = folder, store, run
        self._made: dict[float, tuple[Path, dict[str, float]]] = {}

    def of(self, side: str) -> tuple[Path, dict[str, float]]:
        """The folder for a side, and what it must deliver."""
        share = PEERS[side].share if side in PEERS else 1.0
        if share not in self._made:
            target, tokens = self._folder / f"payload-{share}", int(share * self._run.tokens)
            limit = None if share == 1 else tokens
            sums = write_payload(target, self._store, tokens=limit, batch_tokens=BATCH_TOKENS)
            self._made[share] = target, sums
        return self._made[share]


class Sides:
    """kdstore and the peers that hold one selection, each checked and then timed in turns."""

    def __init__(self, stack: ExitStack, folder: Path, selection: str) -> None:
        self._stack, self._folder, self._selection = stack, folder, selection
        self.processes: dict[str, Process] = {}

    def add(self, name: str, payload: Path, sums: Mapping[str, float]) -> None:
        """Start a side and compare what it delivers; a peer that fails is reported, not added."""
        try:
            process = self._stack.enter_context(start(name, payload, self._folder / name))
            expect_content(name, process.ask("check", workers=0), sums)
            self.processes[name] = process
        except PeerError as error:
            self._fail(name, error)

    def time(self, run: Run) -> Speeds:
        """Tokens per second of each side with each number of workers, round by round."""
        speeds: dict[tuple[str, int], list[float]] = defaultdict(list)
        ways = [(name, workers) for workers in WORKERS for name in self.processes]
        for _ in range(run.rounds):
            for name, workers in list(ways):
                try:
                    took = self.processes[name].ask("time", workers=workers, epochs=run.epochs)
                    speeds[name, workers].append(took["tokens"] / took["seconds"])
                except PeerError as error:
                    ways.remove((name, workers))
                    speeds.pop((name, workers), None)
                    self._fail(name, error, workers=workers)
        return speeds

    def _fail(self, name: str, error: PeerError, **about: Any) -> None:
        print_failure(
            figure_of(name, self._selection), str(error), **about_of(self._selection), **about
        )


def figure_of(side: str, selection: str) -> str:
    """How the figures of a side begin."""
    return f"load.{selection}" if side == OURS else f"load.peer.{side}"


def about_of(selection: str) -> dict[str, Any]:
    """What each figure says of its selection."""
    return {"selection": SELECTIONS[STORES[selection]]}


def expect_content(name: str, got: Mapping[str, float], sums: Mapping[str, float]) -> None:
    """PeerError unless an epoch had every sample, all entries, and their values as far as kept."""
    for what, expected in sums.items():
        share = TOLERANCE.get(name, PEER_TOLERANCE) if what == "logprobs" else 0.0
        if abs(got[what] - expected) > share * abs(expected):
            raise PeerError(f"delivers other {what}: {got[what]}, expected {expected}")


def usable_peers(names: Sequence[str], *, quick: bool) -> list[str]:
    """The peers whose environments are there or could be made; the others are reported."""
    usable = []
    for name in names:
        try:
            if quick and not is_installed(PEERS[name]):
                raise PeerError("not installed yet, and --quick installs nothing")
            install(PEERS[name])
            usable.append(name)
        except PeerError as error:
            print_failure(f"load.peer.{name}", str(error))
    return usable


def size_figures(sides: Sides, payloads: Payloads, selection: str) -> Iterator[Figure]:
    """Bytes on disk of each side."""
    for name, process in sides.processes.items():
        size = process.ready["bytes_on_disk"] / payloads.of(name)[1]["tokens"]
        about = {"version": process.ready["version"]}
        yield f"{figure_of(name, selection)}.bytes_per_token", size, "bytes", about


def speed_figures(speeds: Speeds, selection: str) -> Iterator[Figure]:
    """All speeds, and ours over the fastest peer's."""
    for (name, workers), values in speeds.items():
        core = "_core" if workers == 0 else ""
        figure = f"{figure_of(name, selection)}.tokens_per_s{core}"
        yield figure, float(np.median(values)), SPEED, {"workers": workers}
    for workers in WORKERS:
        peers = {n: np.median(v) for (n, w), v in speeds.items() if w == workers and n != OURS}
        if peers and (OURS, workers) in speeds:
            best = max(peers, key=lambda name: peers[name])
            ratio = np.median(np.divide(speeds[OURS, workers], speeds[best, workers]))
            about = {"workers": workers, "peer": best}
            yield "load.best_peer_ratio", float(ratio), "times as fast", about


def own_figures(ours: Process) -> Iterator[Figure]:
    """Growth of resident memory, how full packs are, the speed of reading and decoding alone."""
    early, late = ours.ask("resident", after=EPOCHS_OF_MEMORY)["resident_mb"]
    yield "load.rss_growth", late - early, "MB", {"epochs": EPOCHS_OF_MEMORY}
    yield "load.rss_growth.ratio", late / early, "times as much", {"epochs": EPOCHS_OF_MEMORY}
    took = ours.ask("bare", rounds=BARE_ROUNDS)
    bound = took["tokens"] / (took["read"] + took["decode"])
    parts = {name: took["tokens"] / took[name] for name in ("read", "decode")}
    yield "load.bound.tokens_per_s_core", bound, SPEED, parts
    for length in PACK_TOKENS:
        found = ours.ask("fill", max_length=length)
        yield "load.pack.fill", found["fill"], "of the packs' tokens", {"max_length": length}


def measure(
    teacher: str, scored: Scored, selection: str, *, peers: Sequence[str], run: Run
) -> Iterator[Figure]:
    """All figures of one selection."""
    name = STORES[selection]
    with tempfile.TemporaryDirectory(prefix="load-") as path, ExitStack() as stack:
        folder = Path(path)
        store = write_store(teacher, repeated(scored, name, tokens=run.tokens), name, folder)
        payloads, sides = Payloads(folder, store, run), Sides(stack, folder, selection)
        for side in [OURS, *(peer for peer in peers if selection in PEERS[peer].selections)]:
            sides.add(side, *payloads.of(side))
        yield from size_figures(sides, payloads, selection)
        yield from speed_figures(sides.time(run), selection)
        if OURS in sides.processes:
            yield from own_figures(sides.processes[OURS])


@click.command()
@click.option("--teacher", default=str(EXAMPLE / "teacher"), help="Folder of a causal model.")
@click.option("--data", default=EXAMPLE / "text" / "teacher.jsonl", type=click.Path(path_type=Path))
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Which peers.")
@click.option("--tokens", type=int, help=f"Of each store; {FULL.tokens:,} by default.")
@click.option("--quick", is_flag=True, help=f"{QUICK.tokens:,} tokens, and installs no peer.")
def main(teacher: str, data: Path, peers: str, tokens: int | None, quick: bool) -> None:
    """Print a JSON line for each figure."""
    run = QUICK if quick else FULL
    run = replace(run, tokens=tokens or run.tokens)
    names = usable_peers([name for name in peers.split(",") if name], quick=quick)
    windows = read_windows(teacher, data, tokens=run.scored)
    scored = score_stream(teacher, windows, list(STORES.values()))
    about = {"tokens": run.tokens, "rounds": run.rounds, "machine": machine()}
    for selection in STORES:
        found = measure(teacher, scored, selection, peers=names, run=run)
        for figure, value, unit, more in found:
            print_figure(figure, value, unit, **about_of(selection), **more, **about)


if __name__ == "__main__":
    main()
