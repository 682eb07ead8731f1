"""Every experiment end to end in miniature, and the machinery of verdicts on numbers whose answer is known."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fdpg_fast.errors import UserError
from fdpg_fast.experiments.experiment import FOLDER, Experiment, cases, find_folder, load_experiment
from fdpg_fast.experiments.findings import (
    BetweenFinding,
    EqualFinding,
    MoreFinding,
    SameOrderFinding,
    UndominatedFinding,
)
from fdpg_fast.experiments.intervals import average, difference, t_quantile, within_seeds
from fdpg_fast.experiments.page import write_page
from fdpg_fast.experiments.rows import Row, append_row, read_rows
from fdpg_fast.experiments.sweep import run_experiment
from fdpg_fast.measure.estimators import Estimate

NAMES = sorted(path.parent.name for path in FOLDER.glob("*/experiment.yaml"))


def rows_of(values, metric="x", error=math.nan, **labels):
    return [Row(labels, seed, {metric: Estimate(value, error, 1.0)}) for seed, value in enumerate(values)]


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_in_miniature(name, tmp_path):
    page = run_experiment(name, budget="mini", seeds=None, divergences=None, output=str(tmp_path), jobs=1)
    experiment = load_experiment(find_folder(name))
    rows = read_rows(tmp_path / "results.jsonl")
    assert len(rows) == len(cases(experiment, "mini"))
    text = page.read_text()
    studies = {row.labels["study"] for row in rows}
    judged = [finding for finding in experiment.findings if finding.study in (None, *studies)]
    assert all(finding.claim in text for finding in judged) and text.count("| **") == len(judged)
    assert all(f"`{finding.study}`" in text for finding in experiment.findings if finding not in judged)
    assert all(any(math.isfinite(e.value) for e in row.metrics.values()) for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_every_budget_of_an_experiment_resolves_to_runs(name):
    experiment = load_experiment(find_folder(name))
    assert {"mini", "quick", "full"} <= set(experiment.budgets)
    for budget in experiment.budgets:
        found = cases(experiment, budget)
        assert found and len({case.name for case in found}) == len(found)


def test_a_stopped_experiment_goes_on_and_other_settings_are_refused(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "runner.py").write_text(
        "from fdpg_fast.measure.estimators import Estimate\nfrom fdpg_fast.experiments.rows import Row\n"
        "def run_case(settings, seed, folder):\n"
        "    folder.parent.joinpath('calls').open('a').write('x')\n"
        "    if settings['a'] == settings.get('fails'):\n        raise SystemExit\n"
        "    return Row({}, seed, {'x': Estimate(settings['a'] + seed, 0.1, 1.0)})\n"
    )
    spec = (
        f"claim: c\nfairness: f\nrunner: '{folder}/runner.py:run_case'\nrun: {{a: 0, fails: %d}}\n"
        "studies: {s: {axes: {a: {one: {a: 1}, two: {a: 2}}}}}\nbudgets: {full: {seeds: 2}}\n"
        "findings: [{claim: two is more, metric: x, more: {a: two}, less: {a: one}}]\n"
    )
    (folder / "experiment.yaml").write_text(spec % 2)
    options = dict(budget="full", seeds=None, divergences=None, output=str(tmp_path / "out"), jobs=1)
    with pytest.raises(SystemExit):
        run_experiment(str(folder), **options)
    assert len(read_rows(tmp_path / "out" / "results.jsonl")) == 1
    with open(tmp_path / "out" / "results.jsonl", "a") as file:
        file.write('{"labels": {"stu')  # a kill in the middle of a line
    (folder / "runner.py").write_text((folder / "runner.py").read_text().replace("raise SystemExit", "pass"))
    page = run_experiment(str(folder), **options)
    assert len(read_rows(tmp_path / "out" / "results.jsonl")) == 4
    assert (tmp_path / "out" / "calls").read_text() == "x" * 5  # the first row was not run again
    assert "**shown**" in page.read_text()
    (folder / "experiment.yaml").write_text(spec % 9)
    with pytest.raises(UserError, match="other settings"):
        run_experiment(str(folder), **options)


def test_rows_are_read_as_written(tmp_path):
    row = Row({"study": "s"}, 3, {"x": Estimate(1.5, math.nan, math.inf)}, [{"round": 0, "y": math.nan}], 2.0, "f", "m")
    append_row(tmp_path / "r.jsonl", row)
    (read,) = read_rows(tmp_path / "r.jsonl")
    assert read.labels == row.labels and read.seed == 3 and read.fingerprint == "f" and read.machine == "m"
    assert read.metrics["x"].value == 1.5 and math.isnan(read.metrics["x"].standard_error)
    assert math.isinf(read.metrics["x"].ess) and math.isnan(read.curve[0]["y"])
    (tmp_path / "r.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"r\.jsonl:1"):
        read_rows(tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    "b, verdict", [([2.0, 2.1, 1.9], "shown"), ([0.0, 0.1, -0.1], "not shown"), ([3.0, -1.0, 1.0], "inconclusive")]
)
def test_more(b, verdict):
    rows = rows_of([1.0, 1.0, 1.0], f="a") + rows_of(b, f="b")
    finding = MoreFinding(claim="c", metric="x", more={"f": "b"}, less={"f": "a"})
    assert finding.judge(rows).verdict == verdict
    assert (
        MoreFinding(claim="c", metric="x", more={"f": "b"}, less={"f": "a"}, margin=1.5).judge(rows).verdict != "shown"
    )


def test_equal_is_not_more():
    rows = rows_of([0.0], error=0.0, f="a") + rows_of([0.0], error=0.0, f="b")
    assert MoreFinding(claim="c", metric="x", more={"f": "b"}, less={"f": "a"}).judge(rows).verdict == "not shown"


def test_without_any_error_nothing_is_shown():
    rows = rows_of([1.0], f="a") + rows_of([2.0], f="b")
    assert MoreFinding(claim="c", metric="x", more={"f": "b"}, less={"f": "a"}).judge(rows).verdict == "inconclusive"
    rows = rows_of([1.0], error=0.1, f="a") + rows_of([2.0], error=0.1, f="b")
    verdict = MoreFinding(claim="c", metric="x", more={"f": "b"}, less={"f": "a"}).judge(rows)
    assert verdict.verdict == "shown" and "one seed" in verdict.evidence
    assert MoreFinding(claim="c", metric="x", more={"f": "?"}, less={"f": "a"}).judge(rows).verdict == "inconclusive"


def test_runs_are_paired_within_the_other_labels():
    """A large effect of the setting does not hide a small one of the divergence, and seeds are paired."""
    noise = torch.randn(3, generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for setting, level in (("easy", 100.0), ("hard", 0.0)):
        rows += rows_of([level + x for x in noise], f="a", setting=setting)
        rows += rows_of([level + x + 0.5 + 0.01 * i for i, x in enumerate(noise)], f="b", setting=setting)
    found = difference(rows, "x", {"f": "b"}, {"f": "a"})
    assert found.mean == pytest.approx(0.51) and found.half_width < 0.05


def test_intervals_of_differences_cover():
    rng = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(400):
        draws = torch.randn(2, 2, 3, generator=rng).tolist()
        rows = [row for s in (0, 1) for f in (0, 1) for row in rows_of(draws[s][f], f=str(f), setting=str(s))]
        found = difference(rows, "x", {"f": "0"}, {"f": "1"})
        hits += found.low < 0 < found.high
    assert 0.92 < hits / 400 < 0.98


def test_intervals_within_seeds_leave_out_what_seeds_differ_in():
    rows = rows_of([10.0, 20.0, 60.0], error=0.0, a="one") + rows_of([11.0, 21.0, 61.0], error=0.0, a="two")
    low, high = within_seeds(rows, "x")
    assert (low.mean, high.mean) == pytest.approx((30, 31))
    assert low.half_width == pytest.approx(0, abs=1e-9)
    assert within_seeds(rows[:-1], "x")[0].half_width > 10  # a run is missing: nothing to hold it against

    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):  # ten seeds that shift three settings together: the interval is of the setting's own noise
        noise = torch.randn(3, 10, generator=generator) + 100 * torch.randn(10, generator=generator)
        rows = [row for k in range(3) for row in rows_of((k + noise[k]).tolist(), a=str(k))]
        found = within_seeds(rows, "x")
        grand = sum(interval.mean for interval in found) / 3
        hits += abs(found[0].mean - grand + 1) <= found[0].half_width * math.sqrt(2 / 3)
    assert 0.92 <= hits / 400 <= 0.98


def test_a_number_that_all_seeds_share_has_the_error_of_its_measurement():
    shared = average(rows_of([2.0, 2.0, 2.0], error=0.1, a="one"), "x", {"a": "one"})
    assert shared.half_width == pytest.approx(0.196)
    spread = average(rows_of([2.0, 2.0, 2.1], error=0.1, a="one"), "x", {"a": "one"})
    assert spread.half_width == pytest.approx(t_quantile(2) * math.sqrt(0.02 / 3 / 2) / math.sqrt(3))


def test_equal_and_between():
    rows = rows_of([1.0, 1.01, 0.99], f="a") + rows_of([1.0, 1.0, 1.0], f="b") + rows_of([2.0, 2.1, 1.9], f="c")
    equal = lambda other: EqualFinding(claim="c", metric="x", equal=[{"f": "a"}, {"f": other}], within=0.1)  # noqa: E731
    assert equal("b").judge(rows).verdict == "shown" and equal("c").judge(rows).verdict == "not shown"
    between = lambda *limits: BetweenFinding(claim="c", metric="x", of={"f": "a"}, between=limits)  # noqa: E731
    assert between(0.9, 1.1).judge(rows).verdict == "shown"
    assert between(1.5, 2.0).judge(rows).verdict == "not shown"
    assert between(1.0, 2.0).judge(rows).verdict == "inconclusive"


def test_the_distance_of_two_metrics_is_taken_within_runs():
    rows = [
        Row({"a": "one"}, seed, {"x": Estimate(10.0**seed, 0.3, 1.0), "y": Estimate(10.0**seed - noise, 0.4, 1.0)})
        for seed, noise in enumerate((0.9, 1.1, 1.0))
    ]
    near = BetweenFinding(claim="c", metric="x", minus="y", of={"a": "one"}, between=(0.5, 1.5))
    assert near.judge(rows).verdict == "shown"
    assert near.model_copy(update={"between": (-0.5, 0.5)}).judge(rows).verdict == "not shown"
    one = near.judge(rows[:1])
    assert one.verdict == "inconclusive" and "0.9 ± 0.98" in one.evidence
    assert near.model_copy(update={"minus": "z"}).judge(rows).verdict == "inconclusive"


def two_metrics(x, y, **labels):
    return [
        Row(labels, seed, {"x": Estimate(a, 0.0, 1.0), "y": Estimate(b, 0.0, 1.0)})
        for seed, (a, b) in enumerate(zip(x, y, strict=True))
    ]


def test_domination():
    near, far = [1.0, 1.01, 0.99], [2.0, 2.01, 2.03]
    finding = UndominatedFinding(claim="c", metrics=["x", "y"], undominated={"f": "js"}, by={"f": "kl"})
    trade = two_metrics(far, near, f="js") + two_metrics(near, far, f="kl")
    assert finding.judge(trade).verdict == "shown"
    worse = two_metrics(near, near, f="js") + two_metrics(far, far, f="kl")
    assert finding.judge(worse).verdict == "not shown"
    alike = two_metrics(near, near, f="js") + two_metrics([0.9, 1.1, 1.0], [1.1, 0.9, 1.0], f="kl")
    assert finding.judge(alike).verdict == "inconclusive"


def test_same_order():
    low, high = [1.0, 1.01, 0.99], [2.0, 2.02, 1.99]
    finding = SameOrderFinding(claim="c", same_order=["x"], across={"size": ["s", "l"]})
    small = rows_of(low, divergence="kl", size="s") + rows_of(high, divergence="js", size="s")
    same = rows_of(low, divergence="kl", size="l") + rows_of(high, divergence="js", size="l")
    turned = rows_of(high, divergence="kl", size="l") + rows_of(low, divergence="js", size="l")
    assert finding.judge(small + same).verdict == "shown"
    assert finding.judge(small + turned).verdict == "not shown"
    medium = [replace(row, labels=row.labels | {"size": "m"}) for row in small]
    missing = finding.judge(small + medium)
    assert missing.verdict == "inconclusive" and missing.evidence.endswith("; no runs of l")


def test_the_spread_of_another_study_does_not_widen_an_order():
    low, high = [1.0, 1.01, 0.99], [2.0, 2.02, 1.99]
    finding = SameOrderFinding(claim="c", same_order=["x"], across={"size": ["s", "l"]})
    small = rows_of(low, divergence="kl", size="s", study="a") + rows_of(high, divergence="js", size="s", study="a")
    large = rows_of([-40, 0, 40], divergence="kl", size="l", study="b")
    large += rows_of([60, 100, 143], divergence="js", size="l", study="b")
    assert finding.judge(small + large).verdict == "shown"
    noisy = rows_of([60, 250, -10], divergence="js", size="l", study="b")
    assert finding.judge(small + large[:3] + noisy).verdict == "inconclusive"
    assert "of 1 pairs that differ clearly at one of them 0" in finding.judge(small + large[:3] + noisy).evidence


def test_t_quantiles():
    for degrees, value in ((1, 12.706), (2, 4.303), (30, 2.042), (40, 2.0211), (120, 1.9799)):
        assert t_quantile(degrees) == pytest.approx(value, abs=2e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (("full", None, ["nonsense"]), "--divergences: 'nonsense' is not one of"),
        (("huge", None, None), "--budget: 'huge' is not one of"),
    ],
)
def test_what_an_experiment_does_not_have(change, message):
    with pytest.raises(UserError, match=message):
        cases(load_experiment(find_folder("lexical")), *change)
    with pytest.raises(UserError, match="one of .*lexical"):
        find_folder("nowhere")
    assert isinstance(FOLDER, Path)


def test_a_page_draws_curves_over_k_where_a_finding_is_about_them(tmp_path):
    metrics = {f"pass@{k}/right": Estimate(value, 0.02, 64.0) for k, value in ((1, 0.2), (2, 0.3), (4, 0.5), (8, 0.6))}
    rows = [
        Row({"study": "s", "method": method, "task": task}, seed, metrics)
        for method in ("alpha:0.1", "base", "other")
        for task in ("one", "two")
        for seed in (0, 1)
    ]
    labels = {"study": "s"}
    finding = {"claim": "c", "metric": "pass@8/right", "more": labels, "less": labels}
    spec = {"claim": "c", "fairness": "f", "run": {}, "studies": {"s": {}}, "budgets": {"full": {"seeds": 2}}}
    for name, findings in ("with", [finding]), ("without", []):
        (tmp_path / name).mkdir()
        page = write_page(tmp_path / name, "x", "full", Experiment(**spec, findings=findings), rows)
        assert ("pass-at-k.png" in page.read_text()) == (name == "with") == (tmp_path / name / "pass-at-k.png").exists()
        assert "pass@4 of right | pass@8 of right" in page.read_text() and "pass@2" not in page.read_text()
