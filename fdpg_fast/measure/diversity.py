"""How varied a set of texts is: Distinct-n (Li et al. 2016) and Self-BLEU (Zhu et al. 2018)."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np

WORD = re.compile(r"\w+|[^\w\s]")  # or a punctuation mark
SMOOTHING = 0.1  # NLTK's method1: matches that count for an order of n-grams with none


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the whole set, in (0, 1]; NaN where no text has n words.

    Repetition between texts counts as much as within one (corpus level, Li et al. 2016). It falls as texts
    are added, so it compares only sets of equal size and length.
    """
    *_, (_, gram) = _ngrams(texts, n)
    return len(np.unique(gram)) / len(gram) if len(gram) else math.nan


def self_bleu(texts: Sequence[str], n: int = 5) -> float:
    """Mean BLEU-n of each text with all the others as references, in [0, 1]; higher is less varied.

    BLEU is NLTK's `sentence_bleu` with uniform weights, `method1` smoothing and the closest reference length.
    It grows with the number of texts, so it compares only sets of equal size. NaN for fewer than two texts.

    A reference counts only through the most often that any of the others has an n-gram: the two largest
    counts of each n-gram and the owner of the largest hold that for every text, so time goes with tokens, not
    with pairs of texts.
    """
    if len(texts) < 2:
        return math.nan
    ngrams = list(_ngrams(texts, n))
    lengths = np.bincount(ngrams[0][0], minlength=len(texts))  # in words
    matches = np.array([_matches(owner, gram, len(texts)) for owner, gram in ngrams])  # [n, texts]
    totals = np.maximum(lengths - np.arange(n)[:, None], 1)
    log_precision = np.log(np.where(matches > 0, matches, SMOOTHING) / totals).mean(0)
    scores = np.exp(log_precision + _log_brevity_penalty(lengths))
    # where not one word matches NLTK smooths nothing
    return float(np.where(matches[0] > 0, scores, 0.0).mean())


def _ngrams(texts: Sequence[str], n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each order 1..n, the text and the number of every n-gram; equal n-grams have equal numbers."""
    vocabulary: dict[str, int] = {}
    words = [[vocabulary.setdefault(word, len(vocabulary)) for word in WORD.findall(text)] for text in texts]
    token = np.array([number for text in words for number in text], dtype=np.int64)
    text_of = np.repeat(np.arange(len(texts)), [len(text) for text in words])
    starts, gram = np.arange(len(token)), token  # where each n-gram starts, and its number
    yield text_of, gram
    for order in range(2, n + 1):
        fits = starts + order - 1 < len(token)
        fits[fits] = text_of[starts[fits]] == text_of[starts[fits] + order - 1]
        starts, gram = starts[fits], gram[fits]
        # one more word: number the pairs (shorter n-gram, word) afresh, or the numbers would outgrow 64 bits
        gram = np.unique(gram * len(vocabulary) + token[starts + order - 1], return_inverse=True)[1]
        yield text_of[starts], gram


def _matches(owner: np.ndarray, gram: np.ndarray, num_texts: int) -> np.ndarray:
    """Of each text, how many n-grams some other text has, each up to its largest count there, [texts]."""
    pairs, count = np.unique(gram * num_texts + owner, return_counts=True)
    gram, owner = pairs // num_texts, pairs % num_texts
    order = np.lexsort((-count, gram))
    gram, owner, count = gram[order], owner[order], count[order]
    first = np.append(True, gram[1:] != gram[:-1])[: len(gram)]
    largest = count[first]  # of each n-gram; the row after it is the runner-up, if it is of the same n-gram
    runner_up = np.flatnonzero(first) + 1
    second = np.where(np.append(first, True)[runner_up], 0, np.append(count, 0)[runner_up])
    group = np.cumsum(first) - 1
    others = np.where(first, second[group], largest[group])
    return np.bincount(owner, weights=np.minimum(count, others), minlength=num_texts)


def _log_brevity_penalty(lengths: np.ndarray) -> np.ndarray:
    """min(0, 1 − r/length), r the closest length of another text, the shorter of two; 0 for no words."""
    ordered = sorted(lengths.tolist())
    penalty = np.zeros(len(lengths))
    for i, length in enumerate(lengths.tolist()):
        here = bisect_left(ordered, length)  # this text, or one of equal length
        neighbours = ordered[max(here - 1, 0) : here] + ordered[here + 1 : here + 2]
        closest = min(neighbours, key=lambda other: (abs(other - length), other))
        if 0 < length < closest:
            penalty[i] = 1 - closest / length
    return penalty
