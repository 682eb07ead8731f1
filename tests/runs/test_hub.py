"""A checkpoint pushed to the hub, of which there is a stand-in here: its files, its card, and refusals in one line."""

import httpx
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from fdpg_fast.runs import hub
from fdpg_fast.runs.best import best_checkpoint
from fdpg_fast.runs.checkpoint import latest_checkpoint
from fdpg_fast.runs.finished import read_finished
from support import runs

WATCHED = {"evaluation": {"every": 1}, "checkpoint": {"best": "max kl_to_base"}, "trainer": {"rounds": 4}}


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A run, and one with LoRA."""
    folder = tmp_path_factory.mktemp("trained")
    return [runs.train(tiny_model, folder, name, **(WATCHED | lora)) for name, lora in KINDS.items()]


KINDS = {"whole": {}, "adapter": {"lora": {"rank": 2}, "engine": {"max_new_tokens": 4}}}


class Hub:
    """What is asked of `HfApi`, or an error for it to raise."""

    endpoint = "https://huggingface.co"

    def __init__(self, creates: Exception | None = None, commits: Exception | None = None):
        self.creates, self.commits = creates, commits
        self.asked: list[dict] = []

    def create_repo(self, repo_id, **settings):
        if self.creates:
            raise self.creates
        self.asked.append({"repo": repo_id} | settings)
        return type("Url", (), {"repo_id": f"me/{repo_id}" if "/" not in repo_id else repo_id})

    def create_commit(self, repo_id, operations, commit_message):
        if self.commits:
            raise self.commits
        contents = {x.path_in_repo: x for x in operations}
        self.asked.append({"repo": repo_id, "message": commit_message, "files": contents})


def answered(status: int) -> HfHubHTTPError:
    response = httpx.Response(status, request=httpx.Request("POST", "https://huggingface.co/api"))
    return HfHubHTTPError(f"{status}\nfrom the hub", response=response)


def test_a_checkpoint_is_pushed_in_one_commit_with_its_card(trained, monkeypatch, capsys):
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    for run_dir, weights in zip(trained, ("model.safetensors", "adapter_model.safetensors"), strict=True):
        there = Hub()
        assert runs.call("push", run_dir, "mine", "--private") == 0
        assert capsys.readouterr().out == "https://huggingface.co/me/mine\n"
        made, commit = there.asked
        assert made == {"repo": "mine", "private": True, "exist_ok": False}
        assert commit["repo"] == "me/mine" and commit["message"].startswith("round-000004 of ")
        names = set(commit["files"])
        assert {"README.md", weights, "tokenizer.json"} <= names
        assert not [name for name in names if name.startswith("trainer") or name == "SHA256SUMS"]
        assert all(x.upload_info.size > 0 for x in commit["files"].values())
    there = Hub()
    assert runs.call("push", run_dir, "us/mine", "--update", "--checkpoint", "best") == 0
    best = best_checkpoint(read_finished(run_dir)).name
    assert there.asked[0]["exist_ok"] and there.asked[1]["message"].startswith(f"{best} of ")


def test_the_card_says_what_was_done(trained, tmp_path, capsys):
    for run_dir in trained:
        assert runs.call("push", run_dir, "me/mine", "--output", tmp_path) == 0
        assert capsys.readouterr().out == f"written to {tmp_path / 'README.md'}\n"
        card = ModelCard.load(tmp_path / "README.md")
        lora = run_dir.name == "adapter"
        assert card.data.library_name == ("peft" if lora else "transformers") and card.data.license is None
        assert card.data.base_model is None and card.data.pipeline_tag == "text-generation"
        assert ("AutoPeftModelForCausalLM" in card.text) == lora
        assert 'from_pretrained("me/mine")' in card.text and "vllm serve" in card.text
        assert "with φ: letters." in card.text and "4 rounds of up to 2 prompts × 4 completions" in card.text
        last = runs.rows(run_dir / "evaluation.jsonl")[-1]["metrics"]["feature/letters"]["value"]
        (row,) = [line for line in card.text.splitlines() if line.startswith("| E[letters] |")]
        assert row.split("|")[3].split()[0] == f"{last:.2f}" and row.count("±") >= 2
        tables = [line.count("|") for line in card.text.splitlines() if line.startswith("|")]
        assert len(set(tables)) == 1 and "Jensen–Shannon (trained)" in card.text
        assert str(run_dir.parent) not in card.content  # others need not know the folders of this machine


def test_names_of_the_hub_go_into_the_metadata(trained):
    config = read_finished(trained[1])
    contexts = config.contexts.model_copy(update={"train": "openai/gsm8k/main:train[:500]"})
    config = config.model_copy(update={"model": "owner/base", "contexts": contexts})
    card = ModelCard(hub.make_card(config, latest_checkpoint(config.run_dir), "me/mine"))
    assert (card.data.base_model, card.data.datasets) == ("owner/base", ["openai/gsm8k"])
    assert "vllm serve owner/base --enable-lora --lora-modules tuned=me/mine" in card.text
    assert "[openai/gsm8k/main:train[:500]](https://huggingface.co/datasets/openai/gsm8k)" in card.text


REFUSED = {
    "no token": (Hub(answered(401)), "mine", 2, "hf auth login"),
    "no permission": (Hub(answered(403)), "us/mine", 2, "your token may not write there"),
    "exists": (Hub(answered(409)), "us/mine", 2, "it exists; --update adds a commit"),
    "the hub fails": (Hub(answered(500)), "us/mine", 1, "500 from the hub"),
    "amid the upload": (Hub(commits=answered(500)), "us/mine", 1, "push again with --update"),
    "offline": (Hub(OfflineModeIsEnabled("no")), "us/mine", 2, "HF_HUB_OFFLINE is set"),
    "no network": (Hub(httpx.ConnectError("no route")), "us/mine", 1, "the hub cannot be reached: no route"),
    "no name": (Hub(), "us/mine/too", 2, "'us/mine/too' cannot be the name of a repository"),
}


@pytest.mark.parametrize(("there", "repo", "status", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_one_line(there, repo, status, said, trained, monkeypatch, capsys):
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    assert runs.call("push", trained[0], repo) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("fdpg-fast: push: ")


def test_a_run_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert runs.call("push", tmp_path, "mine") == 2
    assert "is not the folder of a run" in capsys.readouterr().err
