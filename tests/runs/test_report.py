import json
import math
import re
from html.parser import HTMLParser

import pytest
import yaml
from rich.cells import cell_len

from fdpg_fast.errors import UserError
from fdpg_fast.experiments.compare import compare_table, read_runs, write_comparison
from fdpg_fast.measure.estimators import Estimate
from fdpg_fast.runs.folder import read_jsonl, to_float, to_json
from fdpg_fast.runs.report import write_report
from fdpg_fast.runs.tables import before_after_table, evaluation_table, text_of, with_error

VOID = {"meta", "br"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def metrics_row(round_index, **changes):
    row = {"round": round_index, "loss": 0.1 - 0.01 * round_index, "time/round": 4.0, "time/sample": 1.0}
    row |= {
        "time/update": 2.0,
        "time/tokens_per_second": 2300.0,
        "z/log_z": -1.1,
        "z/log_z_se": 0.05,
        "z/ess": 80.0,
    }
    row |= {"target/parses": 0.3 + 0.1 * round_index, "target/parses_se": 0.03, "policy/kl_to_base": 0.4}
    return row | changes


def evaluation(round_index, parses, kl):
    values = {
        "feature/parses": parses,
        "kl_to_base": kl,
        "entropy_per_token": 2.0 - kl / 4,
        "distinct_2": 0.6,
    }
    values |= {"self_bleu_5": 0.2, "divergence/jensen_shannon": 0.7 - kl / 10, "divergence/reverse_kl": "inf"}
    values |= {"divergence/forward_kl": 1.2 - kl / 10, "divergence/total_variation": None}
    metrics = {k: {"value": v, "standard_error": 0.01, "ess": 1024} for k, v in values.items()}
    metrics["divergence/total_variation"] = {"value": None, "standard_error": None, "ess": 0.0}
    return {"round": round_index, "num_samples": 1024, "num_contexts": 128, "metrics": metrics}


def sample(round_index, prompt, completion):
    features = {"parses": 1.0}
    return {"round": round_index, "prompt": prompt, "completion": completion, "finished": False} | {
        "features": features,
        "log_score": "-inf",
    }


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", divergence="jensen_shannon", seed=0, after=(0.75, 1.5)):
        path = tmp_path / name
        path.mkdir()
        target = [{"kind": "pointwise", "feature": {"kind": "python_parses", "name": "parses"}}]
        config = {"model": "a/model", "divergence": divergence, "run_dir": str(path), "target": target}
        text = yaml.safe_dump(config | {"trainer": {"rounds": 4, "seed": seed}})
        (path / "config.yaml").write_text(text)
        write_jsonl(path / "metrics.jsonl", [metrics_row(i) for i in range(4)])
        write_jsonl(path / "evaluation.jsonl", [evaluation(0, 0.25, 0.0), evaluation(4, *after)])
        write_jsonl(path / "samples.jsonl", [sample(0, "def f", "oo():\n"), sample(3, "def f", "unc():\n")])
        return path

    return make


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where a tag is closed that is not open."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def assert_self_contained(path):
    page, source = Page(path), path.read_text(encoding="utf-8")
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|@import", source)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src"):
            assert value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    return page


def test_report_is_one_self_contained_page(make_run):
    run = make_run()
    path = write_report(run)
    assert path == run / "report.html"
    page = assert_self_contained(path)
    assert page.tags.count("svg") == 6  # E[φ], KL, log Z, its ESS, loss, tokens/s: entropy was not recorded
    assert "model → parses" in page.text
    assert "0.250 → 0.750" in page.text
    assert "4 s a round" in page.text and "other 1 s (25%)" in page.text
    assert not list(run.glob(".*.tmp"))


def test_report_accepts_a_string(make_run):
    assert write_report(str(make_run())).name == "report.html"


def test_markup_in_samples_names_and_config_is_escaped(make_run):
    run = make_run()
    hostile = "<script>alert(1)</script></pre>&amp;"
    write_jsonl(run / "samples.jsonl", [sample(0, hostile, "\n  a\u2028b" + hostile), sample(3, hostile, hostile)])
    write_jsonl(run / "metrics.jsonl", [metrics_row(0, **{f"target/{hostile}": 0.5, f"target/{hostile}_se": 0.1})])
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["target"][0]["feature"]["name"] = config["model"] = hostile
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    page = assert_self_contained(write_report(run))
    assert hostile in page.text
    assert "\n  a\u2028b" in page.text


