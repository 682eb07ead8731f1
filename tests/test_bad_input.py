"""Bad input: exit status 2 and one line that says what to do; nothing is left on the disk."""

import fcntl
import re
import shutil
import sys
from pathlib import Path

import pytest

from support import runs

WORD = "{kind: pointwise, feature: {kind: word, word: tea}}"
# a .jsonl or .txt file for each bad set of contexts
CONTEXTS = {
    "empty.txt": "\n \n",
    "blank.jsonl": '{"prompt": "fine"}\n{"prompt": " "}\n',
    "long.txt": "fine\n" + 91 * "x" + "\n",  # the model has 96 positions, 6 of them for the completion
    "broken.jsonl": '{"prompt": "fine"}\n{"prompt": \n',
    "deep.jsonl": '{"prompt": "fine"}\n{"prompt": "a", "x": ' + 100_000 * "[",
    "half.jsonl": '{"prompt": "\\ud800"}\n',
    "ended.txt": "fine\nfine<|end|>\n",
    "table.tsv": "prompt\tanswer\nfine\t1\n",
    "list.json": '{"prompt": "fine"}',
    "table.csv": 'prompt,answer\n"open,1\n',
    "other.jsonl": '{"text": "no prompt"}\n',
    "chat.jsonl": '{"prompt": [{"role": "user", "content": "hello"}]}\n',
    "latin.txt": b"caf\xe9\n",
}
FEATURES = """
def ones(completions):
    return [1.0] * len(completions)
"""

