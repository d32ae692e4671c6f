"""Reading everything once: every byte, count and id of a store against what was committed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import xxhash

from kdstore.align.tokenizer_files import TOKENIZER_FILE
from kdstore.commit import Commit, ShardRecord, read_part
from kdstore.errors import HeaderError, KDStoreError, StorageError
from kdstore.hashing import sha256_hex
from kdstore.layout import PLAN, TOKENIZER, commit_path
from kdstore.readers.store import Store
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
    plan = _gather(report, lambda: _read_plan(store))
    _check_files(store, report)
    decoder = _gather(report, lambda: store.decoder)
    if plan is None or decoder is None:
        return report
    for index in range(len(store.commits)):
        _verify_unit(store, index, plan, report)
        on_unit(1)
    return report


def _gather(report: VerifyReport, check: Callable[[], Any]) -> Any:
    try:
        return check()
    except StorageError:
        raise  # a dead network is no fault of the store
    except (KDStoreError, OSError) as error:
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
        found = _gather(report, lambda path=path: sha256_hex(read_part(store.folder, path)))  # type: ignore[misc]
        if found not in (None, digest):
            where = store.folder.location(path)
            report.problems.append(f"{where}: SHA-256 is {found}, the header has {digest}")
    identity = store.header.identity
    if store.header.files.get(f"{TOKENIZER}/{TOKENIZER_FILE}") != identity["tokenizer_digest"]:
        report.problems.append("the stored tokenizer is not the one that the identity names")
    table = _gather(report, store.token_table)
    if table is not None and table.fingerprint() != identity["vocab_digest"]:
        report.problems.append("the token table is not the one that the identity names")


def _verify_unit(store: Store, index: int, plan: Plan, report: VerifyReport) -> None:
    commit = store.commits[index]
    hash_problem = _gather(report, lambda: _check_file(store, commit.shard))
    if hash_problem:
        report.problems.append(hash_problem)
    if _gather(report, lambda: _commit_file(store, commit.unit)) not in (None, commit):
        report.problems.append(f"unit {commit.unit}: manifest and commit file differ")
    planned = plan.unit(commit.unit)
    found: list[tuple[str, int]] = []
    scored = 0
    for sample in _samples(store, index, report):
        found.append((sample.sample_id, sample.num_tokens))
        scored += sample.num_scored
    counts = (len(found), sum(tokens for _, tokens in found), scored)
    committed = (commit.shard.rows, commit.shard.tokens, commit.shard.scored)
    where = store.folder.location(commit.shard.path)
    if counts != committed:
        report.problems.append(
            f"{where}: (rows, tokens, scored) is {counts}, committed was {committed}"
        )
    if found != planned.ids_and_lengths:
        report.problems.append(f"{where}: the samples are not those that unit {commit.unit} plans")
    report.num_units += 1
    report.num_samples += len(found)
    report.num_scored += scored


def _commit_file(store: Store, unit: int) -> Commit:
    path = commit_path(unit)
    return Commit.from_bytes(read_part(store.folder, path), where=store.folder.location(path))


def _check_file(store: Store, record: ShardRecord) -> str | None:
    """What is wrong with the bytes of a shard, None if they are those that were committed."""
    digest = xxhash.xxh3_128()
    where = store.folder.location(record.path)
    with store.folder.open_file(record.path) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != record.xxh3_128:
        return f"{where}: xxh3_128 is {digest.hexdigest()}, committed was {record.xxh3_128}"
    return None


def _samples(store: Store, index: int, report: VerifyReport) -> Iterator[Any]:
    """The samples of a unit that can be read; those that cannot are problems."""
    shard = _gather(report, lambda: store.shard(index))
    if shard is None:
        return
    for group in range(shard.num_row_groups):
        table = _gather(report, lambda group=group: shard.row_group(group))  # type: ignore[misc]
        for place in range(len(table) if table is not None else 0):
            sample = _gather(report, lambda t=table, g=group, p=place: shard.sample(t, g, p))  # type: ignore[misc]
            if sample is not None:
                yield sample
