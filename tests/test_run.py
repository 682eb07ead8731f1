"""Whole runs on a tiny model: what they leave, that they repeat, and that their numbers are what they say."""

import itertools
import math
import shutil
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdpg_fast import Trainer, load_config
from fdpg_fast.clock import Clock
from fdpg_fast.config.load import parse_config
from fdpg_fast.config.schema import LossConfig, OptimizerConfig
from fdpg_fast.errors import RunError
from fdpg_fast.experiments.compare import frozen_base_sample, measure_runs
from fdpg_fast.learner import Learner
from fdpg_fast.models.load import load_model
from fdpg_fast.runs.folder import read_config
from fdpg_fast.runs.tables import doubtful
from fdpg_fast.session import Session
from support import runs

SOFT = {"kind": "rlhf", "beta": 0.5, "feature": runs.LETTERS["feature"]}


@pytest.fixture(scope="module")
def run_dir(tiny_model, tmp_path_factory):
    trainer = {"rounds": 5, "checkpoint_every": 2}
    return runs.train(tiny_model, tmp_path_factory.mktemp("run"), trainer=trainer)


def test_folder_holds_what_the_guide_lists(run_dir):
    assert {path.name for path in run_dir.iterdir() if not path.name.startswith(".")} == {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "evaluation.jsonl",
        "target-samples.safetensors",
        "checkpoints",
        "report.html",
    }
    # of rounds 2, 4 and 5, the last of which always writes one, two are kept
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["round-000004", "round-000005"]
    assert not list(run_dir.rglob("*.tmp")) and load_config(run_dir / "config.yaml").run_dir == str(run_dir)


def test_metrics_have_one_object_a_round_and_known_namespaces(run_dir):
    rows = runs.rows(run_dir / "metrics.jsonl")
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4]
    assert {key.partition("/")[0] for row in rows for key in row} == {
        *("round", "loss", "target", "policy", "z", "time", "memory", "engine"),
    }
    assert {tuple(row) for row in rows} == {tuple(rows[0])}  # the same keys in every round
    for row in rows:
        phases = sum(row[f"time/{phase}"] for phase in ("sample", "features", "base", "update", "sync"))
        assert 0 < phases <= row["time/round"] and row["memory/peak_bytes"] > 1e7


def test_engine_and_learner_agree_on_every_token(run_dir):
    for row in runs.rows(run_dir / "metrics.jsonl"):
        assert 0 <= row["engine/logprob_gap_mean"] <= row["engine/logprob_gap_max"] < 1e-4


def test_policy_moves_away_from_the_base(run_dir):
    rows = runs.rows(run_dir / "metrics.jsonl")
    assert abs(rows[0]["policy/kl_to_base"]) < 1e-4 < rows[-1]["policy/kl_to_base"]
    assert [row["policy/skipped"] for row in rows] == [0.0] * 5
    assert all(row["policy/grad_norm"] > 0 for row in rows)


def test_metrics_are_those_of_the_logged_samples(run_dir):
    for metrics, samples in zip(runs.rows(run_dir / "metrics.jsonl"), runs.samples_by_round(run_dir), strict=True):
        assert len(samples) == 2 * 4 and {sample["prompt"] for sample in samples} <= set(runs.PROMPTS)
        values = [sample["features"]["letters"] for sample in samples]
        assert metrics["target/letters"] == pytest.approx(sum(values) / 8)
        assert values == [float(any(c.isascii() and c.isalpha() for c in s["completion"])) for s in samples]
        assert metrics["target/in_support"] == sum(s["log_score"] != "-inf" for s in samples) / 8
        assert metrics["policy/finished"] == sum(s["finished"] for s in samples) / 8


def test_evaluations_of_before_and_after_are_recorded(run_dir):
    before, after = runs.rows(run_dir / "evaluation.jsonl")
    assert (before["round"], after["round"]) == (0, 5)
    for row in (before, after):
        assert (row["num_samples"], row["num_contexts"]) == (9, 3)
        assert {"feature/letters", "kl_to_base", "log_z", "divergence/jensen_shannon"} <= row["metrics"].keys()
    assert abs(before["metrics"]["kl_to_base"]["value"]) < 1e-4 < after["metrics"]["kl_to_base"]["value"]


