"""Reading everything once: every byte, count and id of a store against what was committed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import xxhash

from kdstore.align.tokenizer_files import TOKENIZER_FILE
from kdstore.audit import audit_runs
from kdstore.commit import Commit, ShardRecord, read_part
from kdstore.commits import Commits
from kdstore.errors import HeaderError, KDStoreError, StorageError
from kdstore.filesystem import Folder
from kdstore.hashing import sha256_hex
from kdstore.layout import AUDIT_SIGNAL, PLAN, TOKENIZER, commit_path
from kdstore.overlay import Overlay
from kdstore.readers.overlay import OverlayReader
from kdstore.readers.store import Store
from kdstore.sample import Sample
from kdstore.writers.plan import Plan

_BLOCK_BYTES = 1 << 22


@dataclass
class VerifyReport:
    """What was checked, and every problem found: none means that the store is whole."""

    num_units: int = 0
    num_samples: int = 0
    num_scored: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every byte, count and id checks out."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report, ready for JSON."""
        return {
            "ok": self.ok,
            "num_units": self.num_units,
            "num_samples": self.num_samples,
            "num_scored": self.num_scored,
            "problems": self.problems,
        }


def verify_store(
    store: Store, *, on_unit: Callable[[int], None] = lambda count: None
) -> VerifyReport:
    """Check a store against its header, plan and commits; problems are gathered, not raised.

    An unfinished store is a problem: its counts are not those of its plan.
    """
    report = VerifyReport()
    if not store.is_complete:
        report.problems.append(
            f"the dump is unfinished: {len(store.commits)} of {store.header.num_units} units"
        )
    plan = _gather(report, _read_plan, store)
    _check_files(store, report)
    decoder = _gather(report, lambda: store.decoder)
    if plan is None or decoder is None:
        return report
    for overlay in store.overlays.found.values():
        if len(overlay.commits) < overlay.header.num_units:
            report.problems.append(f"overlay {overlay.name} is unfinished: {overlay.progress}")
    audited = AUDIT_SIGNAL in store.header.identity["signals"]
    audit = store.with_signal(AUDIT_SIGNAL) if audited else None
    for index in range(len(store.commits)):
        _verify_unit(store, index, plan, report, audit=audit)
        on_unit(1)
    return report


