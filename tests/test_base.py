"""A base of its own: another model, or the policy of some rounds ago; and terms that read log a.

Completions of one token have only 257 texts: there Z is a sum, and the optimum a vector.
"""

import json
import re
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fdpg_fast.base import sampled_from
from fdpg_fast.config.load import parse_config
from fdpg_fast.experiments.compare import measure_runs
from fdpg_fast.session import Session
from support import runs
from support.architectures import save_architecture

TEXT = {"kind": "rlhf", "beta": 0.5, "feature": {"kind": "regex", "name": "late", "pattern": "[n-z]"}}
ONE_TOKEN = {"engine": {"max_new_tokens": 1, "kind": "transformers"}}


@pytest.fixture(scope="module")
def other(tiny_model, tmp_path_factory):
    """A model of another architecture that knows the same tokens."""
    return save_architecture("qwen3", tmp_path_factory.mktemp("other"), tiny_model)


@pytest.fixture(scope="module")
def near(tiny_model, tmp_path_factory):
    """A model that samples nearly what the first one does, so that a/q has a variance."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("near") / "model")
    model.save_pretrained(folder)
    return folder


def log_a(folder, prompt):
    """The log-probs of all first tokens behind a prompt, [V] float64, as transformers has them."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    return logits.double().log_softmax(-1)


