"""Verifiers of the two tasks: whether a derivation is right, and which one it is.

They read a completion by a grammar of their own; nothing is evaluated. Two texts are the same derivation where their
forms are equal, so the number of different forms among correct completions says how many ways a model knows.
"""

import re

from fdpg_fast.features import feature

LONGEST = 64  # characters of an expression: four numbers need 11, the rest is room for brackets
HIGHEST, MOST_MOVES = 99, 5  # of a chain: its results are from 1 up to there
MOVE = re.compile(r"([+*-][1-9])=([1-9][0-9]?)")

Terms = list[tuple[str, tuple[str, ...]]]  # of a sum: their signs and factors; a factor is a digit or a sum in brackets


class Wrong(Exception):
    """A text is not in the grammar."""


def countdown_form(completion: str, numbers: list[int], target: int) -> str | None:
    """An expression of +, - and * that has the target's value and uses every number once; none: it is not one.

    The form does not know the order and brackets of sums and of products: 2*(3+4)-1 and (4+3)*2-1 are the same.
    """
    if len(completion) > LONGEST:
        return None
    symbols, used = list(reversed(completion)), []

    def take(some: str) -> str:
        return symbols.pop() if symbols and symbols[-1] in some else ""

    def total() -> tuple[int, Terms]:
        value, terms = product()
        while sign := take("+-"):
            more, others = product()
            value += more if sign == "+" else -more
            terms = terms + (others if sign == "+" else [("+-"[theirs == "+"], factors) for theirs, factors in others])
        return value, terms

    def product() -> tuple[int, Terms]:
        value, terms = factor()
        parts = [terms]
        while take("*"):
            more, terms = factor()
            value *= more
            parts.append(terms)
        if len(parts) == 1:
            return value, terms
        factors = [part[0][1] if len(part) == 1 else (f"({written(part)})",) for part in parts]
        return value, [("+", tuple(sorted(sum(factors, ()))))]

    def factor() -> tuple[int, Terms]:
        if take("("):
            inner = total()
            if not take(")"):
                raise Wrong
            return inner
        digit = take("123456789")
        if not digit:
            raise Wrong
        used.append(int(digit))
        return int(digit), [("+", (digit,))]

    try:
        value, terms = total()
    except Wrong:
        return None
    is_right = not symbols and value == target and sorted(used) == sorted(numbers)
    return written(terms) if is_right else None


def written(terms: Terms) -> str:
    """A sum as one text, whatever the order of its terms."""
    return "".join(sign + "*".join(factors) for sign, factors in sorted(terms))


def chain_form(completion: str, start: int, goal: int, moves: list[str]) -> str | None:
    """At most five moves such as "+5=12 *2=24" from start to goal, every result right and new; none: it is not that.

    The form is the text itself: moves in another order have other results in between.
    """
    value, seen = start, {start}
    steps = completion.split(" ")
    if len(steps) > MOST_MOVES:
        return None
    for text in steps:
        step = MOVE.fullmatch(text)
        if step is None or step[1] not in moves:
            return None
        value = moved(value, step[1])
        if value != int(step[2]) or value in seen or not 1 <= value <= HIGHEST:
            return None
        seen.add(value)
    return completion if value == goal else None


def moved(value: int, move: str) -> int:
    """What a move makes of a value."""
    by = int(move[1])
    return {"+": value + by, "-": value - by, "*": value * by}[move[0]]


def countdown_forms(
    completions: list[str], finished: list[bool], numbers: list[list[int]], target: list[int]
) -> list[str | None]:
    """The derivation in each completion that has ended, none where it is not a correct one."""
    rows = zip(completions, finished, numbers, target, strict=True)
    return [countdown_form(text, *problem) if done else None for text, done, *problem in rows]


def chain_forms(
    completions: list[str], finished: list[bool], start: list[int], goal: list[int], moves: list[list[str]]
) -> list[str | None]:
    """The derivation in each completion that has ended, none where it is not a correct one."""
    rows = zip(completions, finished, start, goal, moves, strict=True)
    return [chain_form(text, *problem) if done else None for text, done, *problem in rows]


@feature
def countdown(completions: list[str], finished: list[bool], numbers: list, target: list) -> list[bool]:
    """1 where the completion has ended and is a correct expression."""
    return [form is not None for form in countdown_forms(completions, finished, numbers, target)]


@feature
def chain(completions: list[str], finished: list[bool], start: list, goal: list, moves: list) -> list[bool]:
    """1 where the completion has ended and is a correct chain."""
    return [form is not None for form in chain_forms(completions, finished, start, goal, moves)]
