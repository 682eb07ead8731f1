"""pass@k and majority@k against enumeration: of all samples of a size, and of all votes."""

import itertools
import math
from collections import Counter

import pytest
import torch

from fdpg_fast.errors import RunError
from fdpg_fast.features import Completions, Feature, feature
from fdpg_fast.measure.pass_at_k import is_binary, majority_at_k, pass_at_k

F64 = torch.float64
WORLD = {"right": 0.35, "wrong": 0.4, "other": 0.15, None: 0.1}  # what a sample answers, and how often


def of(successes, contexts):
    return torch.tensor(successes, dtype=F64), torch.tensor(contexts)


def probability(sample):
    return math.prod(WORLD[answer] for answer in sample)


def vote(sample):
    """The chance that a majority is right, ties broken at random; spelled out."""
    counts = Counter(answer for answer in sample if answer is not None)
    first = [answer for answer, count in counts.items() if count == max(counts.values())]
    return ("right" in first) / len(first) if first else 0.0


@pytest.mark.parametrize("n", [1, 4, 5])
@pytest.mark.parametrize("success", [0.07, 0.5])
def test_pass_at_k_is_unbiased_over_all_samples_of_a_size(n, success):
    mean = Counter()
    for sample in itertools.product((0, 1), repeat=n):
        weight = success ** sum(sample) * (1 - success) ** (n - sum(sample))
        for k, estimate in pass_at_k(*of(sample, [0] * n)).items():
            mean[k] += weight * estimate.value
    assert sorted(mean) == sorted({1, *(k for k in (2, 4) if k <= n), n})
    for k, value in mean.items():
        assert value == pytest.approx(1 - (1 - success) ** k, abs=1e-12), k


@pytest.mark.parametrize("n", [1, 3, 4])
def test_majority_at_k_is_unbiased_over_all_samples_of_a_size(n):
    mean = Counter()
    for sample in itertools.product(WORLD, repeat=n):
        values = [answer == "right" for answer in sample]
        for k, estimate in majority_at_k(
            torch.tensor(values, dtype=F64), sample, torch.zeros(n, dtype=torch.long)
        ).items():
            mean[k] += probability(sample) * estimate.value
    for k, value in mean.items():
        expected = sum(probability(sample) * vote(sample) for sample in itertools.product(WORLD, repeat=k))
        assert value == pytest.approx(expected, abs=1e-12), k


def test_majority_at_k_is_the_mean_over_all_sets_of_k():
    sample = ["right", "wrong", "wrong", None, "right", "right", "other", "wrong"]
    values = [answer == "right" for answer in sample]
    found = majority_at_k(torch.tensor(values, dtype=F64), sample, torch.zeros(8, dtype=torch.long))
    assert list(found) == [1, 2, 4, 8]
    for k, estimate in found.items():
        sets = [vote(chosen) for chosen in itertools.combinations(sample, k)]
        # over 256 sets at random, but for all samples and single ones
        error = 0 if k in (1, 8) else 3.3 * torch.tensor(sets).std() / 16
        assert estimate.value == pytest.approx(sum(sets) / len(sets), abs=max(1e-12, float(error))), k


@pytest.mark.parametrize("sample, expected", [(["a", "b"], 0.5), ([None, None], 0), (["b", None], 0), (["a", None], 1)])
def test_ties_and_no_votes(sample, expected):
    values, contexts = of([answer == "a" for answer in sample], [0, 0])
    assert majority_at_k(values, sample, contexts)[2].value == expected


def test_contexts_weigh_alike_and_samples_without_a_value_are_not_drawn():
    values, contexts = of([1, 0, 0, 0, math.nan, 1, 1, math.nan, 1, math.nan], [7, 7, 7, 7, 7, 3, 3, 9, 3, 9])
    found = pass_at_k(values, contexts)
    assert {k: estimate.value for k, estimate in found.items()} == pytest.approx(
        {1: (1 / 4 + 1) / 2, 2: (1 / 2 + 1) / 2, 3: (3 / 4 + 1) / 2}
    )
    assert found[1].standard_error == pytest.approx(0.375) and found[1].ess == 7
    votes = majority_at_k(values, [str(value) for value in values.tolist()], contexts)
    assert list(votes) == [1, 2, 3] and votes[3].value < 1


@pytest.mark.parametrize("estimate", [pass_at_k, lambda v, c: majority_at_k(v, [str(x) for x in v.tolist()], c)])
@pytest.mark.parametrize("value", [0, 1])
def test_where_all_samples_of_one_context_are_alike_an_error_remains(estimate, value):
    found = estimate(*of([value] * 16, [0] * 16))
    assert all(result.value == value for result in found.values())
    assert 0.02 < found[1].standard_error < 0.2
    if value == 0:  # 16 failures leave pass@16 open
        assert 0.2 < found[16].standard_error < 0.7


@pytest.mark.parametrize("success, k", [(0.1, 1), (0.1, 8), (0.02, 32), (0.5, 4), (0.1, 64)])
def test_intervals_of_one_context_cover(success, k):
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        values = (torch.rand(64, generator=generator) < success).double()
        low, high = pass_at_k(values, torch.zeros(64, dtype=torch.long))[k].interval
        covered += low <= 1 - (1 - success) ** k <= high
    assert covered / 400 > 0.92


def test_intervals_over_contexts_cover():
    generator, covered = torch.Generator().manual_seed(1), 0
    truth = float((1 - (1 - torch.linspace(0, 1, 10**5, dtype=F64) ** 3) ** 8).mean())  # s = u³, u uniform
    for _ in range(300):
        success = torch.rand(40, generator=generator).double() ** 3
        values = (torch.rand(40, 16, generator=generator) < success[:, None]).double().flatten()
        low, high = pass_at_k(values, torch.arange(40).repeat_interleave(16))[8].interval
        covered += low <= truth <= high
    assert covered / 300 > 0.92


def test_what_is_binary():
    assert is_binary(torch.tensor([0.0, 1.0, math.nan]))
    assert not is_binary(torch.tensor([0.0, 0.5]))
    assert not is_binary(torch.tensor([math.nan]))


def test_pass_at_ten_thousand_is_exact():
    values = torch.zeros(10**4, dtype=F64)
    values[:3] = 1
    found = pass_at_k(values, torch.zeros(10**4, dtype=torch.long))
    n, k = 10**4, 2048
    assert found[k].value == pytest.approx(1 - math.comb(n - 3, k) / math.comb(n, k), rel=1e-10)


BATCH = Completions(["= 4", "?"], ["2+2", "2+2"], [[1], [2]], [True, True], columns={"gold": [4, 4]})


def test_a_feature_reads_answers():
    @feature(answers=lambda completions, gold: [int(text[2:]) if text[0] == "=" else None for text in completions])
    def right(completions, gold):
        return [text == f"= {value}" for text, value in zip(completions, gold, strict=True)]

    assert right.read_answers(BATCH) == ["4", None]
    assert feature(right, name="other").read_answers(BATCH) == ["4", None]


@pytest.mark.parametrize(
    "answers, message",
    [
        (lambda completions: "44", "feature 'f' read '44', not a list of 2 answers"),
        (lambda completions: ["4"], "feature 'f' read \\['4'\\], not a list of 2 answers"),
        (lambda completions: 1 / 0, "feature 'f' raised ZeroDivisionError"),
    ],
)
def test_answers_that_are_none(answers, message):
    with pytest.raises(RunError, match=message):
        Feature("f", lambda completions: [0, 0], answers=answers).read_answers(BATCH)
