"""Faithfulness of a summary, by a rule that needs no model: does it name only what its source names?"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from .feature import Feature, FeatureSection

# a dotted name, a word or a number; the full stop that ends a sentence stays outside
_WORD = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|\d+(?:\.\d+)*")
_CODE = re.compile(r"`+([^`]+)`+")
_SENTENCE_END = re.compile(r"[.!?:]")


class EntitiesFeature(FeatureSection):
    kind: Literal["entities"]
    """1 where the completion is finished and names something, and only what its prompt names."""
    min_entities: int = Field(default=1, ge=1)
    """Names, numbers and words in code font that it must hold at least."""

    def make(self, device: str) -> Feature:
        return entities(self.min_entities)


def entities(min_entities: int) -> Feature:
    """1 where a completion names at least min_entities entities (see `named`) and its prompt all of them, else 0.

    In the prompt a capitalised word counts wherever it stands. What was cut off before its EOS counts as 0: its last
    name may be half of one.
    """

    def score(completion_texts: list[str], prompt_texts: list[str], finished: list[bool]) -> list[float]:
        known = {prompt: named(prompt, first_words=True) for prompt in set(prompt_texts)}
        rows = zip(completion_texts, prompt_texts, finished, strict=True)
        return [float(done and len(own := named(text)) >= min_entities and own <= known[p]) for text, p, done in rows]

    return Feature("entities", score)


def named(text: str, first_words: bool = False) -> set[str]:
    """The entities of a text: every number, every word in code font, and every word written as a name.

    A name has a capital letter, an underscore, a digit or a dot in it (`TypeError`, `max_length`, `int8`, `os.path`).
    But a word whose only capital is its first letter counts only inside a sentence, unless `first_words` says so, and
    the pronoun I and abbreviations of single letters (`e.g.`) never do. Between backticks every word counts.
    """
    in_code = [match.span(1) for match in _CODE.finditer(text)]
    names: set[str] = set()
    previous_end = None
    for match in _WORD.finditer(text):
        word, start = match[0], match.start()
        starts_sentence = previous_end is None or bool(_SENTENCE_END.search(text, previous_end, start))
        capitalised = word[0].isupper() and word != "I" and (first_words or not starts_sentence)
        if capitalised or _is_name(word) or any(first <= start < last for first, last in in_code):
            names.add(word)
        previous_end = match.end()
    return names


def _is_name(word: str) -> bool:
    is_abbreviation = all(len(part) == 1 and not part.isdigit() for part in word.split("."))
    return not is_abbreviation and any(c in "_." or c.isdigit() or c.isupper() for c in word[0].lower() + word[1:])
