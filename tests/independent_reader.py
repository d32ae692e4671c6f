"""A reader of stores made from docs/format.md alone: numpy and pyarrow, nothing of kdstore."""

import json
from pathlib import Path

import numpy as np
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

NONE = -1
STARTS = ((192, 192, 1), (248, 14_528, 2), (254, 407_744, 3))  # code, value, extra bytes


class Reader:
    """Samples as dicts: plain columns, ``positions``, and arrays of a signal or an overlay."""

    def __init__(self, url: str | Path, *, signal: str = "main", overlay: str = "") -> None:
        self.folders, self.prefix = [Path(url)], f"signal/{signal}/"
        identity = self.identity(self.folders[0] / "kdstore.json")
        table = ipc.open_file(str(self.folders[0] / "idorder.arrow")).read_all()
        self.order, self.successors = table["id"].to_numpy(), table["successors"].to_pylist()
        self.signal = identity["signals"][signal]
        options = self.signal["selection"].partition(":")[2].split(",")
        self.options = dict(option.split("=") for option in options if option)
        if overlay:
            self.folders.append(self.folders[0] / "overlays" / overlay)
            self.signal = self.identity(self.folders[1] / "overlay.json")
        self.decode = getattr(self, self.signal["codec"].split("/")[0])

    def __iter__(self):
        for rows in zip(*map(self.rows, self.folders), strict=True):
            yield self.sample(rows[0], rows[-1])

    def identity(self, path):
        header = json.loads(path.read_text())
        assert header["format_version"].split(".")[0] == "1"
        return header["identity"]

    def rows(self, folder):
        for commit in sorted((folder / "commits").iterdir()):
            files = json.loads(commit.read_text())["files"]
            path = next(file["path"] for file in files if file["role"] == "main")
            yield from pq.read_table(folder / path).to_pylist()

    def sample(self, row, added):
        self.cells = {
            name.removeprefix(self.prefix): np.frombuffer(cell, np.uint8)
            for name, cell in added.items()
            if name.startswith(self.prefix) and isinstance(cell, bytes)
        }
        runs = self.cells["runs"].view("<i4").reshape(-1, 2)
        row["positions"] = np.concatenate([np.arange(a, b) for a, b in runs] or [np.zeros(0, int)])
        self.previous = np.array(row["input_ids"], int)[row["positions"] - 1]
        entries, row["rest"] = self.decode(len(self.previous))
        flat = [one for entry in entries for one in sorted(entry)]
        row["indptr"] = np.cumsum([0, *map(len, entries)])
        row["ids"], row["logprobs"], row["tail"] = np.array(flat or np.zeros((0, 3))).T
        row["scalars"] = {name: self.scalar(name) for name in self.signal["scalars"]}
        return row

    def shorts(self, name):
        codes, extra = self.cells[name].astype(int), iter(self.cells[name + "/extra"].tolist())
        values = np.where(codes == 255, NONE, codes)
        for i in np.flatnonzero((codes >= 192) & (codes < 255)):
            code, start, width = next(s for s in reversed(STARTS) if codes[i] >= s[0])
            low = sum(next(extra) << (8 * byte) for byte in range(width))
            values[i] = start + ((codes[i] - code) << (8 * width)) + low
        return values

    def fixed(self, name, dtype):
        width = np.dtype(dtype).itemsize
        planes = [self.cells[f"{name}/{byte}"] for byte in range(width)]
        return np.stack(planes, axis=1).copy().view(dtype).reshape(-1)

    def runs(self, name, lengths, *, after_previous=True):
        """The ids of each run."""
        gaps, runs, at = self.shorts(name), [], 0
        for s, length in enumerate(lengths):
            first = (self.successors[self.previous[s]] if after_previous else None) or []
            ranks, k = np.cumsum(gaps[at : at + length] + 1) - 1, len(first)
            runs.append([first[r] if r < k else int(self.order[r - k]) for r in ranks])
            at += length
        return runs

    def ranked(self, num):
        lengths, code = self.shorts("entries"), self.shorts("rest")
        bits = np.array([int(n).bit_length() for n in lengths], int)
        classes = np.clip((11 * bits - np.where(code == NONE, 0, code - 960) + 96) // 20, 0, 7)
        planes = [iter(self.cells[f"value/{c}"].tolist()) for c in range(8)]
        table = np.append(0.25 / 196, np.arange(1, 197) / 196) ** 2
        rest = np.where(code == NONE, -np.inf, -np.log1p(np.exp(-(960 - code) / 16)))
        entries = []
        for s, ids in enumerate(self.runs("id", lengths, after_previous=False)):
            values = table[[next(planes[classes[s]]) for _ in ids]]
            values = np.log(values) + np.log(-np.expm1(rest[s])) - np.log(values.sum() or 1)
            entries.append([(i, v, False) for i, v in zip(ids, values, strict=True)])
        return entries, rest

    def pps(self, num):
        tau, counts = float(self.options["tau"]), self.cells["counts"]
        more = iter(self.cells["more"].view("<u2").tolist())
        exact, weight = iter(self.cells["exact"].view("<f4").tolist()), iter(self.cells["weight"])
        h, n = (counts >> 4).astype(int), (counts & 15).astype(int)
        for s in range(num):
            h[s] += next(more) if counts[s] == 0 or h[s] == 15 else 0
            n[s] += next(more) if counts[s] == 0 or n[s] == 15 else 0
        runs = [self.runs(*r) for r in (("top", h > 0), ("head", h - (h > 0)), ("tail", n))]
        value, entries = iter(self.shorts("value")), []
        for s, (top, head, tail) in enumerate(zip(*runs, strict=True)):
            if counts[s] == 0:
                others = [np.exp(next(exact)) for _ in head]
                w = np.exp(next(exact)) if tail else 0.0
            else:
                others = [tau / 2 * next(value) for _ in head]
                w = 1 / n[s] if h[s] == 0 else 0.0
                if h[s] and n[s]:
                    w = tau * (n[s] - 1 + next(weight) / 3) / n[s]
            heads = [1 - sum(others) - n[s] * w, *others][: h[s]]
            entry = [(i, np.log(w), True) for i in tail]
            some = zip([*top, *head], heads, strict=True)
            entries.append(entry + [(i, np.log(p), False) for i, p in some])
        return entries, np.full(num, -np.inf)

    def counts(self, num):
        runs = [self.runs(name, self.shorts(name + "s")) for name in ("repeat", "single")]
        count, n = iter(self.shorts("count")), int(self.options["n"])
        entries = []
        for repeats, singles in zip(*runs, strict=True):
            entry = [(i, np.log((next(count) + 2) / n), False) for i in repeats]
            entries.append(entry + [(i, np.log(1 / n), False) for i in singles])
        return entries, np.full(num, -np.inf)

    def full(self, num):
        halves = self.fixed("half", "<f2").astype(float).reshape(num, len(self.order))
        halves -= np.log(np.exp(halves).sum(1, keepdims=True))
        entries = [[(i, v, False) for i, v in enumerate(row) if v > -np.inf] for row in halves]
        return entries, np.full(num, -np.inf)

    def scalars(self, num):
        return [[] for _ in range(num)], np.full(num, -np.inf)

    def scalar(self, name):
        if name not in ("label_logprob", "label_rank", "entropy"):
            return self.fixed(name, "<f4")
        codes = self.shorts(name)
        ranks = np.append(np.arange(256), 255 * 1.05 ** np.arange(1, 242))
        levels = ranks if name == "label_rank" else np.arange(65536) / 64
        values = np.where(codes == NONE, np.inf, levels[codes])
        return -values if name == "label_logprob" else values
