"""The dialect of one vLLM server: what it is asked over HTTP, and how the policy's weights get there."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..models.language_model import LanguageModel
from ..rollouts import Completion
from .vllm_answers import API_KEY, GENERATE, ReplicaError, completions, parse

CONNECT_SECONDS, HEALTH_SECONDS = 5.0, 15.0
LOAD_ADAPTER = "/v1/load_lora_adapter"
PACKED_BYTES = 2**28  # that NCCL sends at once; vLLM's own GiB, several times over, is too much beside a learner
Kind = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


class PassingError(ReplicaError):
    """The same may go well in a moment."""


class UnknownPathError(ReplicaError):
    """It was not started with what answers to this."""


@dataclass(eq=False)
class Replica:
    """A server under its address.

    Attributes:
        timeout: seconds that a request, or sending all weights, may take.
        weight_transfer: "nccl", "ipc" or "disk".
        label: the name of the weights that it was given last, which it attaches to every completion.
        vocabulary: how many tokens those know.
        adapter: the name of the LoRA adapter that it samples with; empty: none.
        holds_base: its weights are those of the model that adapters belong to.
        takes_adapters: it lets them be loaded while it runs.
    """

    url: str
    timeout: float
    weight_transfer: str
    label: str = ""
    vocabulary: int = 0
    adapter: str = ""
    holds_base: bool = False
    takes_adapters: bool = False
    _sockets: set[socket.socket] = field(default_factory=set)  # that wait for it
    _hung_up: bool = False
    _transfer: Any = None  # vLLM's trainer-side transfer engine: an NCCL communicator, or CUDA IPC

    def ask(self, method: str, path: str, body: Any = None, *, seconds: float | None = None, most: int = 2**20) -> Any:
        """What it answers to one HTTP request, in at most so many seconds and bytes; see `vllm_answers.parse`.

        Raises:
            ReplicaError: no answer, none in time, or another than the path promises.
        """
        parts, key = urlsplit(self.url), os.environ.get(API_KEY)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

        def exchange() -> tuple[http.client.HTTPResponse, bytes]:
            connection = kind(parts.netloc, timeout=CONNECT_SECONDS)
            connection.connect()
            waiting = connection.sock
            waiting.settimeout(seconds or self.timeout)
            self._sockets.add(waiting)
            try:
                if self._hung_up:  # while this one connected
                    raise ConnectionAbortedError("it is left out")
                connection.request(method, parts.path + path, None if body is None else json.dumps(body), headers)
                response = connection.getresponse()
                return response, response.read(most + 1)
            finally:
                self._sockets.discard(waiting)
                connection.close()

        try:  # in a thread: the time-out of a socket begins anew with every byte
            response, answer = within(seconds or self.timeout, exchange)
        except TimeoutError as error:
            raise ReplicaError(f"{path}: no answer ({error})") from None
        except Exception as error:
            raise PassingError(f"{path}: {error or type(error).__name__}") from error
        if response.status != 200:
            failure = PassingError if response.status >= 500 else ReplicaError
            failure = UnknownPathError if response.status == 404 else failure
            remedy = f"set {API_KEY} to the key that it was started with; " if response.status == 401 else ""
            raise failure(f"{path}: {remedy}status {response.status}, {answer.decode(errors='replace')}")
        if response.length or len(answer) > most:
            raise ReplicaError(f"{path}: its answer ends too early, or has more than {most:,} bytes")
        return parse(path.partition("?")[0], response.headers.get_content_type(), answer)

    def hang_up(self) -> None:
        """Make every thread that waits for this server fail at once; nothing is asked before it expects weights."""
        self._hung_up, self.holds_base = True, False  # it may come back as another
        for waiting in self._sockets.copy():
            with contextlib.suppress(OSError):
                waiting.shutdown(socket.SHUT_RDWR)

    def check_health(self) -> None:
        self.ask("GET", "/health", seconds=HEALTH_SECONDS)

    def complete(self, token_ids: tuple[int, ...], sampling: dict[str, Any]) -> list[Completion]:
        """Completions of one prompt.

        Raises:
            ReplicaError: it gives none, or some that cannot be right; see `vllm_answers.completions`.
        """
        most = 2**20 + 2**10 * sampling["n"] * sampling["max_tokens"]  # a token takes about 150 bytes
        body = {"token_ids": token_ids, "sampling_params": sampling} | ({"model": self.adapter} if self.adapter else {})
        answer = self.ask("POST", GENERATE, body, most=most)
        return completions(answer, sampling, self.label, self.vocabulary)

    def sleep(self) -> None:
        """On a GPU that is shared: drop cache and weights."""
        self.ask("POST", "/sleep?level=2&mode=abort")

    def expect_weights(self) -> None:
        """Stop sampling, and make room for the weights that come."""
        self._hung_up = False
        self.check_health()  # one that is dead costs seconds, not a time-out
        if self.weight_transfer == "ipc":
            self.ask("POST", "/wake_up?tags=weights")
        self.ask("POST", "/pause?mode=abort")  # what a broken-off round left there must not meet half of the weights

    def read_weights(self, folder: Path, is_base: bool = False) -> None:
        """Have it read them from a folder that it sees too; is_base: of the model that an adapter belongs to."""
        self.ask("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self.adapter, self.holds_base = "", is_base

    def ask_for_adapters(self) -> None:
        """Find out whether it takes some."""
        self.takes_adapters = True
        try:
            self.ask("POST", LOAD_ADAPTER, {})  # of which it only says that it is none
        except UnknownPathError:
            self.takes_adapters = False
        except PassingError:
            raise
        except ReplicaError:
            pass

    def read_adapter(self, folder: Path) -> None:
        """Have it read a LoRA adapter from a folder, and sample with it instead of the one before."""
        # of one that replaces another under the same name vLLM 0.32 reads the folder again for every request
        if self.adapter:
            self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": self.adapter})
        self.ask("POST", LOAD_ADAPTER, {"lora_name": folder.name, "lora_path": str(folder)})
        self.adapter = folder.name

    def send_weights(self, tensors: Iterator[tuple[str, Tensor]], kinds: Sequence[Kind], index: int | None) -> None:
        """By vLLM's own transfer, over a communicator for this server alone: a common one would die with any server.

        tensors, kinds: the weights, and what each of them is; index: of the GPU that they are on.
        """
        try:
            source = weight_source(tensors, kinds)
            if self._transfer is None:
                self._transfer = within(self.timeout, lambda: open_transfer(self, source), index)
            self._transfer.source = source
            within(self.timeout, self._transfer.send_weights, index)
        except Exception as error:
            self.close()
            response = getattr(error, "response", None)  # what the server said is not in the error's own text
            said = "" if response is None else f": {response.text}"
            reason = f"sending weights by {self.weight_transfer} failed: {error or type(error).__name__}{said}"
            raise ReplicaError(reason) from error

    def use_weights(self, label: str, vocabulary: int) -> None:
        """Sample with what arrived, under this name."""
        if self.weight_transfer == "ipc":
            self.ask("POST", "/wake_up?tags=kv_cache")
        self.ask("POST", "/reset_prefix_cache?reset_running_requests=true")  # what the old weights filled
        self.ask("POST", "/update_weight_version", {"new_version": label})
        self.ask("POST", "/resume")
        self.label, self.vocabulary = label, vocabulary

    def close(self) -> None:
        """Abort the communicator: a kernel that waits in it for a dead peer would occupy the GPU for ever."""
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.client = None  # a thread that was abandoned inside must not go on where the kernel lets it off
            with contextlib.suppress(Exception):  # of what is broken already
                transfer.shutdown()


def kinds_of(policy: LanguageModel) -> list[Kind]:
    """What a policy's weights are, those that are tied once: they are made for it, by all processes."""
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in policy.weights(repeat_tied=False)]