def _gather(report: VerifyReport, check: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return check(*arguments)
    except StorageError:
        raise  # a dead network is no fault of the store
    except (KDStoreError, OSError) as error:
        if str(error) not in report.problems:  # rows of a damaged row group say the same, twice
            report.problems.append(str(error))
        return None


def _read_plan(store: Store) -> Plan:
    plan = Plan.from_bytes(
        read_part(store.folder, PLAN),
        expected_digest=store.header.identity["plan_digest"],
        where=store.folder.location(PLAN),
    )
    found = {
        "units": plan.num_units,
        "num_tokens": plan.total("num_tokens"),
        "num_scored": plan.total("num_scored"),
    }
    for name, value in found.items():
        if store.header.plan.get(name) != value:
            raise HeaderError(
                f"plan and header disagree on {name}",
                where=store.folder.location(PLAN),
                expected=store.header.plan.get(name),
                got=value,
            )
    return plan


def _check_files(store: Store, report: VerifyReport) -> None:
    """The files written with the header, and the token table against the identity."""
    for path, digest in store.header.files.items():
        data = _gather(report, read_part, store.folder, path)
        if data is not None and sha256_hex(data) != digest:
            where = store.folder.location(path)
            report.problems.append(
                f"{where}: SHA-256 is {sha256_hex(data)}, the header has {digest}"
            )
    identity = store.header.identity
    if store.header.files.get(f"{TOKENIZER}/{TOKENIZER_FILE}") != identity["tokenizer_digest"]:
        report.problems.append("the stored tokenizer is not the one that the identity names")
    table = _gather(report, store.token_table)
    if table is not None and table.fingerprint() != identity["vocab_digest"]:
        report.problems.append("the token table is not the one that the identity names")


def _verify_unit(
    store: Store, index: int, plan: Plan, report: VerifyReport, *, audit: Store | None
) -> None:
    unit, record = int(store.commits.units[index]), store.commits.record(index)
    _verify_files(store.folder, store.commits, index, report)
    planned = plan.unit(unit)
    found_overlays = store.overlays.found.values()
    overlays = [_overlay_reader(store, overlay, index, report) for overlay in found_overlays]
    found: list[tuple[str, int]] = []
    scored = 0
    audited: dict[str, Any] = {}
    for row, sample in _samples(store, index, report):
        found.append((sample.sample_id, sample.num_tokens))
        scored += sample.num_scored
        audited[sample.sample_id] = audit_runs(
            sample, fraction=store.header.audit_fraction, seed=store.header.identity["seed"]
        )
        for overlay in filter(None, overlays):
            _gather(report, overlay.additions, [sample], unit, [row])
    counts = (len(found), sum(tokens for _, tokens in found), scored)
    committed = _counts(record)
    where = store.folder.location(record.path)
    if counts != committed:
        report.problems.append(
            f"{where}: (rows, tokens, scored) is {counts}, committed was {committed}"
        )
    if found != planned.ids_and_lengths:
        report.problems.append(f"{where}: the samples are not those that unit {unit} plans")
    if audit is not None:
        _verify_audit(audit, index, audited, report)
    report.num_units += 1
    report.num_samples += len(found)
    report.num_scored += scored


def _verify_audit(audit: Store, index: int, runs: dict[str, Any], report: VerifyReport) -> None:
    """A unit's audit signal, at the runs that seed and fraction give each sample."""
    for _, sample in _samples(audit, index, report):
        if sample.runs != runs.get(sample.sample_id, sample.runs):
            where = audit.folder.location(audit.commits.record(index).path)
            report.problems.append(
                f"{where}: sample {sample.sample_id!r} is not audited where seed and fraction say"
            )


def _overlay_reader(
    store: Store, overlay: Overlay, index: int, report: VerifyReport
) -> OverlayReader | None:
    """What reads an overlay's rows of a unit, its files checked; None if it has none to read."""
    unit, record = int(store.commits.units[index]), store.commits.record(index)
    if unit not in overlay.commits:
        return None
    added = overlay.commits.record(unit)
    _verify_files(overlay.folder, overlay.commits.ordered, overlay.commits.index(unit), report)
    if _counts(added) != _counts(record):
        where = overlay.folder.location(added.path)
        report.problems.append(
            f"{where}: (rows, tokens, scored) is {_counts(added)}, the store's shard has "
            f"{_counts(record)}"
        )

    def opened() -> OverlayReader:
        reader = store.overlays.reader(overlay.name, store.decoder.codec)
        reader.shard(unit)
        return reader

    return _gather(report, opened)  # type: ignore[no-any-return]


def _counts(record: ShardRecord) -> tuple[int, int, int]:
    return record.rows, record.tokens, record.scored


def _verify_files(folder: Folder, commits: Commits, index: int, report: VerifyReport) -> None:
    """A shard's bytes against its commit, and the commit's file against the manifest."""
    hash_problem = _gather(report, _check_file, folder, commits.record(index))
    if hash_problem:
        report.problems.append(hash_problem)
    unit, commit = int(commits.units[index]), _gather(report, commits.__getitem__, index)
    if commit is not None and _gather(report, _commit_file, folder, unit) not in (None, commit):
        where = folder.location(commit_path(unit))
        report.problems.append(f"{where}: manifest and commit file differ")


def _commit_file(folder: Folder, unit: int) -> Commit:
    path = commit_path(unit)
    return Commit.from_bytes(read_part(folder, path), where=folder.location(path))


def _check_file(folder: Folder, record: ShardRecord) -> str | None:
    """What is wrong with the bytes of a shard, None if they are those that were committed."""
    digest = xxhash.xxh3_128()
    where = folder.location(record.path)
    with folder.open_file(record.path) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != record.xxh3_128:
        return f"{where}: xxh3_128 is {digest.hexdigest()}, committed was {record.xxh3_128}"
    return None


def _samples(store: Store, index: int, report: VerifyReport) -> Iterator[tuple[int, Sample]]:
    """(row, sample) of the rows of a unit that can be read; those that cannot are problems."""
    shard = _gather(report, store.shard, index)
    if shard is None:
        return
    for group in range(shard.num_row_groups):
        rows = _gather(report, shard.row_group, group)
        for place in range(len(rows) if rows is not None else 0):
            # One by one: every damaged row is told, and none can make up for what another lacks.
            for sample in _gather(report, shard.samples, rows, group, [place]) or []:
                yield int(shard.first_rows[group]) + place, sample
