"""Problems of the two tasks, made from their derivations, and how many derivations each has."""

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from features import HIGHEST, MOST_MOVES, countdown_form, moved

HELD_OUT = 20  # one problem in so many is never learned from
SIGNS = {"+": 5, "-": 3, "*": 3}  # how often an expression has them, and a chain its moves


class Problem(NamedTuple):
    prompt: str
    derivation: str
    columns: dict[str, Any]  # what the verifier asks for


class Part(NamedTuple):
    """A part of an expression."""

    text: str
    value: int
    is_sum: bool = False


def joined(left: Part, sign: str, right: Part) -> Part:
    """Two parts as one, with brackets only where they are needed."""

    def inside(part: Part, needs_brackets: bool) -> str:
        return f"({part.text})" if part.is_sum and needs_brackets else part.text

    text = inside(left, sign == "*") + sign + inside(right, sign != "+")
    value = {"+": left.value + right.value, "-": left.value - right.value, "*": left.value * right.value}[sign]
    return Part(text, value, sign != "*")


def draw_countdown(rng: random.Random) -> Problem | None:
    """Three or four numbers and what a random expression makes of them; none where that is not in 1 … HIGHEST."""
    numbers = sorted(rng.randint(1, 9) for _ in range(rng.choice((3, 4, 4))))
    parts = [Part(str(number), number) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        sign = rng.choices([*SIGNS], [*SIGNS.values()])[0]
        parts.append(joined(parts.pop(), sign, parts.pop()))
    text, target, _ = parts[0]
    prompt = f"{target}={','.join(map(str, numbers))}:"
    return Problem(prompt, text, {"numbers": numbers, "target": target}) if 1 <= target <= HIGHEST else None


def draw_chain(rng: random.Random) -> Problem | None:
    """A start, three moves and where a random walk of two moves or more ends; none where it leaves 1 … HIGHEST."""
    moves = [f"+{rng.randint(1, 9)}", f"-{rng.randint(1, 9)}", f"*{rng.randint(2, 3)}"]
    start = value = rng.randint(1, 20)
    seen, steps = {start}, []
    for _ in range(rng.randint(2, MOST_MOVES)):
        move = rng.choices(moves, [*SIGNS.values()])[0]
        value = moved(value, move)
        if value in seen or not 1 <= value <= HIGHEST:
            return None
        seen.add(value)
        steps.append(f"{move}={value}")
    prompt = f"{start}>{value} {' '.join(moves)}:"
    return Problem(prompt, " ".join(steps), {"start": start, "goal": value, "moves": moves})


TASKS = {"countdown": draw_countdown, "chain": draw_chain}


def problems(task: str, held_out: bool, seed: int) -> Iterator[Problem]:
    """Problems of a task without end: those that are held out, or all others."""
    rng = random.Random(f"{seed} {task} {held_out}")
    while True:
        problem = TASKS[task](rng)
        if problem is not None and is_held_out(problem.prompt) == held_out:
            yield problem


def is_held_out(prompt: str) -> bool:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % HELD_OUT == 0


def countdown_derivations(numbers: list[int], target: int) -> set[str]:
    """The forms of all correct expressions."""

    def expressions(parts: tuple[Part, ...]) -> Iterator[str]:
        if len(parts) == 1 and parts[0].value == target:
            yield parts[0].text
        for i, j in itertools.permutations(range(len(parts)), 2):
            rest = [part for place, part in enumerate(parts) if place not in (i, j)]
            for sign in SIGNS:
                yield from expressions((*rest, joined(parts[i], sign, parts[j])))

    found = set(expressions(tuple(Part(str(number), number) for number in numbers)))
    return {form for text in found if (form := countdown_form(text, numbers, target)) is not None}


def chain_derivations(start: int, goal: int, moves: list[str]) -> set[str]:
    """All correct chains."""

    def chains(values: tuple[int, ...], steps: tuple[str, ...]) -> Iterator[str]:
        if values[-1] == goal:
            yield " ".join(steps)
        for move in moves if len(steps) < MOST_MOVES else ():
            value = moved(values[-1], move)
            if value not in values and 1 <= value <= HIGHEST:
                yield from chains((*values, value), (*steps, f"{move}={value}"))

    return set(chains((start,), ()))


DERIVATIONS = {"countdown": countdown_derivations, "chain": chain_derivations}


def is_asked(task: str, derivations: set[str]) -> bool:
    """Whether a problem is for prompts/: with several derivations, and a chain with few of them, all long.

    Of shorter chains the model solves more than a half at once.
    """
    if task == "chain":
        return 1 < len(derivations) < 5 and min(len(text.split()) for text in derivations) >= MOST_MOVES - 1
    return len(derivations) > 1


def different(drawn: Iterable[Problem]) -> Iterator[Problem]:
    """Problems without those that were there before."""
    seen: set[str] = set()
    for problem in drawn:
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem
