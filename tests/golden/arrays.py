"""What lies beside a golden store: its samples, and signals as they went in and came out.

``NAME.npz`` holds ``samples`` (JSON), and under ``original/STREAM/`` and ``decoded/STREAM/`` the
arrays of one signal over all samples, one after the other. A stream is ``main``, ``audit`` or
``overlay:NAME``; ``STREAM/splits`` says where samples begin. Nothing in it is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.rows import span_dict
from kdstore.sample import Sample
from kdstore.signal import SparseSignal

GOLDEN = Path(__file__).parent
OVERLAY = "overlay:"
_FIELDS = ("indptr", "ids_N", "logprobs_N", "rest_S", "counts_N", "tail_N")

Arrays = dict[str, NDArray[Any]]


def store_names() -> list[str]:
    """Names of the golden stores."""
    return sorted(path.parent.name for path in GOLDEN.glob("*/kdstore.json"))


def load(name: str) -> Arrays:
    """The arrays beside a golden store."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def stream_names(arrays: Arrays) -> list[str]:
    """The streams of a store, ``main`` first."""
    names = {key.split("/")[1] for key in arrays if key.startswith("decoded/")}
    return sorted(names, key=lambda name: (name != "main", name))


def describe(samples: Sequence[Sample]) -> NDArray[np.uint8]:
    """The plain columns of samples as JSON."""
    rows = [
        {
            "sample_id": sample.sample_id,
            "input_ids": sample.input_ids_T.tolist(),
            "spans": [span_dict(span) for span in sample.spans],
            "runs": sample.runs,
            "text": sample.text,
            "messages": sample.messages,
            "metadata": sample.metadata,
        }
        for sample in samples
    ]
    return np.frombuffer(json.dumps(rows).encode(), dtype=np.uint8)


def described(arrays: Arrays) -> list[dict[str, Any]]:
    """The plain columns of a store's samples."""
    rows: list[dict[str, Any]] = json.loads(arrays["samples"].tobytes())
    return rows


def signal_arrays(prefix: str, signals: Sequence[SparseSignal]) -> Arrays:
    """The arrays of one stream under a prefix such as ``decoded/main``."""
    whole = SparseSignal.concat(signals)
    arrays = {name: getattr(whole, name) for name in _FIELDS}
    arrays |= {f"scalar:{name}": values for name, values in whole.scalars.items()}
    arrays["splits"] = np.cumsum([0, *map(len, signals)])
    found = {f"{prefix}/{name}": array for name, array in arrays.items() if array is not None}
    return {**found, f"{prefix}/selection": np.array(whole.selection)}


def signal_of(arrays: Arrays, prefix: str) -> tuple[SparseSignal, NDArray[np.int64]]:
    """The signal of a stream, and where its samples begin."""
    mine = {
        k.removeprefix(f"{prefix}/"): v for k, v in arrays.items() if k.startswith(f"{prefix}/")
    }
    scalars = {k.removeprefix("scalar:"): v for k, v in mine.items() if k.startswith("scalar:")}
    fields = {name: mine.get(name) for name in _FIELDS}
    return SparseSignal(str(mine["selection"]), **fields, scalars=scalars), mine["splits"]  # type: ignore[arg-type]