def test_samples_of_the_same_prompt_stand_side_by_side(make_run):
    run = make_run()
    rows = [sample(0, "p1", "early"), sample(1, "p2", "never again"), sample(2, "p1", "middle")]
    write_jsonl(run / "samples.jsonl", [*rows, sample(3, "p1", "late")])
    text = Page(write_report(run)).text
    assert re.search(r"round 0 .*p1early.*round 3 .*p1late", text, re.DOTALL)
    assert "middle" not in text and "never again" not in text


def test_samples_without_a_common_prompt_are_still_shown(make_run):
    run = make_run()
    write_jsonl(run / "samples.jsonl", [sample(0, "p1", "early"), sample(3, "p2", "late")])
    text = Page(write_report(run)).text
    assert "p1early" in text and "p2late" in text


@pytest.mark.parametrize("missing", ["metrics", "evaluation", "samples"])
def test_missing_files(make_run, missing):
    run = make_run()
    (run / f"{missing}.jsonl").unlink()
    assert "Nothing recorded." in assert_self_contained(write_report(run)).text
    assert "E[parses]" in before_after_table(run) or missing == "evaluation"
    write_comparison(read_runs([run, run]), run / "compare.html")


def test_only_a_config(tmp_path):
    (tmp_path / "config.yaml").write_text("model: m\n")
    assert_self_contained(write_report(tmp_path))
    assert_self_contained(write_comparison(read_runs([tmp_path]), tmp_path / "new" / "compare.html"))
    assert "–" in before_after_table(tmp_path)
    assert "–" in compare_table(read_runs([tmp_path]))


def test_one_round(make_run):
    run = make_run()
    write_jsonl(run / "metrics.jsonl", [metrics_row(0)])
    assert assert_self_contained(write_report(run)).tags.count("svg") == 6


@pytest.mark.parametrize(("round_index", "shown"), [(0, "0.250 → –"), (4, "– → 0.250")])
def test_one_evaluation_is_before_or_after(make_run, round_index, shown):
    run = make_run()
    write_jsonl(run / "evaluation.jsonl", [evaluation(round_index, 0.25, 0.0)])
    assert shown in Page(write_report(run)).text
    value, dash = (
        before_after_table(run).splitlines()[1].index("0.250"),
        before_after_table(run).splitlines()[1],
    )
    assert (value < dash.index("–")) == (round_index == 0)


def test_the_last_of_several_evaluations_counts(make_run):
    run = make_run()
    write_jsonl(run / "evaluation.jsonl", [evaluation(i, 0.1 * i, 0.0) for i in (0, 4, 8)])
    assert "0.000 → 0.800" in Page(write_report(run)).text


def test_null_and_infinite_metrics(make_run):
    run = make_run()
    nothing = {key: None for key in metrics_row(0) if key != "round"}
    infinite = {key: "inf" for key in nothing}
    rows = [metrics_row(0), {"round": 1, **nothing}, {"round": 2, **infinite}, {"round": 3}, metrics_row(4)]
    write_jsonl(run / "metrics.jsonl", [*rows, metrics_row(5, **{"z/log_z": "-inf", "z/log_z_se": math.nan})])
    write_jsonl(run / "samples.jsonl", [sample(0, "p", "x") | {"features": {"parses": None}, "log_score": None}])
    page = assert_self_contained(write_report(run))
    assert page.tags.count("svg") == 6
    assert "∞" in page.text and "–" in page.text and "nan" not in page.text


