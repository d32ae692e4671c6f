"""The store writer: creates a store, or resumes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kdstore.codecs import IdOrder, codec_named
from kdstore.commit import read_part
from kdstore.errors import UsageError
from kdstore.filesystem import Folder
from kdstore.hashing import sha256_hex
from kdstore.header import Header, check_same_identity
from kdstore.layout import (
    COMMITS,
    DATA,
    GENERATED,
    HEADER,
    ID_ORDER,
    MAIN_SIGNAL,
    PLAN,
    RUNNING,
    TOKENIZER,
)
from kdstore.writers.plan import Plan
from kdstore.writers.shard import ShardWriter
from kdstore.writers.units import UnitWriter

_OURS = {HEADER, DATA, COMMITS, ID_ORDER, PLAN, RUNNING, TOKENIZER, GENERATED}


@dataclass(frozen=True, eq=False)
class NewPlan:
    """A plan, its id order, and what happened to the input's rows (splits, truncations, …)."""

    plan: Plan
    order: IdOrder
    counters: dict[str, int]


class StoreWriter(UnitWriter):
    """An open store: its header, plan and id order, and the units that are committed."""

    def __init__(self, folder: Folder, header: Header, plan: Plan, order: IdOrder) -> None:
        self.plan = plan
        signals = header.identity["signals"]
        codecs = {
            name: codec_named(
                signals[name]["codec"],
                signals[name]["selection"],
                order=order,
                scalars=signals[name]["scalars"],
                where=folder.location(HEADER),
            )
            for name in sorted(signals, key=lambda name: name != MAIN_SIGNAL)
        }
        super().__init__(folder, header, ShardWriter(header, codecs))

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
            check_free(folder)
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


def check_free(folder: Folder) -> None:
    """UsageError for a folder that holds something else than a store, or parts of one."""
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
