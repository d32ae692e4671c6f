"""What ``benchmarks.quality`` trains on: windows of texts, a teacher's logits, and real stores.

The teacher is a cut of a larger one: only its first ids are kept. In a byte-level BPE ids are in
the order of the merges, so the tokenizer that has only those ids splits the texts into them, and
the logits of all others are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import kdstore
from benchmarks.scored import Text, logits_of
from kdstore.filesystem import Folder
from kdstore.hashing import RowKeys, sample_hash
from kdstore.inputs import InputConfig, SampleBuilder, open_source
from kdstore.sample import Sample
from kdstore.select import Selection, parse_selection, select
from kdstore.signal import SparseSignal
from kdstore.teacher import Score, Teacher
from kdstore.teachers.hf_load import describe_checkpoint
from kdstore.writers.dump import DumpConfig, DumpSource, open_dump
from kdstore.writers.overlay import OverlayWriter
from kdstore.writers.run import run_units

TEACHER, TEXTS = "teacher-32k", "eval.jsonl"  # of the data folder
UNIT_TOKENS = 1 << 13  # a unit of `full` is 8,192 x 4,096 entries in memory
TEXT_TOKENS = 512  # of each text at most, so that the windows are of many texts


def cut_tokenizer(teacher: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer with its first ids alone, and the merges that make them."""
    content = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    kept = {token: number for token, number in model["vocab"].items() if number < vocab_size}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    model["vocab"] = kept
    model["merges"] = [pair for pair in pairs if "".join(pair) in kept]
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < vocab_size]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


@dataclass(frozen=True)
class Split:
    """Windows of one length, of different texts: to judge by, to begin with and to train on."""

    held_out: list[Text]
    first: list[Text]
    train: list[Text]


def read_split(texts: Path, tokenizer: Any, *, window: int, positions: Sequence[int]) -> Split:
    """Windows of ``window`` tokens with so many scored positions in each part.

    The order of texts goes by the hash of their ids, so that runs with other numbers for the last
    part have the same windows in the others. Of a text the first tokens are taken, in whole
    windows. Raises ValueError if there are too few.
    """
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    wanted = [-(-count // (window - 1)) for count in positions]
    parts: list[list[Text]] = [[] for _ in wanted]
    for row in sorted(rows, key=lambda row: sample_hash(str(row["id"]))):
        part = next((p for p, count in zip(parts, wanted, strict=True) if len(p) < count), None)
        if part is None:
            break
        ids = np.array(tokenizer(row["text"], verbose=False)["input_ids"], dtype=np.int32)
        starts = range(0, min(len(ids), TEXT_TOKENS) - window + 1, window)
        part += [Text(f"{row['id']}#{at}", ids[at : at + window]) for at in starts]
    cut = [part[:count] for part, count in zip(parts, wanted, strict=True)]
    if [len(part) for part in cut] != wanted:
        raise ValueError(f"too few texts: wanted {wanted} windows, got {list(map(len, cut))}")
    return Split(*cut)


def cut_logits(teacher: Path, windows: Sequence[Text], vocab_size: int) -> Tensor:
    """float16 [W, T - 1, V]: the cut teacher at the scored positions of W windows."""
    shape = len(windows), len(windows[0].ids_T) - 1, vocab_size
    logits_WSV = torch.empty(shape, dtype=torch.float16)
    for row, (_, logits) in enumerate(logits_of(str(teacher), windows)):
        logits_WSV[row] = logits[:, :vocab_size]
    return logits_WSV


class CutTeacher(Teacher):
    """A teacher whose logits were computed before; it selects as every teacher does."""

    def __init__(self, windows: Sequence[Text], logits_WSV: Tensor) -> None:
        self.vocab_size = logits_WSV.shape[-1]
        self._logits = logits_WSV
        self._rows = {window.sample_id: row for row, window in enumerate(windows)}

    def score(
        self,
        samples: Sequence[Sample],
        selection: Selection,
        *,
        scalars: Sequence[str],
        seed: int,
        draw: int = 0,
        **options: Any,
    ) -> Iterator[Score]:
        """The signal of each sample; nothing is audited."""
        del options
        for sample in samples:
            signal = select(
                self._logits[self._rows[sample.sample_id]].float(),
                torch.from_numpy(sample.input_ids_T[1:].astype(np.int64)),
                selection=selection,
                keys=RowKeys.of_samples(
                    [(sample.sample_id, sample.positions_S)], seed=seed, draw=draw
                ),
                scalars=scalars,
            )
            yield Score(sample.sample_id, signal, SparseSignal.empty("full"))

    def provenance(self) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True, eq=False)
class Stores:
    """Makes stores of the training windows in a folder, each once."""

    folder: Path
    model: Path
    tokenizer: Any
    windows: list[Text]
    logits_WSV: Tensor

    def store(self, selection: str, *, seed: int, draws: int = 1) -> kdstore.Store:
        """The store that a dump with this selection and seed gives, with so many draws."""
        if not parse_selection(selection).sampled:
            seed = 0  # the signal is the same for every seed
        url = str(self.folder / f"{selection}-{seed}-{draws}".replace(":", "-"))
        if not Path(url).exists():
            self._dump(url, selection, seed=seed, draws=draws)
        return kdstore.open(url)

    def labels(self, *, seed: int) -> NDArray[np.int64]:
        """int64 [W, T - 1]: a label for every position, drawn from the teacher, by way of a store.

        Seeds of labels and of signals are apart: ``counts`` would begin with the same draw.
        """
        store = self.label_store(seed=seed)
        return np.stack([sample.signal.ids_N for sample in store if sample.signal]).astype(np.int64)

    def label_store(self, *, seed: int) -> kdstore.Store:
        """The store that has the labels: one draw of each position."""
        return self.store("counts:n=1", seed=seed + (1 << 20))

    def _dump(self, url: str, selection: str, *, seed: int, draws: int) -> None:
        source = self._source()
        teacher = CutTeacher(self.windows, self.logits_WSV)
        info = describe_checkpoint(str(self.model), device="cpu")
        writer = open_dump(
            Folder(url),
            source,
            teacher=info.identity,
            vocab_size=teacher.vocab_size,
            tokenizer=self.tokenizer,
            config=DumpConfig(selection, score="all", unit_tokens=_unit(selection), seed=seed),
            quiet=True,
        )
        planned = [writer.plan.unit(unit) for unit in writer.pending_units()]
        run_units(writer, teacher, source, planned, quiet=True)
        writer.seal()
        for draw in range(1, draws):
            overlay = OverlayWriter.open(kdstore.open(url), f"draw{draw}", draw=draw)
            run_units(overlay, teacher, source, planned, quiet=True)
            overlay.seal()

    def _source(self) -> DumpSource:
        data = self.folder / "windows.jsonl"
        rows = [{"id": w.sample_id, "input_ids": w.ids_T.tolist()} for w in self.windows]
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        opened = open_source(data)
        builder = SampleBuilder(self.tokenizer, InputConfig(), opened.name, locate=opened.locate)
        return DumpSource(opened, builder, "all")


def _unit(selection: str) -> int | None:
    """Small units for `full`, whose entries would not fit in memory; else one unit."""
    return UNIT_TOKENS if selection == "full" else None
