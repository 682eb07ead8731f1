"""Samples with vLLM servers on other GPUs or machines, over their HTTP API; any of several replicas may die."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch

from ..contexts import Context
from ..errors import RunError, UserError
from ..models.language_model import LanguageModel
from ..rollouts import Completion, Rollouts, pack
from .vllm_replica import NO_WEIGHTS, Replica, ReplicaError, weights_folder

log = logging.getLogger(__name__)

SAMPLES_PER_REQUEST = 16  # few enough that the samples of a single context spread over the replicas
REQUESTS_PER_REPLICA = 64  # in flight: about the thousand sequences that a server decodes side by side
HEALTH_EVERY = 5.0  # seconds; with the 15 that an answer may take, a server that hangs is noticed within 20
BACK_OFF = (0.5, 2.0)  # seconds before the same server is asked again
GENERATE = "/inference/v1/generate"


class VLLMServerEngine:
    """Samples at temperature 1 from the full distribution on one or more vLLM servers (0.32 or newer).

    They are started by hand, each with `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out`. A server that
    dies or hangs is left out, its share of the round goes to the others, and it may return with the next sync.

    Args:
        urls: of the servers, such as "http://gpu-box:8000".
        eos_token_ids: tokens that end a completion.
        max_new_tokens: completions are cut off there.
        weight_transfer: how new weights reach the servers. "nccl": from GPU to GPU, also between machines (servers
            need `--weight-transfer-config '{"backend": "nccl"}'`; `VLLM_HOST_IP` says which address of this machine
            they can reach). "ipc": on one and the same GPU, through CUDA IPC (`'{"backend": "ipc"}'`,
            `VLLM_ALLOW_INSECURE_SERIALIZATION=1`, and `--enable-sleep-mode` to give memory back during the update).
            "disk": through a folder, for servers without GPU or out of NCCL's reach.
        weights_dir: of "disk": a folder that servers and trainer see under the same path.
        request_timeout: seconds that one request, or sending all weights to one server, may take.

    Attributes:
        version: of the weights that it samples with; -1 before the first sync.

    Raises:
        UserError: the arguments do not fit together.
    """

    def __init__(
        self,
        urls: Sequence[str],
        eos_token_ids: Sequence[int],
        *,
        max_new_tokens: int,
        weight_transfer: Literal["nccl", "ipc", "disk"] = "nccl",
        weights_dir: Path | None = None,
        request_timeout: float = 600.0,
    ):
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise UserError(f"engine.urls: {list(urls)} are no addresses of servers; write [http://HOST:PORT, …]")
        if (weight_transfer == "disk") != (weights_dir is not None):
            raise UserError("engine.weights_dir: belongs to engine.weight_transfer: disk, which needs it")
        if weight_transfer != "disk" and importlib.util.find_spec("vllm") is None:
            raise UserError(
                f"engine.weight_transfer: {weight_transfer!r} needs vLLM on this side too: pip install vllm"
            )
        self.replicas = [Replica(url, request_timeout) for url in dict.fromkeys(url.rstrip("/") for url in urls)]
        self.eos_token_ids, self.max_new_tokens = sorted(eos_token_ids), max_new_tokens
        self.weight_transfer, self.weights_dir = weight_transfer, weights_dir
        self.version = -1
        self._run, self._label = uuid.uuid4().hex[:8], ""
        self._lock = threading.Lock()

    def sample(self, contexts: Sequence[Context], samples_per_context: int, seed: int) -> Rollouts:
        """As `Engine.sample`; completions depend on weights, seed and position of their context, on no server."""
        if self.version < 0:
            raise RunError("the vLLM servers hold no weights to sample with: sync_weights comes first")
        firsts = range(0, samples_per_context, SAMPLES_PER_REQUEST)
        bodies = [
            self._body(context, min(SAMPLES_PER_REQUEST, samples_per_context - first), f"{seed}/{position}/{first}")
            for position, context in enumerate(contexts)
            for first in firsts
        ]
        live, done = self._live(), threading.Event()
        for replica in live:
            threading.Thread(target=self._watch, args=(replica, done), daemon=True).start()
        pool = ThreadPoolExecutor(REQUESTS_PER_REPLICA * len(live))
        try:
            parts = list(pool.map(lambda body: self._complete(body, done), bodies))
        finally:
            done.set()
            for replica in live:
                replica.hang_up()
            pool.shutdown(cancel_futures=True)
        per_context = [parts[i : i + len(firsts)] for i in range(0, len(parts), len(firsts))]
        return pack(contexts, [[completion for part in group for completion in part] for group in per_context])

    def sync_weights(self, policy: LanguageModel, version: int) -> None:
        """Give every server that can be reached the policy's weights, also those that sleep or were left out.

        Raises:
            RunError: none of them took the weights.
            UserError: the policy is not on a GPU, which "nccl" and "ipc" need.
        """
        kind, turn = self.weight_transfer, threading.Lock()
        label = f"{self._run}-{version}"  # a server that another run trains with must not pass for ours
        if kind != "disk":
            if policy.device.type != "cuda":
                raise UserError(f"engine.weight_transfer: {kind!r} needs the model on a GPU; use disk")
            torch.cuda.current_stream(policy.device).synchronize()  # the update was queued on this thread's stream

        def update(replica: Replica) -> str | None:
            try:
                replica.update(policy, label, kind, folder, turn)
            except ReplicaError as error:
                return str(error)
            return None

        with contextlib.ExitStack() as stack:
            folder = self.weights_dir and stack.enter_context(weights_folder(policy, self.weights_dir, label))
            reasons = list(stack.enter_context(ThreadPoolExecutor(len(self.replicas))).map(update, self.replicas))
        for replica, reason in zip(self.replicas, reasons, strict=True):
            if reason is None and replica.lost not in (None, NO_WEIGHTS):
                log.info("%s has the weights of version %d and takes part again", replica.url, version)
            elif reason is not None and reason != replica.lost:
                log.warning("%s is left out: %s", replica.url, reason)
            replica.lost = reason
        self._live()
        self.version, self._label = version, label

    def sleep(self) -> None:
        """On a shared GPU: drop cache and weights; until the next sync there is nothing to sample with."""
        if self.weight_transfer == "ipc":
            self.version = -1
            for replica in self._live():
                try:
                    replica.ask("POST", "/sleep?level=2&mode=abort")
                except ReplicaError as error:
                    self._leave_out(replica, error)

    def close(self) -> None:
        """Let go of what this side holds; the servers go on running."""
        for replica in self.replicas:
            replica.close()

    def _live(self) -> list[Replica]:
        live = [replica for replica in self.replicas if replica.lost is None]
        if not live:
            reasons = "; ".join(f"{replica.url}: {replica.lost}" for replica in self.replicas)
            raise RunError(
                f"no vLLM server is left to sample with ({reasons}). See what their logs say, start them again with "
                "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out, and continue with --resume"
            )
        return live

    def _leave_out(self, replica: Replica, error: ReplicaError) -> None:
        with self._lock:
            first, replica.lost = replica.lost is None, replica.lost or str(error)
        replica.hang_up()
        if first:
            log.warning("%s is left out until the next sync: %s", replica.url, error)

    def _body(self, context: Context, count: int, place: str) -> dict[str, Any]:
        sampling_params = {
            "n": count,
            # 62 bits: vLLM gives sample i of the request this seed plus i
            "seed": int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big") >> 2,
            "temperature": 1.0,
            "max_tokens": self.max_new_tokens,
            "logprobs": 0,  # the sampled token's alone
            "ignore_eos": True,  # the server's idea of EOS may differ from ours
            "stop_token_ids": self.eos_token_ids,
            "detokenize": False,
        }
        return {"token_ids": context.token_ids, "sampling_params": sampling_params}

    def _complete(self, body: dict[str, Any], done: threading.Event) -> list[Completion]:
        """Ask the server with the least to do, and the next one if that fails."""
        while True:
            with self._lock:
                replica = min(self._live(), key=lambda replica: replica.in_flight)
                replica.in_flight += 1
            try:
                return self._complete_on(replica, body, done)
            except ReplicaError as error:
                if done.is_set():
                    raise
                self._leave_out(replica, error)
            finally:
                with self._lock:
                    replica.in_flight -= 1

    def _complete_on(self, replica: Replica, body: dict[str, Any], done: threading.Event) -> list[Completion]:
        for pause in BACK_OFF:
            try:
                return self._parse(replica.ask("POST", GENERATE, body))
            except ReplicaError as error:
                if not error.passing or replica.lost is not None or done.wait(pause):
                    raise
            replica.check_health()
        return self._parse(replica.ask("POST", GENERATE, body))

    def _parse(self, answer: dict[str, Any]) -> list[Completion]:
        completions: list[Completion] = []
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
            token_ids, finished = choice["token_ids"], choice["finish_reason"] == "stop"
            versions = [span["version"] for span in choice.get("weight_versions") or ()]
            if versions != [self._label]:
                raise ReplicaError(
                    f"it sampled with weights {versions} instead of {self._label!r}: it was restarted, another run "
                    "uses it too, or its vLLM is older than 0.32"
                )
            if not finished and len(token_ids) < self.max_new_tokens:
                raise ReplicaError(
                    f"it cut a completion at {len(token_ids)} tokens ({choice['finish_reason']}) instead of "
                    f"{self.max_new_tokens}; does its --max-model-len hold prompt and completion?"
                )
            logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            completions.append((token_ids, logprobs, finished))
        return completions

    def _watch(self, replica: Replica, done: threading.Event) -> None:
        """A request says nothing until it is finished, so ask beside it whether the server is still there."""
        while not done.wait(HEALTH_EVERY):
            try:
                replica.check_health()
            except ReplicaError as error:
                if not done.is_set():
                    self._leave_out(replica, error)
