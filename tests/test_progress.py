"""What is going on is said: at once on a terminal, after a second elsewhere, and nothing of what is over by then."""

import io
import logging
import threading

import pytest
from rich.console import Console

from fdpg_fast import progress
from fdpg_fast.progress import activity, advance


@pytest.fixture
def said(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "fdpg_fast")
    monkeypatch.setattr(progress, "AFTER", 0.05)
    monkeypatch.setattr(progress, "EVERY", 0.05)
    return lambda: [record.getMessage() for record in caplog.records]


def wait_for(condition):
    ended = threading.Event()
    for _ in range(200):
        if condition():
            return
        ended.wait(0.05)
    raise AssertionError("it was never said")


def test_what_lasts_is_said_and_counted(said):
    with activity("evaluating", total=2000):
        wait_for(lambda: said() == ["evaluating"])
        advance(1500)
        wait_for(lambda: "evaluating: 1,500 of 2,000" in said())
    lines = len(said())
    threading.Event().wait(0.2)
    assert len(said()) == lines


def test_what_is_over_at_once_is_not_said(said, monkeypatch):
    monkeypatch.setattr(progress, "AFTER", 60.0)
    with activity("loading"):
        pass
    assert said() == []


def test_items_count_for_the_innermost_activity(said):
    advance(3)  # nobody waits for it
    with activity("outer", total=5), activity("inner", total=7):
        advance(4)
        wait_for(lambda: "inner: 4 of 7" in said())
        assert not any(line.startswith("outer:") for line in said())


def test_a_terminal_has_a_live_line_and_the_log_no_others(said):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with progress.show(console), activity("loading [model]", total=8):
        advance(2)
        threading.Event().wait(0.3)
    assert "loading [model]" in screen.getvalue() and "2/8" in screen.getvalue()
    assert said() == []
    with activity("afterwards"):  # in plain lines again
        wait_for(lambda: said() == ["afterwards"])