def test_metrics_without_a_number_are_not_plotted(make_run):
    run = make_run()
    write_jsonl(run / "metrics.jsonl", [metrics_row(0, loss=None), metrics_row(1, loss="inf")])
    assert "surrogate loss" not in Page(write_report(run)).text


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        ((0.3123, 0.0417), "0.312 ± 0.042"),
        ((31.04, 1.26), "31.0 ± 1.3"),
        ((1234.5, 45.0), "1,234 ± 45"),
        ((3.2e7, 2e7), "3.20e+07 ± 2e+07"),
        ((0.25, math.nan), "0.250"),
        ((0.0, 0.0), "0.00 ± 0.00"),
        ((-1e-9, 0.01), "0.000 ± 0.010"),
        ((-1.1637, 0.139), "-1.16 ± 0.14"),
        ((1.5, math.inf), "1.50"),
        ((math.inf, math.nan), "∞"),
        ((-math.inf, math.nan), "-∞"),
        ((math.nan, math.nan), "–"),
    ],
)
def test_number_of_decimals(number, shown):
    assert with_error(*number) == shown


def test_an_estimate_is_shown_with_half_of_its_interval():
    assert text_of(Estimate(0.3123, 0.0213, 80.0)) == "0.312 ± 0.042"
    assert text_of(Estimate(math.nan, math.nan, math.nan)) == "–"


def test_before_after_table(make_run):
    lines = before_after_table(make_run()).splitlines()
    assert lines[0].split() == ["before", "after", "target"]
    assert lines[1].split() == ["E[parses]", "0.250", "±", "0.020", "0.750", "±", "0.020"]
    by_label = {line.strip().split("  ")[0]: line for line in lines}
    assert by_label["KL to base (nats)"].endswith("1.500 ± 0.020")
    assert by_label["Jensen–Shannon (trained)"].endswith("0.550 ± 0.020")
    assert by_label["reverse KL(π‖p)"].split()[-2:] == ["∞", "∞"]
    assert by_label["total variation"].split()[-2:] == ["–", "–"]
    assert lines[6] == "to target p, by reweighting" and len(lines) == 1 + 1 + 4 + 1 + 4
    assert max(map(len, lines)) <= 100
    # every ± of a column is below the others
    places = [[m.start() for m in re.finditer("±", line)] for line in lines if "±" in line]
    assert all(place == places[0] for place in places)


def with_curves(row, by_k):
    row["metrics"] |= {
        f"{kind}@{k}/parses": {"value": value, "standard_error": 0.01, "ess": 1024}
        for kind in ("pass", "majority")
        for k, value in by_k.items()
    }
    return row


@pytest.fixture
def run_with_curves(make_run):
    run = make_run()
    before = with_curves(evaluation(0, 0.25, 0.0), {1: 0.25, 2: 0.4, 4: 0.5, 8: 0.6, 10: 0.65})
    after = with_curves(evaluation(4, 0.75, 1.5), {10: 0.9, 8: 0.88, 4: 0.8, 2: 0.78, 1: 0.75})
    write_jsonl(run / "evaluation.jsonl", [before, after])
    return run


def test_tables_have_two_k_of_each_curve_and_pages_have_all(run_with_curves):
    table = before_after_table(run_with_curves)
    assert re.findall(r"^(?:E|pass|maj)\S+(?: of \S+)?", table, re.M) == [
        *("E[parses]", "pass@4 of parses", "pass@10 of parses", "majority@4 of parses", "majority@10 of parses")
    ]
    assert re.search(r"pass@10 of parses +0.650 ± 0.020 +0.900 ± 0.020 *$", table, re.M)
    evaluated = evaluation_table(json.loads((run_with_curves / "evaluation.jsonl").read_text().splitlines()[1]))
    assert evaluated.count("pass@") == 2 and "majority@4 of parses" in evaluated
    page = assert_self_contained(write_report(run_with_curves))
    assert page.tags.count("svg") == 8 and "pass@k of parses" in page.text and "majority@k of parses" in page.text


def test_a_comparison_ranks_and_draws_curves_over_k(run_with_curves, make_run, tmp_path):
    runs = read_runs([run_with_curves, make_run("b")])  # one of them measured without
    assert re.search(r"pass@10 of parses +0.900 ± 0.020 +–$", compare_table(runs), re.M)
    assert re.search(r"pass@10 of parses +\*0.900 ± 0.020 +\*0.900", compare_table([runs[0]] * 2), re.M)
    page = assert_self_contained(write_comparison(runs, tmp_path / "x.html"))
    assert "pass@k of parses" in page.text and "at least one of k samples" in page.text