def weight_source(tensors: Iterator[tuple[str, Tensor]], kinds: Sequence[Kind]) -> Any:
    """Weights as vLLM's transfer engines take them: each once, and what they are beforehand."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(*kind) for kind in kinds]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return tensors

    return Source()


def open_transfer(replica: Replica, source: Any) -> Any:
    """vLLM's trainer-side transfer engine for one server; with "nccl" it meets the server's workers here."""
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_ip, get_open_port

    client = HTTPVLLMWeightSyncClient(replica.url, timeout=replica.timeout)
    client.shutdown_weight_transfer_engine()  # what an earlier trainer left
    where: Any = IPCTrainerInitInfo(rank=0)
    if replica.weight_transfer == "nccl":
        where = NCCLTrainerInitInfo(
            rank=0,
            master_address=get_ip(),
            master_port=get_open_port(),
            world_size=1 + replica.ask("GET", "/get_world_size")["world_size"],
            packed_buffer_size_bytes=PACKED_BYTES,
        )
    return WeightTransferTrainerFactory.trainer_init(where, client=client, source=source)


def within(seconds: float, function: Callable[[], Any], index: int | None = None) -> Any:
    """Call it in a thread and wait: a collective whose peer died never returns, and nothing can interrupt it.

    Raises:
        TimeoutError: it takes longer; the thread is abandoned and does not keep the process alive.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            with torch.accelerator.device_index(index):  # every thread has a current device of its own
                future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([future], seconds).done:
        raise TimeoutError(f"it took more than {seconds:g} s")
    return future.result()
