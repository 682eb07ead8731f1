"""What others say, in lines of ours."""

import pytest

from fdpg_fast.errors import one_line


class Mute(Exception):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (ValueError("first\n  second\r\nthird"), "first second third"),
        ("\x1b[31mred\x1b[0m\a", r"\x1b[31mred\x1b[0m\x07"),
        ("\u202egnp.exe \ud800 \x9b2J", r"\u202egnp.exe \ud800 \x9b2J"),
        ("é 東京 👍", "é 東京 👍"),
        ("x" * 9999, "x" * 500),
        ("\a" * 500, r"\x07" * 125),
        (Mute(), "without a message"),
    ],
)
def test_one_line_that_a_terminal_may_show(said, shown):
    assert one_line(said) == shown
