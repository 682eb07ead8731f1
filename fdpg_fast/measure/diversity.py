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

    Repetition between texts counts as much as within one. It falls as texts are added, so it compares only sets of
    equal size and length.
    """
    *_, (ngrams, _) = _ngrams([WORD.findall(text) for text in texts], n)
    return len(np.unique(ngrams)) / len(ngrams) if len(ngrams) else math.nan


def self_bleu(texts: Sequence[str], n: int = 5) -> float:
    """Mean BLEU-n of each text with all the others as references, in [0, 1]; higher is less varied.

    BLEU is NLTK's `sentence_bleu` with uniform weights, `method1` smoothing and the closest reference length.
    It grows with the number of texts, so it compares only sets of equal size. NaN for fewer than two texts.
    """
    if len(texts) < 2:
        return math.nan
    words = [WORD.findall(text) for text in texts]
    matches = np.array([_matches(*ngrams, len(texts)) for ngrams in _ngrams(words, n)])  # [n, texts]
    lengths = np.array([len(text) for text in words])
    totals = np.maximum(lengths - np.arange(n)[:, None], 1)
    log_precision = np.log(np.where(matches > 0, matches, SMOOTHING) / totals).mean(0)
    ordered = sorted(lengths.tolist())
    scores = np.exp(log_precision + [_log_brevity_penalty(length, ordered) for length in lengths.tolist()])
    # where not one word matches NLTK smooths nothing
    return float(np.where(matches[0] > 0, scores, 0.0).mean())


def _ngrams(texts: Sequence[Sequence[str]], longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For n = 1 … longest: the n-grams of all texts, numbered from 0 on without a gap, and the text that each is of."""
    numbers: dict[str, int] = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for text in texts for word in text], dtype=np.int64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    ngrams, start = words, np.arange(len(words))  # and the place of its first word
    for n in range(1, longest + 1):
        yield ngrams, owner[start]
        inside = start + n < len(words)
        inside[inside] = owner[start[inside] + n] == owner[start[inside]]
        ngrams, start = ngrams[inside], start[inside]
        ngrams = np.unique(ngrams * len(numbers) + words[start + n], return_inverse=True)[1]


def _matches(ngrams: np.ndarray, owner: np.ndarray, texts: int) -> np.ndarray:
    """How many n-grams of each text some other text has, each up to its largest count there."""
    each, times = np.unique(ngrams * texts + owner, return_counts=True)
    ngram, owner = each // texts, each % texts  # of each text once
    times_by_ngram = times[np.lexsort((-times, ngram))]
    first = np.flatnonzero(np.diff(ngram, prepend=-1))
    shared = np.diff(first, append=len(ngram)) > 1
    # the limit for the text with the largest count; the others do not reach it
    second = np.zeros(len(first), dtype=np.int64)
    second[shared] = times_by_ngram[first[shared] + 1]
    return np.bincount(owner, np.minimum(times, second[ngram]), minlength=texts)


def _log_brevity_penalty(length: int, ordered: Sequence[int]) -> float:
    """min(0, 1 − r/length), r the closest length of another text, the shorter of two; 0 for no words."""
    here = bisect_left(ordered, length)  # this text, or one of equal length
    neighbours = [*ordered[max(here - 1, 0) : here], *ordered[here + 1 : here + 2]]
    closest = min(neighbours, key=lambda other: abs(other - length))  # the first, which is the shorter, of two
    return 1 - closest / length if 0 < length < closest else 0.0
