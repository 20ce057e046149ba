"""Bars and lines: what a log file gets of long loops."""

import io
import sys

import progress
from progress import Progress


def test_without_a_terminal_there_is_a_line_now_and_then(capsys, monkeypatch):
    assert list(Progress(range(5), "images", "files")) == list(range(5))
    assert capsys.readouterr().err == ""  # a short loop
    monkeypatch.setattr(progress, "EVERY", 0)
    shown = Progress("ab", "epoch 2", "steps", done=7)
    for item in shown:
        shown.note = f"loss {item}"
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["epoch 2: 8 of 9 steps, 0 s loss a", "epoch 2: 9 of 9 steps, 0 s loss b"]
    assert list(Progress(iter("ab"), "images", "files", total=2)) == ["a", "b"]
    assert capsys.readouterr().err.splitlines()[-1] == "images: 2 of 2 files, 0 s"


def test_on_a_terminal_there_is_a_bar_that_goes(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(Progress("ab", "images", "files")) == ["a", "b"]
    assert "images" not in terminal.getvalue()  # a short loop
    monkeypatch.setattr(progress, "FIRST", 0)
    assert list(Progress("ab", "images", "files", done=3)) == ["a", "b"]
    assert "\rimages:" in terminal.getvalue() and "3/5" in terminal.getvalue()
