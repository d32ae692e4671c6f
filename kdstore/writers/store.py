"""The store writer: creates or resumes a store, and makes units exist by committing them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kdstore.codecs import IdOrder, codec_named
from kdstore.commit import Commit, load_commits, manifest_bytes, read_part
from kdstore.errors import StorageError, UsageError
from kdstore.filesystem import Folder
from kdstore.hashing import sha256_hex
from kdstore.header import Header, check_same_identity
from kdstore.layout import (
    COMMITS,
    DATA,
    HEADER,
    ID_ORDER,
    MAIN_SIGNAL,
    PLAN,
    TOKENIZER,
    commit_path,
    manifest_path,
    shard_path,
)
from kdstore.sample import Sample
from kdstore.writers.plan import Plan
from kdstore.writers.shard import ShardWriter

COMMITS_PER_MANIFEST = 1000
_OURS = {HEADER, DATA, COMMITS, ID_ORDER, PLAN, TOKENIZER}


@dataclass(frozen=True, eq=False)
class NewPlan:
    """A plan, its id order, and what happened to the input's rows (splits, truncations, …)."""

    plan: Plan
    order: IdOrder
    counters: dict[str, int]


class StoreWriter:
    """An open store: its header, plan and id order, and the units that are committed."""

    def __init__(self, folder: Folder, header: Header, plan: Plan, order: IdOrder) -> None:
        self.folder, self.header, self.plan = folder, header, plan
        self.commits = load_commits(folder, header)
        signal = header.identity["signals"][MAIN_SIGNAL]
        codec = codec_named(
            signal["codec"],
            signal["selection"],
            order=order,
            scalars=signal["scalars"],
            where=folder.location(HEADER),
        )
        self.shards = ShardWriter(header, codec, MAIN_SIGNAL)

    @classmethod
    def open(
        cls,
        folder: Folder,
        identity: Mapping[str, Any],
        *,
        make_plan: Callable[[], NewPlan],
        tokenizer_files: Mapping[str, bytes],
    ) -> StoreWriter:
        """The store in a folder, created with a new plan if there is none, else resumed.

        ``identity`` lacks the digests of plan and id order, which a resume takes from the store.
        Raises StoreMismatchError, naming the first differing field, if the store is another one,
        and UsageError if the folder holds something else.
        """
        if not folder.exists(HEADER):
            _check_free(folder)
            _create(folder, dict(identity), make_plan, tokenizer_files)
        header = Header.from_bytes(folder.read(HEADER), where=folder.location(HEADER))
        _check_writable(header, folder)
        digests = {name: header.identity.get(name) for name in ("plan_digest", "id_order_digest")}
        check_same_identity(header.identity, {**identity, **digests}, where=folder.url)
        plan = Plan.from_bytes(
            read_part(folder, PLAN),
            expected_digest=header.identity["plan_digest"],
            where=folder.location(PLAN),
        )
        order = IdOrder.from_bytes(
            read_part(folder, ID_ORDER),
            expected_digest=header.identity["id_order_digest"],
            where=folder.location(ID_ORDER),
        )
        return cls(folder, header, plan, order)

    def pending_units(self, *, worker: int = 0, num_workers: int = 1) -> list[int]:
        """Units that no commit names yet, of those that fall to one of several workers."""
        units = range(worker, self.plan.num_units, num_workers)
        return [unit for unit in units if unit not in self.commits]

    def commit(
        self,
        unit: int,
        samples: Sequence[Sample],
        *,
        statistics: dict[str, Any],
        provenance: dict[str, Any],
    ) -> Commit:
        """Write a unit's shard under a name of its own, then the commit that makes it exist.

        Where another worker committed the unit first, its shard stays and ours is removed: any
        complete attempt of a unit is as good as another.
        """
        path = shard_path(unit, secrets.token_hex(4))
        with self.folder.writing(path) as target:
            record = self.shards.write(target, samples, path=path)
        commit = Commit(unit, record, self.header.config_digest, statistics, provenance)
        if not self.folder.create(commit_path(unit), commit.to_bytes()):
            name = commit_path(unit)
            commit = Commit.from_bytes(self.folder.read(name), where=self.folder.location(name))
            if commit.shard.path != path:  # else the create went through and its answer was lost
                with suppress(StorageError):  # an orphan is harmless
                    self.folder.remove(path)
        self.commits[unit] = commit
        if len(self.commits) % COMMITS_PER_MANIFEST == 0:
            self._write_manifest()
        return commit

    def seal(self) -> bool:
        """Write the manifest of all units if every one is committed; whether that is so."""
        self.commits = load_commits(self.folder, self.header)
        complete = len(self.commits) == self.plan.num_units
        if complete and not self.folder.exists(manifest_path(len(self.commits))):
            self._write_manifest()
        return complete

    def _write_manifest(self) -> None:
        data = manifest_bytes(list(self.commits.values()))
        self.folder.replace(manifest_path(len(self.commits)), data)


def _check_free(folder: Folder) -> None:
    foreign = [name for name in folder.names() if name not in _OURS and name[0] != "."]
    if foreign:
        raise UsageError(
            "the output folder is not empty and holds no store",
            where=folder.url,
            expected="a new or empty folder, or a store to resume",
            got=", ".join(foreign[:5]),
            todo="choose another --out",
        )


def _check_writable(header: Header, folder: Folder) -> None:
    if header.writer_features:
        raise UsageError(
            "the store needs features that this kdstore does not write",
            where=folder.url,
            expected="no writer features",
            got=", ".join(header.writer_features),
            todo="install a newer kdstore",
        )


def _create(
    folder: Folder,
    identity: dict[str, Any],
    make_plan: Callable[[], NewPlan],
    tokenizer_files: Mapping[str, bytes],
) -> None:
    """Everything but the header first: the header is what makes the folder a store."""
    new = make_plan()
    plan, order = new.plan, new.order
    identity |= {"plan_digest": plan.digest(), "id_order_digest": order.digest()}
    contents = {f"{TOKENIZER}/{name}": data for name, data in tokenizer_files.items()}
    contents |= {ID_ORDER: order.to_bytes(), PLAN: plan.to_bytes()}
    if folder.exists(HEADER):
        return  # another worker planned faster: its files stay
    for path, data in contents.items():
        folder.replace(path, data)
    counts = {name: plan.total(name) for name in ("num_tokens", "num_scored")}
    header = Header(
        identity,
        {"kind": "fixed", "units": plan.num_units, **counts, "input": new.counters},
        {path: sha256_hex(data) for path, data in sorted(contents.items())},
    )
    folder.create(HEADER, header.to_bytes())
