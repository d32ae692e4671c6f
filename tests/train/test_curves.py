"""Curves of a run: what is drawn of its history."""

from __future__ import annotations

from kdstore.train.curves import lines_of, save_curves

HISTORY = [
    {"step": 2, "loss": 3.0, "ce": 4, "learning_rate": 0.1},
    {"step": 4, "eval_loss": 2.5},
    {"step": 4, "loss": 2.0, "ce": 3, "learning_rate": 0.05},
]


def test_lines_of_a_history():
    found = lines_of(HISTORY, ["loss", "ce", "eval_loss", "forward_kl"])
    assert found == {
        "loss": ([2, 4], [3.0, 2.0]),
        "ce": ([2, 4], [4.0, 3.0]),
        "eval_loss": ([4], [2.5]),
    }


def test_panels_without_figures_are_left_out(tmp_path):
    heights = []
    for history in (HISTORY, HISTORY[:1], []):
        save_curves(history, tmp_path / "curves.png", losses=["ce"])
        data = (tmp_path / "curves.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        heights.append(int.from_bytes(data[20:24], "big") // 360)
    assert heights == [3, 2, 1]
