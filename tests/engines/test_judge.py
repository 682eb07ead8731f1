"""A judge that is a real vLLM server: the probability of its yes is that of the model which it serves."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdpg_fast.features import Completions
from fdpg_fast.features.judge import JudgeFeature
from support.vllm_cases import Server

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_a_vllm_server_judges(vllm_model, tmp_path, monkeypatch):
    shutil.copytree(vllm_model, tmp_path / "model")
    config = json.loads((path := tmp_path / "model/tokenizer_config.json").read_text())
    path.write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    monkeypatch.setenv("VLLM_API_KEY", "sk-of-this-test")  # of both sides
    texts = ["tea", "a b c", "d"]
    batch = Completions(texts, ["p"] * 3, [[]] * 3, [True] * 3)
    model, tokenizer = (kind.from_pretrained(vllm_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    likely = []  # chances of the 20 first tokens, as a server tells them
    for text in texts:
        with torch.no_grad():
            logits = model(tokenizer(f"p {text}?", return_tensors="pt").input_ids).logits[0, -1]
        best = logits.log_softmax(-1).topk(20)
        likely.append(dict(zip(map(tokenizer.decode, best.indices), best.values.exp().tolist(), strict=True)))
    # this model writes bytes: two of them are its yes and no
    yes, no = [
        token for token in likely[0] if token.isascii() and token.isprintable() and token == token.strip().lower()
    ][:2]
    monkeypatch.setattr("fdpg_fast.features.judge._YES", yes)
    monkeypatch.setattr("fdpg_fast.features.judge._NO", no)
    server = Server(tmp_path / "model", tmp_path / "log", max_length=96, chats=True)
    keys = {"kind": "judge", "url": f"{server.url}/v1", "model": str(tmp_path / "model"), "token_env": "VLLM_API_KEY"}
    keys |= {"template": "{prompt} {completion}?", "no_verdict": -1}
    try:
        server.wait_until_ready(240)
        found = JudgeFeature(verdict="yes_probability", **keys).build("cpu")(batch).tolist()
        said = JudgeFeature(request={"max_tokens": 4}, **keys).build("cpu")(batch)
    finally:
        server.kill()
    assert said.isfinite().all() and 0 < found[0] < 1
    for chances, value in zip(likely, found, strict=True):
        for_yes, for_no = (sum(p for token, p in chances.items() if token.strip().lower() == w) for w in (yes, no))
        assert value == pytest.approx(for_yes / (for_yes + for_no) if for_yes + for_no else -1, rel=1e-3)
