"""Distinct-n by hand, Self-BLEU against NLTK's sentence_bleu with all other texts as references."""

import math
import random
import time

import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from fdpg_fast.measure.diversity import WORD, distinct_n, self_bleu


def nltk_self_bleu(texts, n):
    words = [WORD.findall(text) for text in texts]
    smoothing = SmoothingFunction().method1
    scores = [
        sentence_bleu(words[:i] + words[i + 1 :], text, weights=(1 / n,) * n, smoothing_function=smoothing)
        for i, text in enumerate(words)
    ]
    return sum(scores) / len(scores)


def random_texts(rng, count, longest, vocabulary):
    return [" ".join(rng.choices(vocabulary, k=rng.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_self_bleu_equals_nltk_on_random_texts(n):
    rng = random.Random(n)
    for trial in range(60):
        vocabulary = [f"w{i}" for i in range(rng.choice([1, 2, 4, 12, 60]))] + [",", "."]
        longest = rng.choice([1, 3, 8, 30])
        texts = random_texts(rng, count=2 + trial % 9, longest=longest, vocabulary=vocabulary)
        assert self_bleu(texts, n) == pytest.approx(nltk_self_bleu(texts, n), abs=1e-9), texts


@pytest.mark.parametrize(
    "texts",
    [
        ["", ""],
        ["", "a"],
        ["a", "a"],
        ["a", "b"],
        ["a b c d e f", "a b c d e f"],
        ["the cat sat on the mat .", "the cat sat on the mat .", "", "dog"],
        ["a a a a a a", "a a", "a a a b"],  # counts clipped by the owner of the largest and by the others
        ["a b c d", "a b", "a b c d e f"],  # two closest lengths: the shorter one counts
        ["Naïve? Yes; 3.14!", "naïve, yes: 3 14"],
    ],
)
def test_self_bleu_equals_nltk_on_degenerate_texts(texts):
    assert self_bleu(texts) == pytest.approx(nltk_self_bleu(texts, 5), abs=1e-9)


def test_self_bleu_of_identical_long_texts_is_one():
    assert self_bleu(["the quick brown fox jumps over"] * 3) == pytest.approx(1.0)


@pytest.mark.parametrize("texts", [[], ["only one text"]])
def test_self_bleu_needs_two_texts(texts):
    assert math.isnan(self_bleu(texts))


def test_distinct_n_counts_over_the_whole_set():
    texts = ["a b a b", "b a, b", ""]  # a b a b | b a , b
    assert distinct_n(texts, 1) == 3 / 8
    assert distinct_n(texts, 2) == 4 / 6  # ab ba ab | ba a, ,b
    assert distinct_n(texts, 4) == 2 / 2


def test_ngrams_do_not_cross_texts():
    assert distinct_n(["a b", "c d"], 2) == 1.0
    assert math.isnan(distinct_n(["a b", "c d"], 3))


@pytest.mark.parametrize("texts", [[], [""], ["", "  "]])
def test_distinct_n_of_no_words_is_nan(texts):
    assert math.isnan(distinct_n(texts, 1))


def test_two_thousand_texts_take_a_moment():
    rng = random.Random(0)
    texts = [" ".join(f"w{int(rng.paretovariate(0.5)) % 5000}" for _ in range(60)) for _ in range(2000)]
    start = time.process_time()
    value = self_bleu(texts)
    distinct_n(texts, 2)
    # about 0.2 s; with every pair of texts compared it would be minutes
    assert time.process_time() - start < 3
    assert 0 < value < 1