# override → what the line must say, as a regular expression
OVERRIDES = {
    "--modle=x": "^modle: there is no such key; did you mean model",
    "--trainer.round=3": "^trainer.round: there is no such key; did you mean trainer.rounds",
    "--target.0.feature.patern=x": "^target.0.feature.patern: there is no such key; did you mean .*pattern",
    "--target.0.feature={kind: word, wrod: x}": "^target.0.feature.wrod: there is no such key; did you mean .*word",
    "--trainer.rounds=many": "^trainer.rounds: 'many': .*integer",
    "--trainer.rounds=0": "^trainer.rounds: '?0'?: .*greater than or equal to 1",
    "--optimizer.learning_rate=inf": "^optimizer.learning_rate: 'inf': .*finite",
    "--tracking=[tensorboard, paper]": "^tracking.1: 'paper': .*'wandb'",
    "--trainer=5": "^trainer: '?5'?: ",
    "--target=[]": "^target: .*at least 1",
    "--target.0={kind: pointwise}": "^target.0.feature: this key is required",
    "--target.0.feature={word: tea}": "^target.0.feature(.kind)?: .*'word', 'regex'",
    "--target.0.feature.kind=wrod": "^target.0.feature: .*'wrod'.*'word', 'regex'",
    "--target.0={kind: rlhf, beta: 0, feature: {kind: word, word: x}}": "^target.0.beta: 0: .*greater than 0",
    "--divergence=kl": "^divergence: .*'kl'.*forward_kl, reverse_kl, total_variation",
    "--divergence=alpha:2": r"^divergence: .*alpha:2 is outside \(0, 1\)",
    "--divergence=reverse_kl": r"^divergence: .*exp\(.*alpha:",  # both remedies
    "--trainer.samples_per_context=1": "leave_one_out needs trainer.samples_per_context ≥ 2; use running or none",
    "--engine.temperature=0.7": "^engine.temperature: .*log q",
    "--top_p=0.9": "^top_p: .*log q",
    "--engine.max_new_tokens=96": "^engine.max_new_tokens: 96 leaves no room .*96 positions",
    "--contexts.train=absent.txt": "^contexts: cannot read 'absent.txt': No such file",
    "--contexts.eval=absent.txt": "^contexts: cannot read 'absent.txt': No such file",
    "--contexts.train=empty.txt": "^contexts: 'empty.txt' holds no prompt; write one a line",
    "--contexts.train=blank.jsonl": "^contexts: blank.jsonl:2 is an empty prompt",
    "--contexts.train=long.txt": "^contexts: long.txt:2 has 91 tokens but the model has room for 90 .*shorten",
    "--contexts.train=broken.jsonl": "^contexts: broken.jsonl:2 is not JSON",
    "--contexts.train=other.jsonl": '^contexts: other.jsonl:1 needs an object with "prompt"',
    "--contexts.train=chat.jsonl": "^contexts: chat.jsonl:1 .*no chat template",
    "--contexts.train=deep.jsonl": "^contexts: deep.jsonl:2 is not JSON: .*recursion",
    "--contexts.train=half.jsonl": "^contexts: half.jsonl:1 is no text: ",
    "--contexts.train=ended.txt": "^contexts: ended.txt:2 ends with EOS, '<.end.>'",
    "--contexts.train=table.tsv": "^contexts: 'table.tsv' is of no known kind; these are known: .jsonl, .ndjson",
    "--contexts.train=list.json": "^contexts: list.json must hold one list of objects",
    "--contexts.train=table.csv": "^contexts: table.csv:2 is not CSV: unexpected end of data",
    "--contexts.system_prompt=hi": "^contexts.train is left out, but contexts.system_prompt reaches chat messages only",
    "--contexts.tools=[{name: add}]": "^contexts.train is left out, but contexts.tools reaches chat messages only",
    "--trainer.seed=4294967296": "^trainer.seed: '?4294967296'?: .*less than 4294967296",
    "--run_dir=~nobody-here/run": "^run_dir: '~nobody-here/run': no file can have this name",
    "--engine.request_timeout=1e10": "^engine.request_timeout: .*less than or equal to",
    "--engine.weights_dir=w": "^engine.weights_dir: w has an effect only with engine.weight_transfer: disk",
    "--proposal.every=3": "^proposal.every: 3 has an effect only with proposal.kind: adaptive; leave it out",
    "--target.0.feature={kind: regex, pattern: 'a{99999999999}'}": "^feature regex: 'a{9+}' is not a regular expr",
    "--contexts.train=latin.txt": "^contexts: cannot read 'latin.txt': it is not UTF-8",
    "--target.0.feature={kind: regex, pattern: '('}": "^feature regex: '\\(' is not a regular expression",
    "--target.0.feature={kind: import, path: features.ones}": "^import path 'features.ones': write .*module:name",
    "--target.0.feature={kind: import, path: 'nowhere:ones'}": "^import path 'nowhere:ones': .*No module named",
    "--target.0.feature={kind: import, path: 'features.py:twos'}": "^import path 'features.py:twos': .*'twos'",
    "--target.0.feature={kind: import, path: 'absent.py:ones'}": "^import path 'absent.py:ones': .*No such file",
    "--target.0.feature={kind: import, path: 'raises.py:ones'}": "^import path 'raises.py:ones': .*ZeroDivisionError",
    "--target.0={kind: import, path: 'features.py:ones'}": "^target: 'features.py:ones' .*",
    "--target.0.feature={kind: classifier, model: ./absent, label: x}": "^feature classifier: .* no folder './absent'",
    f"--target=[{WORD}, {WORD}]": "^target: two features are called 'word:tea'; give one of them another name",
    "--target.0.feature.name=ess": "^target: .*'ess'",  # target/ess is a metric of its own
    "--target=[{kind: distributional, features: [{kind: word, word: a}], moments: [0.5, 0.5]}]": (
        "^target: 1 features but 2 moments; give one moment a feature"
    ),
    "--target=[{kind: distributional, features: [{kind: import, path: 'features.py:ones'}], moments: [0.5]}]": (
        "^target: feature 'ones' lies in .* on 2048 samples.* mean 0.5; raise target_fit_samples"
    ),
    "--device=cuda:99": "^device: 'cuda:99' is not usable here",
    "--device=abacus": "^device: 'abacus' is not usable here",
    "--tracking=[wandb]": r'^tracking: wandb is not installed; pip install "fdpg-fast\[tracking\]"',
    "--model=./absent": "^model: .*there is no folder './absent' here",
    "--model=bare": "^model: .*'bare' holds no .safetensors file",
    "--model=hollow": "^model: .*'hollow'",
    "--run_dir=features.py": "^run_dir: cannot write to 'features.py': ",
    "--run_dir=features.py/inside": "^run_dir: cannot write to 'features.py/inside': Not a directory",
    "--run_dir=taken": "^run_dir: 'taken' already holds a run; continue it with --resume taken, or choose another",
    "--run_dir=busy": "^run_dir: 'busy' is in use by another process; choose another folder",
    "--trainer.rounds": "^--trainer.rounds: a value is missing; write --trainer.rounds=VALUE",
    "trainer.rounds=5": "trainer.rounds=5.* --help",
    "--dry-run=yes": "--dry-run",
}


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch):
    """A working directory with a config that is right, and everything wrong that the cases point to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not installed
    for name, text in CONTEXTS.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "features.py").write_text(FEATURES)
    (tmp_path / "raises.py").write_text("1 / 0\n")
    shutil.copytree(tiny_model, "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    Path("hollow").mkdir()
    for name in ("taken", "busy"):
        Path(name).mkdir()
    runs.write_config(tmp_path / "taken", runs.settings(tiny_model, "taken"))
    runs.write_config(tmp_path, runs.settings(tiny_model, "run"))
    with open("busy/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


@pytest.mark.parametrize("override", OVERRIDES)
def test_train_refuses(override, folder, capfd):
    before = runs.contents(folder)
    assert runs.call("train", "config.yaml", override) == 2
    assert re.search(OVERRIDES[override], the_line(capfd))
    assert runs.contents(folder) == before


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "^config: cannot read 'given.yaml': No such file"),
        ("", "^config: 'given.yaml' must hold keys and values"),
        ("- model\n", "^config: 'given.yaml' must hold keys and values"),
        ("model: [\n", "^config: 'given.yaml' is not YAML: .*line"),
        ("model: m\n", "^run_dir: this key is required"),
        ("run_dir: r\nmodel: m\n", "^target: this key is required"),
        ("run_dir: r\nmodel: m\ntarget: [{kind: import, path: a.py:b}]\n1: 2\n", "^1: "),
        (b"model: caf\xe9\n", "^config: cannot read 'given.yaml': "),
    ],
)
def test_train_refuses_the_file(text, complaint, folder, capfd):
    if text is not None:
        Path("given.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = runs.contents(folder)
    assert runs.call("train", "given.yaml") == 2
    assert re.search(complaint, the_line(capfd))
    assert runs.contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "COMMAND|train, evaluate"),
        ("trian config.yaml", "'trian'"),
        ("train", "^train: give a CONFIG.yaml, or --resume RUN"),
        ("train --resume", "--resume"),
        ("train --resume nowhere", "^'nowhere' is not the folder of a run: it has no config.yaml"),
        ("train config.yaml --resume taken", "^train: --resume takes the run's own config; leave CONFIG.yaml out"),
        ("train --resume taken --optimizer.learning_rate=1", "^--optimizer.learning_rate: .*only trainer.rounds"),
        ("train --resume taken --trainer.rounds 0", "^trainer.rounds: '?0'?: .*greater than or equal to 1"),
        ("evaluate nowhere", "^'nowhere' is not the folder of a run"),
        ("evaluate a/checkpoints/round-000002", "config.yaml; give its run, 'a': the newest is taken$"),
        (f"evaluate {256 * 'x'}", "^'x{256}' is not the folder of a run"),
        (f"train --resume {256 * 'x'}", "^'x{256}' is not the folder of a run"),
        ("compare a\0b taken", r"^'a\\x00b' is not the folder of a run"),
        ("evaluate taken", "^'taken' has no checkpoint yet; train it first: fdpg-fast train --resume taken"),
        ("evaluate taken --samples 0", "--samples: '0' is not a positive whole number"),
        ("evaluate taken --bogus", "--bogus"),
        ("evaluate", "RUN"),
        ("sample nowhere", "^'nowhere' is not the folder of a run"),
        ("sample taken --count 3", "^'taken' has no checkpoint yet"),
        ("sample taken --count=-1", "--count: '-1' is not a positive whole number"),
        ("compare nowhere taken", "^'nowhere' is not the folder of a run"),
    ],
)
def test_command_refuses(arguments, complaint, folder, capfd):
    before = runs.contents(folder)
    assert runs.call(*arguments.split()) == 2
    assert re.search(complaint, the_line(capfd))
    assert runs.contents(folder) == before


def test_resume_of_a_run_in_use_is_refused(folder, capfd):
    with open("taken/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runs.call("train", "--resume", "taken") == 2
    assert re.search("^run_dir: 'taken' is in use by another process", the_line(capfd))
    assert sorted(path.name for path in Path("taken").iterdir()) == [".lock", "config.yaml"]


@pytest.mark.parametrize(
    "override", ["--modle=x", "--model=bare", "--contexts.train=long.txt", "--divergence=neyman_chi2"]
)
def test_nothing_else_is_printed_in_a_process_of_its_own(override, folder):
    ended = runs.run(folder, "train", "config.yaml", override)
    assert ended.status == 2 and ended.stdout == ""
    assert ended.stderr.startswith("fdpg-fast: ") and ended.stderr.count("\n") == 1


def test_a_damaged_line_of_a_run_is_bad_input_that_a_resumed_run_finds_before_its_first_round(tiny_model, tmp_path):
    metrics = runs.train(tiny_model, tmp_path) / "metrics.jsonl"
    metrics.write_text("{]\n" + metrics.read_text())
    before = runs.contents(tmp_path)
    assert runs.call("train", "--resume", metrics.parent, "--trainer.rounds=3") == 2
    assert runs.contents(tmp_path) == before


def the_line(capfd: pytest.CaptureFixture) -> str:
    """All that was printed: one line on stderr, shown without the name of the program."""
    output, errors = capfd.readouterr()
    assert output == "" and errors.count("\n") == 1 and errors.endswith("\n"), output + errors
    assert errors.startswith("fdpg-fast: ")
    return errors.removeprefix("fdpg-fast: ")


# the bodies of a feature from its fourth call on, in the third round, and what is said of it
FAILURES = {
    "raise KeyError('tea')": "feature 'tea' raised KeyError: 'tea'",
    "sys.exit(0)": "feature 'tea' raised SystemExit",
    "return [float('nan')] * 4": "feature 'tea' returned nan for '",
    "return [float('inf')] * 4": "feature 'tea' returned inf for '",
    "return [1.0]": "feature 'tea' returned 1 values for 4 completions",
    "return None": "feature 'tea' returned NoneType, not one number a completion",
    "return ['much'] * 4": "feature 'tea' returned 'much' for '",
    "return [-1] * 4": "feature 'tea' returned -1; a pointwise target needs values ≥ 0",
    "time.sleep(60)": "feature 'tea' did not return within its timeout of 0.3 s for 4 completions; raise the",
    "re.match('(x+)+y', 50 * 'x')": "feature 'tea' did not return within its timeout of 0.3 s",
}
TEA = """
import re, sys, time
calls = 0
def tea(completions):
    global calls
    calls += 1
    if calls > 4:
        {failure}
    return [float("a" <= text[:1].lower() <= "t") for text in completions]
