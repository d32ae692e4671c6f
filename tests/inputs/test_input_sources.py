"""open_source: every kind of data, resuming in the middle, and every way it can be wrong."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from kdstore.errors import InputError, MissingDependencyError, UsageError
from kdstore.inputs import open_source
from kdstore.inputs.files import files_under
from kdstore.inputs.hub import is_dataset_name

ROWS = [{"id": f"r{i}", "text": f"text {i} é"} for i in range(10)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", LINES)


def make_source(kind: str, root: Path) -> Any:
    if kind == "jsonl":
        return open_source(write(root / "train.jsonl", LINES))
    if kind == "gz":
        return open_source(write(root / "train.jsonl.gz", gzip.compress(LINES)))
    if kind == "zst":
        return open_source(write(root / "train.json.zst", zstandard.compress(LINES)))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), root / "train.parquet", row_group_size=3)
        return open_source(root / "train.parquet")
    if kind == "parquet-dir":
        (root / "train").mkdir()
        for i, (low, high) in enumerate([(0, 4), (4, 4), (4, 10)]):
            table = pa.Table.from_pylist(ROWS[low:high], schema=pa.Table.from_pylist(ROWS).schema)
            pq.write_table(table, root / "train" / f"part-{i}.parquet")
        write(root / "train" / "_SUCCESS", b"")
        return open_source(root / "train")
    import datasets

    if kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(root / "train")
        return open_source(root / "train")
    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:1]),
    }
    datasets.DatasetDict(splits).save_to_disk(root / "train")
    return open_source(str(root / "train"))


KINDS = ["jsonl", "gz", "zst", "parquet", "parquet-dir", "saved", "saved-splits"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_numbered_and_any_can_be_the_first(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path)
    assert source.name == "train"
    for start in range(len(ROWS) + 2):
        assert list(source.rows(start)) == list(enumerate(ROWS))[start:]


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_is_json_and_the_same_for_the_same_data(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path)
    first = json.dumps(source.fingerprint(), sort_keys=True)
    again = json.dumps(open_source(source.location).fingerprint(), sort_keys=True)
    assert first == again
    assert str(tmp_path) not in first


def test_fingerprint_of_a_file_is_its_content_wherever_it_lies(tmp_path: Path) -> None:
    here = open_source(write(tmp_path / "a" / "x.jsonl", LINES)).fingerprint()
    there = open_source(write(tmp_path / "b" / "x.jsonl", LINES)).fingerprint()
    other = open_source(write(tmp_path / "c" / "x.jsonl", LINES[:-2] + b"\n\n")).fingerprint()
    assert here == there != other
    assert here == {
        "kind": "jsonl",
        "name": "x",
        "files": [
            {
                "name": "x.jsonl",
                "bytes": len(LINES),
                "xxh3_128": here["files"][0]["xxh3_128"],
            }
        ],
    }
    assert len(here["files"][0]["xxh3_128"]) == 32


def test_urls_of_any_file_system(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/one.jsonl", LINES)
    fs.pipe("/bucket/more/two.txt", b"document")
    try:
        assert [row for _, row in open_source("memory://bucket/one.jsonl").rows()] == ROWS
        source = open_source("memory://bucket/more")
        assert source.name == "more"
        assert list(source.rows()) == [(0, {"text": "document"})]
        assert source.locate(0) == "memory://bucket/more/two.txt"
        with pytest.raises(InputError, match="no input of this name"):
            open_source("memory://bucket/missing.jsonl")
    finally:
        fs.rm("/bucket", recursive=True)


def test_plain_text_is_one_document_per_file(tmp_path: Path) -> None:
    text = "first line\r\n\nsecond line\n"
    source = open_source(write(tmp_path / "poem.txt", b"\xef\xbb\xbf" + text.encode()))
    assert source.name == "poem"
    assert list(source.rows()) == [(0, {"text": text})]
    write(tmp_path / "many" / "b.txt", b"two")
    write(tmp_path / "many" / "a.txt", b"one")
    write(tmp_path / "many" / ".hidden.txt", b"no")
    many = open_source(tmp_path / "many")
    assert list(many.rows(1)) == [(1, {"text": "two"})]
    assert many.locate(1).endswith("b.txt")


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    data = b'\n{"text": "a"}\n  \r\n{"text": "b"}'
    source = open_source(write(tmp_path / "x.jsonl", data))
    assert list(source.rows()) == [(0, {"text": "a"}), (1, {"text": "b"})]
    assert source.locate(1).endswith("x.jsonl, line 4")
    assert list(source.rows(1)) == [(1, {"text": "b"})]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"text": "unfinished', "malformed JSON"),
        (b"{'text': 1}", "malformed JSON"),
        (b'"just a string"', "not a JSON object"),
        (b'[{"text": "list"}]', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"text": "caf\xe9"}', "byte 14"),
    ],
)
def test_a_bad_line_is_named(line: bytes, found: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", b'{"text": "a"}\n\n' + line + b"\n")
    rows = open_source(path).rows()
    assert next(rows)[1] == {"text": "a"}
    with pytest.raises(InputError, match=found) as caught:
        next(rows)
    assert f"{path}, line 3" in str(caught.value)
    assert "to do" in str(caught.value)


def test_bad_utf8_in_a_text_file_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.txt", b"one\ntwo\nthr\xffee\nfour")
    with pytest.raises(InputError, match=r"bad\.txt, line 3, byte 4"):
        list(open_source(path).rows())


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.parquet"])
@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_an_empty_input_is_refused(name: str, data: bytes, tmp_path: Path) -> None:
    if name == "x.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    elif name == "x.txt":
        write(tmp_path / name, b"")
    else:
        write(tmp_path / name, data)
    with pytest.raises(InputError, match="no rows"):
        list(open_source(tmp_path / name).rows())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    cut = write(tmp_path / "cut.parquet", whole[:-20])
    with pytest.raises(InputError, match=r"cut\.parquet"):
        list(open_source(cut).rows())
    for name, data in (
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
    ):
        for damaged in (data[: len(data) // 2], b"nothing compressed"):
            with pytest.raises(InputError):
                list(open_source(write(tmp_path / name, damaged)).rows())


def test_all_frames_of_a_zstd_file_are_read(tmp_path: Path) -> None:
    half = len(LINES) // 2
    frames = zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:])
    assert [r for _, r in open_source(write(tmp_path / "x.jsonl.zst", frames)).rows()] == ROWS
    for cut in (len(frames) - 1, len(frames) // 2 + 3, 5):
        with pytest.raises(InputError, match="zst"):
            list(open_source(write(tmp_path / "cut.jsonl.zst", frames[:cut])).rows())


def test_parquet_reads_only_what_rows_may_carry(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"text": "a", "embedding": [0.0] * 8}])
    pq.write_table(table, tmp_path / "x.parquet")
    assert list(open_source(tmp_path / "x.parquet").rows()) == [(0, {"text": "a"})]
    pq.write_table(table.rename_columns(["words", "embedding"]), tmp_path / "y.parquet")
    assert list(next(open_source(tmp_path / "y.parquet").rows())[1]) == ["words", "embedding"]


def test_parquet_rows_are_located_in_their_file(tmp_path: Path) -> None:
    source = make_source("parquet-dir", tmp_path)
    assert source.locate(5).endswith("part-2.parquet, row 1")


def test_a_missing_path_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "missing.jsonl")
    for word in ("file", "directory", "dataset", "missing.jsonl"):
        assert word in str(caught.value)


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"suffix \.csv"):
        open_source(write(tmp_path / "x.csv", b"a,b"))
    write(tmp_path / "mixed" / "a.jsonl", LINES)
    write(tmp_path / "mixed" / "b.txt", b"x")
    with pytest.raises(InputError, match=r"\.jsonl, \.txt"):
        open_source(tmp_path / "mixed")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="without such files"):
        open_source(tmp_path / "nothing")
    with pytest.raises(UsageError, match="cannot open this URL"):
        open_source("nosuchprotocol://x/y.jsonl")


def test_saved_dataset_without_the_split(tmp_path: Path) -> None:
    source = make_source("saved-splits", tmp_path)
    assert len(list(open_source(source.location, split="test").rows())) == 1
    with pytest.raises(InputError, match="train") as caught:
        open_source(source.location, split="dev")
    assert "dev" in str(caught.value)
    (tmp_path / "train" / "dataset_dict.json").write_text("{")
    with pytest.raises(InputError, match="cannot load the saved dataset"):
        open_source(source.location)


def test_dataset_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        if name == "missing":
            raise datasets.exceptions.DatasetNotFoundError("no such dataset")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("owner/some-data:en", split="test")
    assert asked == [("owner/some-data", "en", "test")]
    assert source.name == "some-data"
    assert source.location == "owner/some-data:en (split test)"
    assert source.fingerprint()["rows"] == 10
    assert source.fingerprint()["columns"] == ["id", "text"]
    assert list(source.rows(9)) == [(9, ROWS[9])]
    with pytest.raises(InputError, match="no such dataset") as caught:
        open_source("missing")
    for word in ("file", "directory", "hub"):
        assert word in str(caught.value)


def test_which_strings_are_dataset_names() -> None:
    assert all(is_dataset_name(name) for name in ("a", "a/b-c.d", "a:en", "a/b:2020.en"))
    assert not any(is_dataset_name(name) for name in ("/a", "./a", "a/b/c", "s3://a", "a b", ""))


def test_without_datasets_the_install_line_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source("saved", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for data in (source.location, "some/name"):
        with pytest.raises(MissingDependencyError, match=r"pip install kdstore\[datasets\]"):
            open_source(data)


def test_hidden_names_are_left_out(tmp_path: Path) -> None:
    for name in (".git/a.jsonl", "b/_c/d.jsonl", "b/e.jsonl"):
        write(tmp_path / name, LINES)
    found = files_under(fsspec.filesystem("file"), str(tmp_path), str(tmp_path))
    assert [file.location for file in found] == [f"{tmp_path}/b/e.jsonl"]


def test_importing_inputs_imports_no_heavy_package() -> None:
    import subprocess

    code = "import sys, kdstore.inputs as _; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "transformers", "datasets", "vllm"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
