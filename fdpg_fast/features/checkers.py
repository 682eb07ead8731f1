"""What judges a model's text in a process apart: a program that answers lines of JSON with lines of JSON.

It is run as a file and imports nothing of ours, so that it starts in the time of the library that it needs. What a
text makes of that library, an endless power or a number of a gigabyte, ends this process and no other: by a signal
after SECONDS of CPU time, which also stops arithmetic in C, or by the limit of memory. `apart.py` starts another one.

Each function below gets what belongs to a prompt and returns what judges a text.
"""

import contextlib
import functools
import json
import re
import signal
import sys

SECONDS = 2.0  # of CPU time for one text: a busy machine changes no verdict
MEMORY = 4 * 2**30  # bytes of address space
# data sets of reasoning-gym that evaluate answers: one of numbers, operators and brackets has nothing to call
ARITHMETIC = {"countdown", "puzzle24"}


@functools.lru_cache(4096)
def _mathematics(text):
    """What math-verify reads in a text: [] if nothing. \\boxed{…} goes before all that only looks like an answer."""
    import math_verify

    extraction = [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()]
    return math_verify.parse(text, extraction, parsing_timeout=None)


def math(gold):
    """Whether the answer that a text names equals the right one, which is in LaTeX or plain."""
    import math_verify

    delimited = any(mark in gold for mark in ("$", "\\(", "\\[", "\\boxed"))
    wanted = _mathematics(gold if delimited else f"${gold}$")
    if not wanted:
        raise ValueError(f"{gold[:80]!r} of the data cannot be read as mathematics")
    return lambda text: bool(math_verify.verify(wanted, _mathematics(text), timeout_seconds=None))


def math_answer():
    """The answer that a text names, as text; numbers by their value."""
    import sympy

    def name(text):
        for found in _mathematics(text)[:1]:
            if isinstance(found, sympy.Expr) and found.is_number and found.is_real:
                return f"{float(sympy.N(found, 15)):.12g}"
            return str(found)
        return None

    return name


@functools.lru_cache(16)
def _data_set(recipe):
    import reasoning_gym

    name, settings = json.loads(recipe)
    return name, reasoning_gym.create_dataset(name, **settings)


@functools.lru_cache(4096)
def _puzzle(recipe, index):
    return _data_set(recipe)[1][index]


def reasoning_gym(recipe, index, question):
    """The score of an answer to a question of a data set that is made again from its recipe, in [0, 1]."""
    (name, data_set), puzzle = _data_set(recipe), _puzzle(recipe, index)
    if puzzle["question"] != question:
        raise ValueError("this data set has other questions in another process; it cannot be used")

    def score(answer):
        if name in ARITHMETIC and not re.fullmatch(r"[\d\s+*/().-]{1,500}", answer, re.ASCII):
            return 0.0
        return float(data_set.score_answer(answer, puzzle))

    return score


def serve(function):
    """Answer each line, a text and the arguments of the function, by ["found", value] or ["failed", why]."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    for line in sys.stdin:
        text, *of_prompt = json.loads(line)
        try:
            judge = function(*of_prompt)
        except Exception as error:
            answer: list[object] = ["failed", str(error) or type(error).__name__]
        else:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends a process that does not handle it
            try:
                answer = ["found", judge(text)]
            except Exception:  # of a text that the library was not made for
                answer = ["found", None]
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # imports and the first use take a second or two, which no text is charged with; what fails here fails the run
    if sys.argv[1] == "reasoning_gym":
        __import__("reasoning_gym")
    elif not math("1/2")(r"$\frac{2}{4}$") or math_answer()("so 0.50") != "0.5":
        sys.exit("math-verify does not work as it did")
    serve({"math": math, "math_answer": math_answer, "reasoning_gym": reasoning_gym}[sys.argv[1]])
