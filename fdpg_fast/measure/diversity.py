"""How varied a set of texts is: Distinct-n (Li et al. 2016) and Self-BLEU (Zhu et al. 2018)."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

WORD = re.compile(r"\w+|[^\w\s]")  # or a punctuation mark
SMOOTHING = 0.1  # NLTK's method1: matches that count for an order of n-grams with none


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the whole set, in (0, 1]; NaN where no text has n words.

    Repetition between texts counts as much as within one. It falls as texts are added, so it compares only sets of
    equal size and length.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(WORD.findall(text), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def self_bleu(texts: Sequence[str], n: int = 5) -> float:
    """Mean BLEU-n of each text with all the others as references, in [0, 1]; higher is less varied.

    BLEU is NLTK's `sentence_bleu` with uniform weights, `method1` smoothing and the closest reference length.
    It grows with the number of texts, so it compares only sets of equal size. NaN for fewer than two texts.
    """
    if len(texts) < 2:
        return math.nan
    words = [WORD.findall(text) for text in texts]
    matches = np.array([_matches(words, order) for order in range(1, n + 1)])  # [n, texts]
    lengths = np.array([len(text) for text in words])
    totals = np.maximum(lengths - np.arange(n)[:, None], 1)
    log_precision = np.log(np.where(matches > 0, matches, SMOOTHING) / totals).mean(0)
    ordered = sorted(lengths.tolist())
    scores = np.exp(log_precision + [_log_brevity_penalty(length, ordered) for length in lengths.tolist()])
    # where not one word matches NLTK smooths nothing
    return float(np.where(matches[0] > 0, scores, 0.0).mean())


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _matches(words: Sequence[Sequence[str]], n: int) -> list[int]:
    """How many n-grams of each text some other text has, each up to its largest count there."""
    counts = [Counter(_ngrams(text, n)) for text in words]
    all_times = defaultdict(list)
    for count in counts:
        for ngram, times in count.items():
            all_times[ngram].append(times)
    # the limit for the text with the largest count; the others do not reach it
    second = {ngram: sorted([0, *times])[-2] for ngram, times in all_times.items()}
    return [sum(min(times, second[ngram]) for ngram, times in count.items()) for count in counts]


def _log_brevity_penalty(length: int, ordered: Sequence[int]) -> float:
    """min(0, 1 − r/length), r the closest length of another text, the shorter of two; 0 for no words."""
    here = bisect_left(ordered, length)  # this text, or one of equal length
    neighbours = [*ordered[max(here - 1, 0) : here], *ordered[here + 1 : here + 2]]
    closest = min(neighbours, key=lambda other: abs(other - length))  # the first, which is the shorter, of two
    return 1 - closest / length if 0 < length < closest else 0.0