"""


def tea_run(model: Path, folder: Path, failure: str) -> Path:
    """The config of three rounds; the first two calls of the feature are for samples of the base and its evaluation."""
    (folder / "tea.py").write_text(TEA.format(failure=failure))
    target = [runs.imported(folder / "tea.py", "tea", timeout=0.3)]
    return runs.write_config(folder, runs.settings(model, folder / "run", target=target, trainer={"rounds": 3}))


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert runs.run(folder, "train", tea_run(tiny_model, folder, "pass")).status == 0
    return runs.record(folder / "run")


@pytest.mark.parametrize("failure", FAILURES)
def test_feature_that_fails_later_leaves_a_run_that_can_go_on(failure, undisturbed, tiny_model, tmp_path):
    ended = runs.run(tmp_path, "train", tea_run(tiny_model, tmp_path, failure))
    assert ended.status == 1
    *progress, last = ended.stderr.splitlines()
    assert [line[:7] for line in progress] == ["target:", "engine:", "round 1", "round 2"]
    assert last.startswith(f"fdpg-fast: {FAILURES[failure]}")
    tea_run(tiny_model, tmp_path, "pass")
    refused = runs.run(tmp_path, "train", "--resume", "run")  # the feature is another one now: somebody has to say so
    assert refused.status == 2 and "delete run/.origin.json" in refused.stderr
    (tmp_path / "run/.origin.json").unlink()
    assert runs.run(tmp_path, "train", "--resume", "run").status == 0
    runs.assert_equal(runs.record(tmp_path / "run"), undisturbed)
