"""Two kinds of failure that a person can do something about; anything else is a bug and keeps its traceback."""

import contextlib
import re
from collections.abc import Iterator

from safetensors import SafetensorError


class UserError(Exception):
    """The input is wrong: one line that names the key or file, the value and what would be valid. Exit status 2."""


class RunError(Exception):
    """Something failed while running; checkpoints written so far are intact. Exit status 1."""


class Diverged(RunError):
    """The policy is no longer one, by this sign: what it has become is not worth a checkpoint."""

    def __init__(self, sign: str):
        super().__init__(f"the policy has diverged: {sign}; restart with a lower optimizer.learning_rate")


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Say plainly that the disk is full or not writable.

    Raises:
        RunError: in place of an OSError, or of what safetensors makes of one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{what}: {reason}; free some space") from error


def one_line(said: object) -> str:
    """What an exception, a server or a name says, in one line of up to 500 letters that a terminal may show."""
    try:
        return printable(" ".join(str(said).split())[:500])[:500].rstrip()
    except Exception:  # of somebody's own class
        return "without a message"


def printable(text: str) -> str:
    """A text in one line, whose control characters do nothing to a terminal: they are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was wanted that there is not, of a GPU or of the machine, by Python, PyTorch or the system."""
    wanted = re.search("(?i)out of memory|(can't|cannot) allocate memory|bad_alloc|ALLOC_FAILED", one_line(error))
    return isinstance(error, MemoryError) or wanted is not None
