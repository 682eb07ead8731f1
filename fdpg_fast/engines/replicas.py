"""Samples with vLLM servers on other GPUs or machines: a pool of replicas, of which any may die."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from .. import ranks
from ..contexts import Context
from ..errors import RunError, UserError
from ..measure.agreement import GAP_LIMITS, Disagreement, log_ratio
from ..models.language_model import LanguageModel
from ..rollouts import Completion, Rollouts, pack
from .vllm import sampling_settings
from .vllm_answers import API_KEY, ReplicaError
from .vllm_folder import hand_over
from .vllm_replica import Kind, PassingError, Replica, kinds_of

log = logging.getLogger(__name__)

SAMPLES_PER_REQUEST = 16  # few enough that the samples of a single context spread over the replicas
REQUESTS_PER_REPLICA = 64  # in flight: about the thousand sequences that a server decodes side by side
HEALTH_EVERY = 5.0  # seconds; with the 15 that an answer may take, a server that hangs is noticed within 20
BACK_OFF = (0.5, 2.0)  # seconds before a request is tried again


class VLLMServerEngine:
    """Samples at temperature 1 from the full distribution on one or more vLLM servers (0.32 or newer).

    docs/engines.md says how they are started. One that dies, hangs or answers wrongly is left out: the others do its
    share, and it may return with the next sync. Of many processes the first one asks, for all of them.

    Args:
        urls: of the servers, such as "http://gpu-box:8000".
        eos_token_ids: tokens that end a completion.
        max_new_tokens: completions are cut off there.
        weight_transfer: how new weights get there: "nccl" from GPU to GPU, "ipc" on the same GPU, "disk" by a folder.
        weights_dir: of "disk": a folder that servers and trainer see under the same path.
        request_timeout: seconds that one request, or sending all weights to one server, may take.
        gap_limit: mean |log q − log π| a token, in nats, above which a server does not have the policy's weights.

    Attributes:
        version: of the weights that it samples with; -1 before the first sync.
        lost: servers that take no part until a sync reaches them, by address, and why.

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
        gap_limit: float = GAP_LIMITS["bfloat16"][1],
    ):
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise UserError(f"engine.urls: {list(urls)} are no addresses of servers; write [http://HOST:PORT, …]")
        if (weight_transfer == "disk") != (weights_dir is not None):
            raise UserError("engine.weights_dir: belongs to engine.weight_transfer: disk, which needs it")
        if weight_transfer != "disk" and importlib.util.find_spec("vllm") is None:
            raise UserError(f"engine.weight_transfer: {weight_transfer} needs vLLM on this side too: pip install vllm")
        if not (key := os.environ.get(API_KEY, "")).isascii() or not key.isprintable():
            raise UserError(f"{API_KEY}: a key of printable ASCII characters is wanted in this environment variable")
        addresses = dict.fromkeys(url.rstrip("/") for url in urls)
        self.replicas = [Replica(address, request_timeout, weight_transfer) for address in addresses]
        self.weight_transfer, self.weights_dir = weight_transfer, weights_dir
        self.version, self._gap_limit = -1, gap_limit
        self.lost: dict[str, str] = {}
        self._complaints: dict[str, str] = {}  # what was said last of each server since it took part
        self._in_flight: Counter[str] = Counter()
        self._drawn_by: list[Replica] = []  # each completion of the latest sample; the first process knows
        self._kinds: list[Kind] = []  # of the weights, without those that are tied
        self._sampling = sampling_settings(eos_token_ids, max_new_tokens)
        self._run = uuid.uuid4().hex[:8]
        self._lock = threading.RLock()

    def sample(self, contexts: Sequence[Context], samples_per_context: int, seed: int) -> Rollouts:
        """As `Engine.sample`; completions depend on weights, seed and position of their context, on no server."""
        if self.version < 0:
            raise RunError("the vLLM servers hold no weights to sample with: sync_weights comes first")
        return self._at_first(self._sample, contexts, samples_per_context, seed)

    def _sample(self, contexts: Sequence[Context], samples_per_context: int, seed: int) -> Rollouts:
        firsts = range(0, samples_per_context, SAMPLES_PER_REQUEST)
        live = self._live()
        pool = ThreadPoolExecutor(REQUESTS_PER_REPLICA * len(live))
        try:
            futures = [
                pool.submit(self._complete, context.token_ids, samples_per_context - first, f"{seed}/{i}/{first}")
                for i, context in enumerate(contexts)
                for first in firsts
            ]
            while wait(futures, HEALTH_EVERY).not_done:  # a request says nothing until it is finished
                self._ask_all(self._live(), Replica.check_health)
            answers = [future.result() for future in futures]
        except BaseException:
            for replica in live:
                self._leave_out(replica, ReplicaError("a round was broken off"))
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        self._drawn_by = [replica for replica, completions in answers for _ in completions]
        requests = (completions for _, completions in answers)
        return pack(contexts, [[*chain.from_iterable(next(requests) for _ in firsts)] for _ in contexts])

    def leave_out(self, rows: Sequence[int], reason: str) -> None:
        """Whoever drew these completions of the latest sample takes no part until the next sync."""
        for replica in {self._drawn_by[row] for row in rows if ranks.is_first()}:
            self._leave_out(replica, ReplicaError(reason))

    def sync_weights(self, policy: LanguageModel, version: int) -> None:
        """Give every server that can be reached the policy's weights, also those that sleep or were left out.

        Raises:
            RunError: none of them took the weights.
            UserError: the policy is not on a GPU, which "nccl" and "ipc" need.
        """
        label = f"{self._run}-{version}"  # a server that another run trains with must not pass for ours
        if self.weights_dir is None:
            if policy.device.type != "cuda":
                raise UserError(f"engine.weight_transfer: {self.weight_transfer} needs the model on a GPU; use disk")
            torch.cuda.current_stream(policy.device).synchronize()  # the update was queued on this thread's stream
        self.version, self.lost = -1, {}  # a sync that is broken off leaves servers with different weights
        self._at_first(self._ask_all, self.replicas, Replica.expect_weights)
        ready = self._live()
        if self.weights_dir is None:
            self._kinds = self._kinds or kinds_of(policy)
            for replica in ready:  # one after another: this GPU sends
                send = partial(Replica.send_weights, kinds=self._kinds, index=policy.device.index)
                ranks.for_first(policy.weights(repeat_tied=False), partial(self._ask_all, [replica], send))
        else:
            hand_over(policy, ready, partial(self._at_first, self._ask_all), self.weights_dir, label)
        self._at_first(lambda: self._ask_all(self._live(), Replica.use_weights, label, len(policy.head.weight)))
        self._probe(policy)
        for replica in self._live():
            if self._complaints.pop(replica.url, None):
                log.info("%s has the weights of version %d and takes part again", replica.url, version)
        self.version = version

    def sleep(self) -> None:
        """On a shared GPU: drop cache and weights; until the next sync there is nothing to sample with."""
        if self.weight_transfer == "ipc":
            self.version = -1
            self._ask_all(self._live(), Replica.sleep)

    def close(self) -> None:
        """Let go of what this side holds; the servers go on running."""
        for replica in self.replicas:
            replica.close()

    def _probe(self, policy: LanguageModel) -> None:
        """Leave out every server whose log-probs of a few tokens are not the policy's."""
        prompt = Context(0, "", (self._sampling["stop_token_ids"][0],))  # a single token: it fits into any server
        few = self._sampling | {"n": 8, "max_tokens": min(8, self._sampling["max_tokens"]), "seed": 0}
        drawn: dict[str, list[Completion]] = {}

        def ask(replica: Replica) -> None:
            drawn[replica.url] = replica.complete(prompt.token_ids, few)

        def ask_all() -> dict[str, list[Completion]]:
            self._ask_all(self._live(), ask)
            return drawn

        drawn = self._at_first(ask_all)
        for replica in (replica for replica in self.replicas if replica.url in drawn):
            rollouts = pack([prompt], [drawn[replica.url]])
            gap = float(log_ratio(rollouts, policy, rollouts.num_tokens).abs().mean())
            if not gap <= self._gap_limit:
                self._leave_out(replica, ReplicaError(str(Disagreement([], gap, self._gap_limit))))

    def _at_first(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What it gives in the first process, for all; and whom that has lost."""
        found, self.lost = ranks.by_first(lambda: (function(*arguments), self.lost))
        return found

    def _live(self) -> list[Replica]:
        if not (live := [replica for replica in self.replicas if replica.url not in self.lost]):
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self.lost.items())
            raise RunError(
                f"no vLLM server is left to sample with ({reasons}). See what their logs say; start them again with "
                "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out"
            )
        return live

    def _ask_all(self, replicas: Sequence[Replica], call: Callable[..., None], *arguments: Any) -> None:
        """Call a method of theirs, of all at once; those that raise are left out."""

        def attempt(replica: Replica) -> None:
            try:
                call(replica, *arguments)
            except ReplicaError as error:
                self._leave_out(replica, error)

        with ThreadPoolExecutor(len(replicas)) as pool:
            try:
                list(pool.map(attempt, replicas))
            except BaseException:  # a signal: a server that hangs must not hold up the end
                for replica in replicas:
                    replica.hang_up()
                raise

    def _leave_out(self, replica: Replica, error: ReplicaError) -> None:
        with self._lock:
            if replica.url not in self.lost:
                reason = self.lost[replica.url] = str(error)
                if reason != self._complaints.get(replica.url):
                    log.warning("%s is left out until the next sync: %s", replica.url, reason)
                self._complaints[replica.url] = reason
        replica.hang_up()

    def _complete(self, token_ids: tuple[int, ...], wanted: int, place: str) -> tuple[Replica, list[Completion]]:
        """Up to SAMPLES_PER_REQUEST of the wanted completions, and who gave them: the server with the least to do.

        One that cannot is left out.
        """
        # 62 bits: vLLM gives sample i of the request this seed plus i
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big") >> 2
        asked, pauses = self._sampling | {"n": min(SAMPLES_PER_REQUEST, wanted), "seed": seed}, iter(BACK_OFF)
        while True:
            with self._lock:
                replica = min(self._live(), key=lambda replica: self._in_flight[replica.url])
                self._in_flight[replica.url] += 1
            try:
                return replica, replica.complete(token_ids, asked)
            except ReplicaError as error:
                if isinstance(error, PassingError) and (pause := next(pauses, None)) is not None:
                    time.sleep(pause)
                else:
                    self._leave_out(replica, error)
                    pauses = iter(BACK_OFF)
            finally:
                with self._lock:
                    self._in_flight[replica.url] -= 1