def test_what_the_target_has_stands_beside_what_the_policy_has(make_run):
    """Also whence each distance is: from exact samples of the target, or not."""
    run = make_run()
    row = evaluation(4, 0.75, 1.5)
    more = {"feature_of_target/parses": 1.0, "kl_of_target_to_base": 9.0, "target_samples/forward_kl": 0.875}
    more |= {"target_samples/jensen_shannon": 0.375, "target_samples/kl_of_target_to_base": 0.625}
    more |= {"target_samples/contexts_left_out": 3.0}
    row["metrics"] |= {name: {"value": value, "standard_error": 0.01, "ess": 512} for name, value in more.items()}
    write_jsonl(run / "evaluation.jsonl", [evaluation(0, 0.25, 0.0), row])
    lines = before_after_table(run).splitlines()
    by_label = {line.strip().split("  ")[0]: line for line in lines}
    assert by_label["E[parses]"].endswith("0.750 ± 0.020  1.000 ± 0.020")
    assert by_label["KL to base (nats)"].endswith("1.500 ± 0.020  0.625 ± 0.020")
    assert [line.strip().split("  ")[0] for line in lines[6:]] == [
        "to target p, on exact samples of p",
        "Jensen–Shannon (trained)",
        "forward KL(p‖π)",
        "to target p, by reweighting",
        "reverse KL(π‖p)",
        "total variation",
    ]
    assert "– 0.375 ± 0.020" in " ".join(by_label["Jensen–Shannon (trained)"].split())
    page = Page(write_report(run)).text
    for part in ("under the target 1.000 ± 0.020", "under the target 0.625", "forward KL(p‖π), on exact samples of p"):
        assert part in page
    table = compare_table(read_runs([run, run]))
    assert "Jensen–Shannon, on exact samples of p" in table and "without support, on" not in table


def test_table_keeps_its_width_with_a_long_feature_name(make_run):
    run = make_run()
    row = evaluation(4, 0.5, 1.0)
    row["metrics"] = {f"feature/{'x' * 200}": row["metrics"]["feature/parses"], **row["metrics"]}
    write_jsonl(run / "evaluation.jsonl", [row])
    assert max(map(len, before_after_table(run).splitlines())) <= 100


def test_tables_are_plain_text_whatever_the_names(make_run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    run = make_run()
    names = ("[red]no markup[/red]", "宽的名字", "\\[escaped]", ":smile:", "http://a.b/c")
    row = evaluation(4, 0.5, 1.0)
    features = {f"feature/{name}": row["metrics"]["feature/parses"] for name in names}
    write_jsonl(run / "evaluation.jsonl", [row | {"metrics": features | row["metrics"]}])
    table = before_after_table(run)
    assert "\x1b" not in table and all(f"E[{name}]" in table for name in names)
    # every ± is below the others on a terminal, where some characters take two columns
    assert len({cell_len(line[: line.index("±")]) for line in table.splitlines() if "±" in line}) == 1


@pytest.mark.parametrize(
    ("divergence", "recorded", "name"),
    [
        ("alpha:0.2..0.9", {}, "alpha:0.9"),
        ("alpha:0.2..0.9", {"divergence": "alpha:0.9"}, "alpha:0.9"),
        ("../mine/file.py:mine", {"divergence": "mine"}, "mine"),
        ("../mine/file.py:mine", {}, "../mine/file.py:mine"),
    ],
)
def test_the_trained_divergence_is_found_under_the_name_that_was_measured(make_run, divergence, recorded, name):
    run = make_run(divergence=divergence)
    row = evaluation(4, 0.5, 1.0)
    row["metrics"][f"divergence/{name}"] = {"value": 0.125, "standard_error": 0.01, "ess": 64.0}
    write_jsonl(run / "evaluation.jsonl", [row | recorded])
    (line,) = (line for line in before_after_table(run).splitlines() if "(trained)" in line)
    assert line.startswith(f"  {name} (trained)") and line.endswith("0.125 ± 0.020")
    assert f"to minimise {divergence} between" in Page(write_report(run)).text
    compare_table(read_runs([run, run]))


def test_evaluation_table():
    lines = evaluation_table(evaluation(4, 0.75, 1.5)).splitlines()
    assert lines[0].split() == ["round", "4"]
    assert lines[1].split() == ["E[parses]", "0.750", "±", "0.020"]
    assert [line.split("  ")[0] for line in lines[2:4]] == ["KL to base (nats)", "entropy per token (nats)"]
    assert lines[-1].startswith("Jensen–Shannon") and len(lines) == 10


def test_compare_table_marks_the_best(make_run):
    runs = [make_run("a", "forward_kl", 1, (0.6, 1.0)), make_run("b", "reverse_kl", 2, (0.9, 2.0))]
    lines = compare_table(read_runs([*runs, make_run("c")])).splitlines()
    rows = {line.split("  ")[0]: line for line in lines}
    assert lines[0].split() == ["a", "b", "c"]
    assert rows["trained"].split()[1:] == ["forward_kl", "reverse_kl", "jensen_shannon"]
    assert rows["seed"].split()[1:] == ["1", "2", "0"]
    assert re.findall(r"(\*?[\d.]+) ±", rows["E[parses]"]) == ["0.600", "*0.900", "0.750"]
    assert re.findall(r"(\*?[\d.]+) ±", rows["KL to base (nats)"]) == ["*1.000", "2.000", "1.500"]
    assert re.findall(r"(\*?[\d.]+) ±", rows["forward KL(p‖π)"]) == ["1.100", "*1.000", "1.050"]
    assert "*" not in rows["reverse KL(π‖p)"]
    ends = {line.index("±") for line in lines if "±" in line}
    assert len(ends) == 1


def test_compare_table_does_not_rank_a_prescribed_mean(make_run):
    runs = [make_run("a"), make_run("b", after=(0.9, 2.0))]
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    config["target"] = [{"kind": "distributional", "features": [{"kind": "python_parses"}], "moments": [0.5]}]
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config))
    (line,) = (line for line in compare_table(read_runs(runs)).splitlines() if line.startswith("E[parses]"))
    assert "*" not in line


