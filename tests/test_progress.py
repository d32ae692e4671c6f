"""Progress: a bar, lines, or nothing."""

from __future__ import annotations

import io
import re

import pytest

from kdstore.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_say_what_is_done_and_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=6, unit="steps", done=2) as progress:
        progress.note("loss 9")
        progress.advance(1)
        progress.note("loss 8")
        progress.advance(3)
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "train: 2/6 steps, 0 steps/s loss 9"
    assert re.fullmatch(r"train: 3/6 steps, [\d,]+ steps/s, 00:00 left loss 8", second)
    assert re.fullmatch(r"train: 6/6 steps, [\d,]+ steps/s done", last)


def test_on_a_terminal_notes_stand_behind_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("train", total=6, unit="steps", done=2) as progress:
        progress.advance(1)
        progress.note("loss 8")
    drawn = terminal.getvalue()
    assert "\n" not in drawn.rstrip()
    assert " 3.00/6.00 " in drawn
    assert "loss 8" in drawn


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr("sys.stderr", stream)
        with Progress("train", total=None, unit="steps", quiet=True) as progress:
            progress.advance(1)
            progress.note("loss 8")
        assert stream.getvalue() == ""


def test_more_is_said_on_lines_and_behind_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    options = {"total": 2, "unit": "units", "extra": lambda: f"score {asked.append(1) or 97}%"}
    with Progress("dump", **options) as progress:  # type: ignore[arg-type]
        progress.advance(2)
    assert re.fullmatch(
        r"dump: 2/2 units, [\d,]+ units/s, score 97% done\n", capsys.readouterr().err
    )
    assert len(asked) == 1
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Progress("dump", **options) as progress:  # type: ignore[arg-type]
        progress._bar.mininterval = 0
        progress.advance(1)
        progress.advance(1)
    assert "score 97%" in terminal.getvalue()