def log_phi(folder, target=TEXT):
    """log φ of the completions of one token, [V]; the end token is no text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(257)]
    meets = torch.tensor([bool(re.search(target["feature"]["pattern"], text)) for text in texts]).double()
    return meets / target["beta"] if "beta" in target else meets.log()


def exact_log_z(folder, prompt, kappa=1.0, target=TEXT):
    return float((kappa * log_a(folder, prompt) + log_phi(folder, target)).logsumexp(0))


def written(folder, model, **sections):
    contexts = {"train": str(runs.write_contexts(folder, *runs.PROMPTS))}
    return runs.write_config(folder, runs.settings(model, folder / "run", **{"contexts": contexts} | sections))


def test_the_base_is_what_log_p_is_of(tiny_model, other, tmp_path):
    run_dir = runs.train(tiny_model, tmp_path, base=str(other), target=[TEXT], **ONE_TOKEN)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["base"]["model"] == str(other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    samples = [
        row for row in runs.rows(run_dir / "samples.jsonl") if not row["finished"] and row["completion"].isascii()
    ]
    assert len(samples) > 8
    for row in samples:
        (token,) = tokenizer(row["completion"])["input_ids"][:1]
        score = log_a(other, row["prompt"])[token] + log_phi(other)[token]
        assert row["log_score"] == pytest.approx(float(score), abs=1e-4)


@pytest.mark.parametrize("kappa", [None, 0.5])
@pytest.mark.parametrize("has_own", [False, True], ids=["the model", "another model"])
def test_the_oracles_z_is_that_of_the_base(has_own, kappa, tiny_model, near, tmp_path, capsys):
    power = [] if kappa is None else [{"kind": "base_power", "kappa": kappa}]
    pooled = {"partition": {"kind": "oracle", "per_context": False}}
    pooled["contexts"] = {"train": str(runs.write_contexts(tmp_path, *["tea "] * 240))}
    base = {"base": str(tiny_model)} if has_own else {}
    runs.train(near if has_own else tiny_model, tmp_path, target=[TEXT, *power], **base, **pooled, **ONE_TOKEN)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("oracle: log Z"))
    value, error = map(float, re.search(r"(-?[\d.]+) ± ([\d.]+)", line).groups())
    exact = exact_log_z(tiny_model, "tea ", 1.0 if kappa is None else kappa)
    assert abs(value - exact) < 2 * error < 0.4
    assert not has_own or abs(exact_log_z(near, "tea ", 1.0 if kappa is None else kappa) - exact) > 2 * error
    assert ("reweighted to the base" in line) == has_own


EVERY = {"refresh_every": 2}
ROUNDS = {"trainer": {"rounds": 6, "checkpoint_every": 3, "contexts_per_round": 3}}


@pytest.mark.parametrize("depth", [0, 1])
def test_a_base_that_moves_is_the_policy_of_that_round_and_z_begins_anew(depth, tiny_model, tmp_path):
    sections = runs.merged(ROUNDS, {"trainer": {"pipeline_depth": depth}})
    run_dir = runs.train(tiny_model, tmp_path, base=EVERY, target=[TEXT], **sections)
    for k, row in enumerate(runs.rows(run_dir / "metrics.jsonl")):
        sampled_with, base = max(k - depth, 0), k - k % 2  # rounds before which the weights are
        assert (abs(row["policy/kl_to_base"]) < 1e-4) == (sampled_with == base)
        assert row["z/ess"] <= 4 + 4 * (k % 2)  # of the samples of each prompt since the base moved


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("has_own", [False, True], ids=["the model", "another model"])
def test_a_killed_run_resumes_with_its_base(has_own, lora, tiny_model, other, tmp_path):
    base = {"model": str(other)} if has_own else EVERY

    def write(folder):
        folder.mkdir()
        return written(folder, tiny_model, base=base, lora=lora, target=[TEXT], **ROUNDS)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.run(whole, "train", write(whole)).status == 0
    assert runs.run(killed, "train", write(killed), at=runs.Moment("open", "metrics.jsonl", 4)).status == -9
    ended = runs.run(killed, "train", "--resume", "run")
    assert ended.status == 0, ended.stderr
    runs.assert_equal(runs.record(killed / "run"), runs.record(whole / "run"))


def test_lora_beside_another_base_trains_what_full_weights_would_start_from(tiny_model, other, tmp_path):
    rows = []
    for name, lora in (("full", None), ("lora", {"rank": 2})):
        run_dir = runs.train(tiny_model, tmp_path, name, base=str(other), lora=lora, target=[TEXT])
        rows.append(runs.rows(run_dir / "metrics.jsonl")[0])
    assert rows[0]["policy/kl_to_base"] == pytest.approx(rows[1]["policy/kl_to_base"], abs=1e-4)
    assert rows[0]["policy/kl_to_base"] > 1


@pytest.mark.parametrize("base", [None, EVERY], ids=["another model", "that moves"])
def test_compare_and_evaluate_measure_against_the_runs_own_base(base, tiny_model, other, tmp_path):
    """Z from a sample of the base as it is at the end: for a base that moves, another one in each run."""
    trainer = {"trainer": {"rounds": 3}, "optimizer": {"learning_rate": 0.02}}
    sections = {"target": [TEXT], "base": base or str(other), **ONE_TOKEN, **trainer}
    dirs = [runs.train(tiny_model, tmp_path, name, **sections) for name in ("one", "two")]
    expected = [other, other]
    if base is not None:
        shutil.rmtree(dirs[1])
        dirs[1] = runs.train(tiny_model, tmp_path, "two", **runs.merged(sections, {"trainer": {"seed": 5}}))
        for name, run_dir in zip(("one", "two"), dirs, strict=True):  # round 2 has made the policy of then the base
            short = runs.merged(sections, {"trainer": {"rounds": 2, "seed": 0 if name == "one" else 5}})
            expected[dirs.index(run_dir)] = runs.train(tiny_model, tmp_path, f"{name} before", **short) / (
                "checkpoints/round-000002"
            )
    for run_dir, model, found in zip(dirs, expected, measure_runs(dirs, 16, 4000, 1), strict=True):
        exact = sum(exact_log_z(model, prompt) for prompt in runs.PROMPTS) / 3
        assert found.metrics["log_z"].value == pytest.approx(exact, abs=0.1)
        assert runs.call("evaluate", run_dir, "--samples=8") == runs.call("sample", run_dir) == 0
    sampled = {path.name for path in dirs[0].glob("base-sample-*.safetensors")}
    assert len(sampled) == (1 if base is None else 2)


def test_of_servers_that_have_the_policy_none_samples_from_the_base(tiny_model, other):
    served = {"kind": "vllm_server", "urls": ["http://localhost:1"], "max_new_tokens": 6}
    config = parse_config(runs.settings(tiny_model, "run", base=str(other), engine=served))
    alone = sampled_from(config)
    assert (alone.model, alone.engine.kind, alone.engine.max_new_tokens) == (str(other), "transformers", 6)
    assert sampled_from(parse_config(runs.settings(tiny_model, "run", engine=served))).engine.kind == "vllm_server"


def changed(folder, target, **edits):
    """A copy of a model with other keys in files of JSON."""
    shutil.copytree(folder, target)
    for name, keys in edits.items():
        path = target / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return target


def other_vocabulary(folder, target):
    shutil.copytree(folder, target)
    path = target / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(data))
    return target


def fewer_rows(folder, target):
    shutil.copytree(folder, target)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(250)
    model.save_pretrained(target)
    return target


MOMENTS = {"kind": "distributional", "features": [TEXT["feature"]], "moments": [0.5]}
REFUSED = {
    "vocabulary": (
        other_vocabulary,
        {},
        r"base.model: in its tokenizer 'a' is number \d+, in that of model number \d+",
    ),
    "special": (
        lambda folder, target: changed(folder, target, tokenizer_config={"eos_token": "a"}),
        {},
        r"base.model: its tokenizer has eos_token_id \d+, that of model 0: their texts do not begin and end alike",
    ),
    "rows": (fewer_rows, {}, "base.model: it has 250 embeddings and model 257, so it cannot score all"),
    "kind": (
        lambda folder, target: save_architecture("t5", target, folder),
        {},
        "base.model: it is an encoder-decoder and model a decoder, which get other tokens of a prompt",
    ),
    "place": (lambda folder, target: "./nowhere", {}, "base.model: there is no folder './nowhere' here"),
    "positions": (
        lambda folder, target: changed(folder, target, config={"max_position_embeddings": 6}),
        {},
        "engine.max_new_tokens: 6 leaves no room for a prompt in the model's 6 positions",
    ),
    "weights": (
        lambda folder, target: save_architecture("qwen3", target, folder),
        {"base": EVERY},
        "base.refresh_every: base.model cannot become the policy, for they differ in",
    ),
    "oracle": (
        None,
        {"base": EVERY, "partition": {"kind": "oracle"}},
        "partition.kind: oracle has Z of the first base",
    ),
    "proposal": (
        None,
        {"base": EVERY, "proposal": {"kind": "adaptive"}},
        "proposal.kind: adaptive waits for one target",
    ),
    "λ": (
        None,
        {"base": EVERY, "target": [MOMENTS]},
        "base.refresh_every: λ of a distributional target is of the first",
    ),
    "kappa": (
        None,
        {"target": [{"kind": "base_power", "kappa": -1}]},
        "target.0.kappa: -1: .* greater than or equal to 0",
    ),
}


@pytest.mark.parametrize(("make", "sections", "complaint"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_right_is_refused_before_anything_is_written(
    make, sections, complaint, tiny_model, tmp_path, capsys
):
    if make is not None:
        sections = {**sections, "base": {"model": str(make(tiny_model, tmp_path / "base")), **sections.get("base", {})}}
    assert runs.call("train", written(tmp_path, tiny_model, **sections), "--dry-run") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.match(f"fdpg-fast: {complaint}", said), said
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_with_the_base_that_it_began_with(tiny_model, other, tmp_path, capsys):
    run_dir = runs.train(tiny_model, tmp_path, base=str(other), target=[TEXT])
    capsys.readouterr()
    moved = shutil.copytree(other, tmp_path / "moved")  # what is there counts, wherever it is
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    for base, complaint in (
        ({"model": str(moved)}, None),
        ({"model": str(tiny_model)}, "the base's config has changed"),
        ({"model": None}, "the base's config has changed"),
        ({"model": str(moved), "refresh_every": 3}, "base.refresh_every"),
    ):
        (run_dir / "config.yaml").write_text(yaml.safe_dump({**config, "base": base}))
        assert runs.call("train", "--resume", run_dir) == (0 if complaint is None else 2)
        assert (complaint or "resuming") in capsys.readouterr().err


def test_the_dry_run_says_what_the_base_is(tiny_model, other, tmp_path, capsys):
    assert runs.call("train", written(tmp_path, tiny_model, base=str(other)), "--dry-run") == 0
    assert f"target's base: {other}\n" in capsys.readouterr().out
    assert runs.call("train", written(tmp_path, tiny_model, base=EVERY), "--dry-run") == 0
    assert f"target's base: {tiny_model}, replaced by the policy every 2 rounds\n" in capsys.readouterr().out


def test_a_larger_base_is_scored_in_smaller_passes(tiny_model, tmp_path):
    config = LlamaConfig.from_pretrained(tiny_model, num_hidden_layers=40, hidden_size=128)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "large")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    beside, alone = (
        Session(parse_config(runs.settings(tiny_model, tmp_path / "run", base=base)))
        for base in (str(tmp_path / "large"), {})
    )
    assert beside.micro_batch_tokens == alone.micro_batch_tokens
    assert beside.scorer.micro_batch_tokens < alone.scorer.micro_batch_tokens / 10


def test_an_encoder_decoder_may_have_another_as_its_base(tiny_model, tmp_path):
    model, base = (save_architecture(name, tmp_path / name, tiny_model) for name in ("t5", "bart"))
    moving = runs.train(model, tmp_path, base=EVERY, target=[TEXT], **ROUNDS)
    assert abs(runs.rows(moving / "metrics.jsonl")[4]["policy/kl_to_base"]) < 1e-4
    fixed = runs.train(model, tmp_path, "fixed", base=str(base), target=[TEXT])
    assert abs(runs.rows(fixed / "metrics.jsonl")[0]["policy/kl_to_base"]) > 0.01


def test_a_target_of_the_base_alone_needs_no_feature(tiny_model, other, tmp_path):
    """Distillation: p is the base, Z is 1."""
    target = [{"kind": "base_power", "kappa": 1.0}]
    run_dir = runs.train(other, tmp_path, base=str(tiny_model), target=target, trainer={"samples_per_context": 64})
    last = runs.rows(run_dir / "evaluation.jsonl")[-1]["metrics"]
    assert last["divergence/reverse_kl"]["value"] > 0.1
    assert f"base: {tiny_model}, φ: base^(1.0 − 1)" in (run_dir / "report.html").read_text()