def test_many_runs_are_shown_in_blocks(make_run):
    table = compare_table(read_runs([make_run(f"a-rather-long-run-{i}", seed=i) for i in range(8)]))
    assert max(map(len, table.splitlines())) <= 100
    seeds = [line.split()[1:] for line in table.splitlines() if line.startswith("seed")]
    assert sum(seeds, []) == [str(i) for i in range(8)] and len(seeds) > 1


def test_comparison_page(make_run, tmp_path):
    runs = [
        make_run("a", "forward_kl"),
        make_run("b", "reverse_kl", after=(0.9, 2.0)),
        make_run("c", "forward_kl", 1),
    ]
    path = write_comparison(read_runs(runs), tmp_path / "compare.html")
    page = assert_self_contained(path)
    assert page.tags.count("svg") == 4  # two trade-offs, curves of E[φ] and KL
    assert "E[parses] against KL to base" in page.text
    assert page.text.count("reverse_kl") >= 4  # legend, a label in each trade-off, table
    assert "0.900" in page.text


def test_runs_of_one_divergence_are_told_apart_by_name(make_run, tmp_path):
    runs = [make_run("fast$_$"), make_run("slow$_$", after=(0.9, 2.0))]
    page = assert_self_contained(write_comparison(read_runs(runs), tmp_path / "compare.html"))
    assert page.text.count("slow$_$") == 5  # legend, a label in each trade-off, two tables


def test_json_holds_every_float(tmp_path):
    row = {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 0.1, "e": "inf", "f": None, "g": True, "h": "\u2028é"}
    line = to_json(row)
    assert json.loads(line, parse_constant=pytest.fail) == {**row, "a": None, "b": ["inf", {"c": "-inf"}]}
    (tmp_path / "rows.jsonl").write_text(line + "\n\n" + line, encoding="utf-8")
    assert read_jsonl(tmp_path / "rows.jsonl", dict) == [json.loads(line)] * 2
    assert read_jsonl(tmp_path / "nothing.jsonl", dict) == []
    assert math.isnan(to_float(None)) and [to_float(x) for x in ("inf", "-inf", 0.1, 3)] == [
        math.inf,
        -math.inf,
        0.1,
        3,
    ]


