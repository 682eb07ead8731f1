"""Two kinds of failure that a person can do something about; anything else is a bug and keeps its traceback."""


class UserError(Exception):
    """The input is wrong: one line that names the key or file, the value and what would be valid. Exit status 2."""


class RunError(Exception):
    """Something failed while running; checkpoints written so far are intact. Exit status 1."""