def test_checkpoint_is_a_model_that_transformers_opens(run_dir, tiny_model):
    folder = run_dir / "checkpoints/round-000005"
    model = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"]) == "def f(x):"
    ids = torch.tensor([tokenizer("def f(")["input_ids"]])
    assert (model(ids).logits - base(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("per_context", [True, False], ids=["per context", "pooled"])
@pytest.mark.parametrize("kind", ["running", "batch"])
def test_partition_is_the_mean_of_the_importance_weights(kind, per_context, tiny_model, tmp_path):
    run_dir = runs.train(
        tiny_model,
        tmp_path,
        target=[SOFT],
        trainer={"rounds": 3},
        partition={"kind": kind, "per_context": per_context},
    )
    weights = defaultdict(list)
    for metrics, samples in zip(runs.rows(run_dir / "metrics.jsonl"), runs.samples_by_round(run_dir), strict=True):
        if kind == "batch":
            weights.clear()
        for sample in samples:
            owner = sample["prompt"] if per_context else None
            weights[owner].append(math.exp(sample["log_score"] - sample["log_q"]))
        expected = [math.log(sum(own) / len(own)) for own in weights.values()]
        assert metrics["z/log_z"] == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_oracle_partition_stays_as_it_was_before_training(tiny_model, tmp_path):
    run_dir = runs.train(tiny_model, tmp_path, target=[SOFT], trainer={"rounds": 3}, partition={"kind": "oracle"})
    rows = runs.rows(run_dir / "metrics.jsonl")
    assert len({row["z/log_z"] for row in rows}) == 1
    assert 0 < rows[0]["z/log_z"] < 2  # φ = exp(0 or 1 / 0.5)
    assert rows[0]["z/ess"] > 16


def test_completions_of_no_prompt_start_from_bos(tiny_model, tmp_path):
    run_dir = runs.train(tiny_model, tmp_path, contexts={}, loss={"baseline": "running"})
    assert {sample["prompt"] for sample in runs.rows(run_dir / "samples.jsonl")} == {""}
    assert [row["num_contexts"] for row in runs.rows(run_dir / "evaluation.jsonl")] == [1, 1]


@pytest.mark.parametrize("name", ["reverse_kl", "neyman_chi2"])
def test_soft_target_takes_divergences_that_a_constraint_does_not(name, tiny_model, tmp_path):
    run_dir = runs.train(tiny_model, tmp_path, target=[SOFT], divergence=name)
    assert all(
        row["target/in_support"] == 1 and row["policy/grad_norm"] > 0 for row in runs.rows(run_dir / "metrics.jsonl")
    )
    after = runs.rows(run_dir / "evaluation.jsonl")[1]["metrics"]
    assert math.isfinite(after[f"divergence/{name}"]["value"])


def test_target_that_is_never_met_changes_nothing(tiny_model, tmp_path, capsys):
    never = {"kind": "pointwise", "feature": {"kind": "regex", "name": "never", "pattern": "(?!)"}}
    run_dir = runs.train(tiny_model, tmp_path, target=[never], trainer={"rounds": 3}, optimizer={"weight_decay": 0.1})
    rows = runs.rows(run_dir / "metrics.jsonl")
    assert [(row["policy/skipped"], row["z/log_z"], row["target/ess"]) for row in rows] == [(1.0, "-inf", 0.0)] * 3
    assert capsys.readouterr().err.count("log Z -inf") == 3
    weights, base = (load_file(f / "model.safetensors") for f in (run_dir / "checkpoints/round-000003", tiny_model))
    assert weights.keys() == base.keys() and all(torch.equal(weights[name], base[name]) for name in base)


def test_policy_that_is_no_longer_a_number_stops_the_run(tiny_model, tmp_path):
    config = runs.settings(tiny_model, tmp_path / "run", trainer={"rounds": 4, "checkpoint_every": 2})

    trainer = Trainer(parse_config(config))
    original = trainer.round

    def poisoned(index: int):  # as an overflow in the third round's update would
        done = original(index)
        if index == 2:
            trainer.session.state.learner.policy.head.weight.data.fill_(math.nan)
        return done

    trainer.round = poisoned
    with pytest.raises(RunError, match="not finite.*optimizer.learning_rate"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["round-000002"]


def test_equal_seeds_give_equal_runs_and_others_do_not(tiny_model, tmp_path):
    # one context and hardly any learning: neither the order of contexts nor new weights can be what differs
    fixed = {
        "contexts": {"train": str(runs.write_contexts(tmp_path, "tea "))},
        "optimizer": {"learning_rate": 1e-12},
    }
    one, same, other = (
        runs.train(tiny_model, tmp_path, name, trainer={"seed": seed}, **fixed)
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    runs.assert_equal(runs.record(one), runs.record(same))
    texts = [
        [sample["completion"] for sample in samples] for run in (one, other) for samples in runs.samples_by_round(run)
    ]
    assert all(a != b for a, b in itertools.combinations(texts, 2))  # of two rounds of two runs
    evaluated = [runs.rows(run / "evaluation.jsonl")[0]["metrics"]["entropy_per_token"] for run in (one, other)]
    assert evaluated[0] != evaluated[1]


def test_seed_covers_features_that_draw_from_the_global_generators(tiny_model, tmp_path):
    (tmp_path / "drawing.py").write_text(
        "import random, numpy, torch\n"
        "def noisy(completions):\n"
        "    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in completions]\n"
    )
    target = [runs.imported(tmp_path / "drawing.py", "noisy")]
    one, same = (runs.record(runs.train(tiny_model, tmp_path, name, target=target)) for name in ("one", "same"))
    runs.assert_equal(one, same)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_learning_rate_rises_for_two_rounds_and_follows_its_schedule(schedule, expected, tiny_model):
    settings = OptimizerConfig(learning_rate=2e-4, schedule=schedule, warmup_rounds=2)
    learner = Learner(
        load_model(str(tiny_model), "float32", "cpu", trust_remote_code=False),
        LossConfig(),
        settings,
        rounds=6,
        micro_batch_tokens=1,
    )
    assert [learner.learning_rate(i) / 2e-4 for i in range(6)] == pytest.approx(expected)


def test_learning_rate_of_the_schedule_is_the_one_that_is_used(tiny_model, tmp_path):
    """Adam's first step moves every weight by the learning rate, times g / (|g| + ε)."""
    trainer = {"rounds": 1}
    run_dir = runs.train(tiny_model, tmp_path, trainer=trainer, optimizer={"learning_rate": 8e-3, "warmup_rounds": 3})
    assert runs.rows(run_dir / "metrics.jsonl")[0]["policy/learning_rate"] == pytest.approx(2e-3)
    weights, base = (load_file(f / "model.safetensors") for f in (run_dir / "checkpoints/round-000001", tiny_model))
    largest = max(float((weights[name] - base[name]).abs().max()) for name in base)
    assert largest == pytest.approx(2e-3, rel=1e-3)


def test_library_does_what_the_command_line_does(tiny_model, tmp_path, caplog):
    shell = runs.train(tiny_model, tmp_path, "shell")
    data = load_config(shell / "config.yaml").model_dump() | {"run_dir": str(tmp_path / "library")}
    trainer = Trainer(parse_config(data))
    caplog.clear()
    with caplog.at_level("INFO", "fdpg_fast"):
        result = trainer.train()
    said = [record.getMessage() for record in caplog.records]
    assert result.run_dir == tmp_path / "library" and result.report.exists()
    assert result.before.metrics["kl_to_base"].value == pytest.approx(0, abs=1e-4)
    assert result.after.as_dict()["num_samples"] == 9
    assert said[0].startswith("target: 143 of 192 samples of the base meet it")
    assert said[1] == "engine: transformers, the learner's own module (there is no GPU)"
    assert [line.split("  ")[0] for line in said[2:]] == ["round 1/2", "round 2/2"]
    saved = load_file(result.run_dir / "checkpoints/round-000002/model.safetensors")
    trained = trainer.session.state.learner.policy.model.state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)
    runs.assert_equal(runs.record(result.run_dir), runs.record(shell))


def test_evaluate_measures_the_checkpoint_on_a_fresh_sample(run_dir, tmp_path, capsys):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    found = []
    for seed in (1, 1, 2):
        assert runs.call("evaluate", copy, "--samples=5", f"--seed={seed}") == 0
        found.append(runs.strict((copy / "evaluation.json").read_text()))
        shown = capsys.readouterr()
        assert "round 5" in shown.out and "E[letters]" in shown.out and shown.err == ""
        assert f"written to {copy}/evaluation.json" in shown.out
    assert found[0] == found[1] != found[2] and found[0]["num_samples"] == 15
    runs.assert_equal(runs.record(copy), runs.record(run_dir))


@pytest.mark.parametrize("sections", [{}, {"lora": {"rank": 2}}, {"dtype": "bfloat16"}], ids=["", "LoRA", "bfloat16"])
def test_before_training_all_distance_to_exact_samples_of_the_target_is_z(sections, tiny_model, tmp_path):
    run_dir = runs.train(tiny_model, tmp_path, evaluation={"base_samples": 16}, **sections)
    before, after = (row["metrics"] for row in runs.rows(run_dir / "evaluation.jsonl"))
    kept = load_file(run_dir / "target-samples.safetensors")
    assert int(kept["draws"]) == 16
    accepted = kept["context_index"].bincount().double()
    log_z = (accepted / 16).log() + (1 / accepted - 1 / 16) / 2
    cost = before["target_samples/kl_of_target_to_base"]["value"]
    assert cost == pytest.approx(-float(log_z.mean())) and before["target_samples/contexts_left_out"]["value"] == 0
    assert before["target_samples/forward_kl"]["value"] == pytest.approx(cost, abs=1e-5)  # log a is log π
    assert after["target_samples/forward_kl"]["value"] != before["target_samples/forward_kl"]["value"]
    assert after["target_samples/kl_of_target_to_base"] == before["target_samples/kl_of_target_to_base"]


def test_exact_samples_of_the_target_stay_with_the_run(tiny_model, tmp_path, capsys):
    run_dir = runs.train(tiny_model, tmp_path)
    path = run_dir / "target-samples.safetensors"
    kept, last = path.read_bytes(), runs.rows(run_dir / "evaluation.jsonl")[-1]["metrics"]

    def exact() -> dict[str, float]:
        assert runs.call("evaluate", run_dir) == 0
        found = runs.strict((run_dir / "evaluation.json").read_text())["metrics"]
        return {key: found[key]["value"] for key in found if key.startswith("target_samples/")}

    found = exact()
    assert found["target_samples/forward_kl"] == last["target_samples/forward_kl"]["value"]  # needs p's samples alone
    assert found["target_samples/jensen_shannon"] != last["target_samples/jensen_shannon"]["value"]
    assert path.read_bytes() == kept
    path.write_bytes(kept[:-40])
    capsys.readouterr()
    assert runs.call("evaluate", run_dir) == 2
    assert capsys.readouterr().err.startswith(f"fdpg-fast: {path} is damaged (")
    path.unlink()
    assert exact() == {}


@pytest.mark.parametrize(
    "sections",
    [
        {"target": [SOFT]},
        {"target": [runs.LETTERS, SOFT | {"feature": {"kind": "regex", "name": "a", "pattern": "a"}}]},
        {"evaluation": {"base_samples": 0}},
    ],
    ids=["soft", "hard and soft", "not asked for"],
)
def test_without_exact_samples_of_the_target_nothing_is_kept(sections, tiny_model, tmp_path):
    run_dir = runs.train(tiny_model, tmp_path, **sections)
    assert not (run_dir / "target-samples.safetensors").exists()
    (*_, last) = runs.rows(run_dir / "evaluation.jsonl")
    assert not [key for key in last["metrics"] if key.startswith("target_samples/")]


def test_an_evaluation_that_cannot_be_written_has_been_shown(run_dir, tmp_path, capsys):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    (copy / "evaluation.json").mkdir()
    assert runs.call("evaluate", copy, "--samples=2") == 1
    shown = capsys.readouterr()
    assert "E[letters]" in shown.out and f"writing {copy}/evaluation.json: Is a directory" in shown.err


def test_sample_prints_json_lines_of_the_policy(run_dir, tiny_model, capsys):
    def sampled(*options: str) -> list[dict]:
        assert runs.call("sample", run_dir, *options) == 0
        return [runs.strict(line) for line in capsys.readouterr().out.split("\n") if line]

    lines = sampled("--count=4")
    assert len(lines) == 4 and {line["prompt"] for line in lines} <= set(runs.PROMPTS)
    assert lines == sampled("--count=4", "--seed=0") != sampled("--count=4", "--seed=1")
    lines = sampled("--count=2", "--prompt=once upon")
    assert [line["prompt"] for line in lines] == ["once upon"] * 2 and all(line["log_q"] < 0 for line in lines)


@pytest.mark.parametrize("prompt", ["", "x" * 91], ids=["empty", "longer than the model's 96 positions less 6"])
def test_sample_refuses_a_prompt_that_cannot_be_continued(prompt, run_dir, capsys):
    assert runs.call("sample", run_dir, f"--prompt={prompt}") == 2
    assert capsys.readouterr().err.startswith("fdpg-fast: --prompt ")


def test_compare_shows_runs_side_by_side(run_dir, tiny_model, tmp_path, capsys):
    other = runs.train(tiny_model, tmp_path, "other", divergence="total_variation")
    capsys.readouterr()
    page = tmp_path / "both.html"
    assert runs.call("compare", run_dir, other, f"--output={page}") == 0
    table = capsys.readouterr().out
    assert all(text in table for text in ("jensen_shannon", "total_variation", "other", "E[letters]", str(page)))
    assert "<svg" in page.read_text()


def test_compare_holds_all_runs_against_one_z_of_the_base(run_dir, tiny_model, tmp_path):
    other = runs.train(tiny_model, tmp_path, "other", divergence="total_variation", trainer={"rounds": 1, "seed": 3})
    first, second = measure_runs([run_dir, other], samples=4, base_samples=64, seed=9)
    assert first.metrics["log_z"] == second.metrics["log_z"] and math.isfinite(first.metrics["log_z"].value)
    assert first.metrics["kl_to_base"] != second.metrics["kl_to_base"]
    drawn = list(run_dir.glob("base-sample-*.safetensors"))
    session = Session(read_config(run_dir), resume=True)
    base = frozen_base_sample(session, 64, 9, run_dir)  # read back, not drawn again
    phi = session.scorer.target.log_phi(session.scorer.read(base, Clock(), is_of_base=True).values).exp()
    share = [phi[base.context_index == c].mean() for c in range(len(base.contexts))]
    expected = torch.stack(share).log()
    assert first.metrics["log_z"].value == pytest.approx(float(expected[expected.isfinite()].mean()))
    (again,) = measure_runs([run_dir], samples=4, base_samples=64, seed=9)
    assert repr(again) == repr(first)  # some errors are NaN
    assert len(list(run_dir.glob("base-sample-*.safetensors"))) == len(drawn)


def test_compare_measures_runs_of_other_prompts_on_those_of_the_first(run_dir, tiny_model, tmp_path):
    """Each is loaded as it began; prompts, their number and what is asked of a chat are those of the first."""
    contexts = {"train": str(runs.write_contexts(tmp_path, "x", "y"))}
    sections = {"contexts": contexts, "evaluation": {"contexts": 1, "samples_per_context": 5}}
    other = runs.train(tiny_model, tmp_path, "other", **sections)
    for dirs in ([run_dir, other], [other, run_dir]):
        first, second = measure_runs(dirs, 8, 16, 1)
        assert first.metrics["log_z"] == second.metrics["log_z"]
        assert first.num_contexts == second.num_contexts == (1 if dirs[0] == other else 3)


@pytest.mark.parametrize("damage", [lambda content: content[:-40], lambda content: b""])
def test_a_damaged_sample_of_the_base_is_drawn_again(damage, tiny_model, tmp_path):
    alone = runs.train(tiny_model, tmp_path)
    before = repr(measure_runs([alone], 8, 16, 1))  # some errors are NaN
    (path,) = alone.glob("base-sample-*")
    path.write_bytes(damage(path.read_bytes()))
    assert repr(measure_runs([alone], 8, 16, 1)) == before


def test_compare_refuses_texts_of_another_length(run_dir, tiny_model, tmp_path, capsys):
    other = runs.train(tiny_model, tmp_path, "short", engine={"max_new_tokens": 3}, trainer={"rounds": 1})
    capsys.readouterr()
    assert runs.call("compare", run_dir, other) == 2
    assert "distributions over different texts" in capsys.readouterr().err


def test_compare_marks_what_few_samples_of_a_context_bias(run_dir):
    """With a Z of many samples divergences are right even from one sample of the policy; means under p are not."""
    for samples, base_samples in ((1, 64), (2, 2), (4, 1)):
        (found,) = measure_runs([run_dir], samples=samples, base_samples=base_samples, seed=9)
        for key, estimate in found.metrics.items():
            if key.startswith("feature_of_target/") or (base_samples < 64 and key.startswith(("divergence/", "log_z"))):
                assert doubtful(estimate) == math.isfinite(estimate.value), key
            elif key.startswith(("feature/", "kl_to_base", "log_z", "divergence/")):
                assert not doubtful(estimate), key