def test_markup_in_names_of_runs_is_escaped(make_run, tmp_path):
    runs = [make_run("<b>a&amp;-1", "<script>alert(1)"), make_run("{{ 7 * 7 }}", "reverse_kl")]
    page = assert_self_contained(write_comparison(read_runs(runs), tmp_path / "compare.html"))
    assert "<b>a&amp;-1" in page.text and "<script>alert(1)" in page.text and "{{ 7 * 7 }}" in page.text


def test_damaged_line_is_named(make_run):
    run = make_run()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n{"round": 4, "lo\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:6: not a JSON object .*; remove the damaged line"):
        write_report(run)
    write_jsonl(run / "metrics.jsonl", [[1, 2]])
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a JSON object"):
        before_after_table(run)


def test_a_last_line_that_a_kill_cut_short_is_left_out(make_run):
    run = make_run()
    before = before_after_table(run)
    for name in ("metrics", "samples", "evaluation"):
        with open(run / f"{name}.jsonl", "a") as file:
            file.write('{"round": 4, "lo')
    assert before_after_table(run) == before and write_report(run).exists()


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="at least one"):
        read_runs([])
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("- a")
    with pytest.raises(UserError, match="keys and values"):
        write_report(tmp_path)


def test_same_run_same_page(make_run):
    run = make_run()
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_what_rests_on_too_few_samples_of_a_context_is_marked_wherever_it_is_shown(make_run):
    assert text_of(Estimate(0.3123, 0.0213, 800.0, 15.9)) == "0.312 ± 0.042?"
    assert text_of(Estimate(0.3123, 0.0213, 800.0, 16.1)) == "0.312 ± 0.042"
    assert text_of(Estimate(0.3123, 0.0213, 49.0), "divergence/forward_kl") == "0.312 ± 0.042?"
    assert text_of(Estimate(0.3123, 0.0213, 49.0), "kl_to_base") == "0.312 ± 0.042"
    assert text_of(Estimate(math.nan, math.nan, 0.0, 0.0), "divergence/forward_kl") == "–"
    run = make_run()
    row = evaluation(4, 0.5, 1.0)
    write_jsonl(run / "evaluation.jsonl", [row])
    for table in (before_after_table(run), evaluation_table(row), compare_table(read_runs([run]))):
        assert "effective samples" not in table
    row["metrics"]["divergence/forward_kl"]["per_context"] = 3.0
    write_jsonl(run / "evaluation.jsonl", [row])
    for table in (before_after_table(run), evaluation_table(row), compare_table(read_runs([run]))):
        (line,) = (line for line in table.splitlines() if "1.100 ± 0.020" in line)
        assert line.endswith("1.100 ± 0.020?") and "16 a context" in table.splitlines()[-1]
    assert Page(write_report(run)).text.count("0.020?") == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("evaluation", '{"round": 9, "metrics": {"log_z": {"value": "much", "standard_error": 1, "ess": 1}}}'),
        ("evaluation", '{"round": 9, "metrics": {"log_z": {"value": 1}}}'),
        ("evaluation", '{"round": 9, "metrics": {"log_z": {"worth": 1}}}'),
        ("evaluation", '{"round": 9, "metrics": [3]}'),
        ("evaluation", '{"round": 9, "metrics": {"log_z": 3}}'),
        ("samples", '{"round": "last", "prompt": "a"}'),
        ("samples", '{"round": null, "prompt": "a"}'),
        ("samples", '{"round": Infinity, "prompt": "a"}'),
        ("samples", '{"round": 1, "prompt": "a", "features": [1]}'),
        ("samples", '{"round": 1, "prompt": "a", "features": {"f": "much"}}'),
        ("samples", '{"round": 1, "prompt": "a", "log_score": []}'),
        ("samples", "[" * 100_000),
        ("metrics", '{"round": 1, "loss": {}}'),
    ],
)
def test_whatever_else_a_line_holds_is_named_in_one_line(name, line, make_run):
    run = make_run()
    path = run / f"{name}.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(UserError, match=rf"{name}\.jsonl:1: not a JSON object of this kind") as refused:
        write_report(run)
    assert "\n" not in str(refused.value)


def test_a_folder_in_place_of_a_file_is_named(make_run):
    run = make_run()
    (run / "samples.jsonl").unlink()
    (run / "samples.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*samples\.jsonl': Is a directory"):
        write_report(run)
