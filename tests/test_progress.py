"""What is going on is said: at once on a terminal, after a second elsewhere, and nothing of what is over by then."""

import io
import logging
import sys
import threading

import pytest

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


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_live_line_and_the_log_above_it(said, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.lines_for_a_person(), activity("loading [model]", total=8):
        advance(2)
        logging.getLogger("fdpg_fast").info("a line [with] brackets, longer than a terminal is wide" + 80 * ".")
        threading.Event().wait(0.3)
    shown = screen.getvalue()
    assert "loading [model]" in shown and "2 of 8" in shown
    assert "a line [with] brackets, longer than a terminal is wide" + 80 * "." in shown
    assert [line for line in said() if "loading" in line] == []
    with activity("afterwards"):  # in plain lines again
        wait_for(lambda: "afterwards" in said())


def test_plain_lines_go_to_stderr_and_nothing_is_left_behind(capsys):
    logger = logging.getLogger("fdpg_fast")
    before = logger.level, list(logger.handlers)
    with progress.lines_for_a_person():
        logger.getChild("trainer").info("round 1/2")
    logger.info("nobody asked for this")
    assert capsys.readouterr() == ("", "round 1/2\n")
    assert (logger.level, logger.handlers) == before
