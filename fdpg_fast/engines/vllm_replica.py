"""One vLLM server: what it is asked over HTTP, and how the policy's weights get there."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..errors import disk_errors
from ..models.language_model import LanguageModel

CONNECT_SECONDS, HEALTH_SECONDS = 5.0, 15.0
NO_WEIGHTS = "it was not given any weights yet"

Result = TypeVar("Result")


class ReplicaError(Exception):
    """One server cannot do what it is asked; `passing`: the same may go well in a moment."""

    def __init__(self, reason: str, passing: bool = False):
        super().__init__(reason)
        self.passing = passing


@dataclass(eq=False)
class Replica:
    """A server under its address.

    Attributes:
        timeout: seconds that a request, or sending all weights, may take.
        lost: why it takes no part until the next sync that reaches it; None if it does.
        in_flight: requests that it is working on.
    """

    url: str
    timeout: float
    lost: str | None = NO_WEIGHTS
    in_flight: int = 0
    _connections: set[http.client.HTTPConnection] = field(default_factory=set)
    _transfer: Any = None  # vLLM's trainer-side transfer engine: an NCCL communicator, or CUDA IPC

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float | None = None) -> Any:
        """One HTTP request; returns its parsed JSON.

        Raises:
            ReplicaError: no answer, none in time, or an error.
        """
        parts, limit = urlsplit(self.url), CONNECT_SECONDS
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=limit)
        self._connections.add(connection)
        try:
            connection.connect()
            connection.sock.settimeout(limit := seconds or self.timeout)
            text = None if body is None else json.dumps(body)
            connection.request(method, parts.path + path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        except TimeoutError:
            raise ReplicaError(f"{path}: no answer within {limit:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ReplicaError(f"{path}: {error or type(error).__name__}", passing=True) from error
        finally:
            self._connections.discard(connection)
            connection.close()
        if response.status != 200:
            raise ReplicaError(f"{path}: status {response.status}, {_message(answer)}", passing=response.status >= 500)
        return json.loads(answer) if answer else None

    def check_health(self) -> None:
        self.ask("GET", "/health", seconds=HEALTH_SECONDS)

    def hang_up(self) -> None:
        """Make every thread that waits for this server fail at once."""
        for connection in self._connections.copy():
            with contextlib.suppress(OSError, AttributeError):  # AttributeError: not connected yet
                connection.sock.shutdown(socket.SHUT_RDWR)

    def update(self, policy: LanguageModel, label: str, kind: str, folder: Path | None, turn: threading.Lock) -> None:
        """Give it the policy's weights.

        Args:
            policy: whose weights.
            label: their name, which the server attaches to every completion from then on.
            kind: "nccl", "ipc" or "disk".
            folder: of "disk": where the weights are.
            turn: held while this GPU sends.

        Raises:
            ReplicaError: it did not get them all; do not sample there.
        """
        self.check_health()  # one that is dead costs seconds, not a time-out
        if kind == "ipc":
            self.ask("POST", "/wake_up?tags=weights")
        self.ask("POST", "/pause?mode=abort")  # what a broken-off round left there must not meet half of the weights
        if folder is not None:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            try:
                self.ask("POST", "/collective_rpc", body)
            except ReplicaError as error:
                raise ReplicaError(f"{error}; does it see {folder.parent} under this name?") from error
        else:
            with turn:
                self._send(policy, kind)
        if kind == "ipc":
            self.ask("POST", "/wake_up?tags=kv_cache")
        if not self.ask("POST", "/reset_prefix_cache?reset_running_requests=true")["success"]:
            raise ReplicaError("it does not let go of the prefix cache that the old weights filled")
        self.ask("POST", "/update_weight_version", {"new_version": label})
        if (found := self.ask("GET", "/weight_info")["weight_version"]) != label:
            raise ReplicaError(f"it says that its weights are {found!r} after it was given {label!r}")
        self.ask("POST", "/resume")

    def close(self) -> None:
        """Abort the communicator: a kernel that waits in it for a dead peer would occupy the GPU for ever."""
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.client = None  # a thread that was abandoned inside must not go on where the kernel lets it off
            transfer.shutdown()

    def _send(self, policy: LanguageModel, kind: str) -> None:
        """By vLLM's own transfer, over a communicator for this server alone: a common one would die with any server."""
        try:
            source = weight_source(policy)
            if self._transfer is None:
                self._transfer = within(self.timeout, policy.device, lambda: open_transfer(self, kind, source))
            self._transfer.source = source
            within(self.timeout, policy.device, self._transfer.send_weights)
        except Exception as error:
            self.close()
            response = getattr(error, "response", None)  # what the server said is not in the error's own text
            said = "" if response is None else f": {_message(response.content)}"
            raise ReplicaError(f"sending weights by {kind} failed: {error or type(error).__name__}{said}") from error


def weight_source(policy: LanguageModel) -> Any:
    """The policy's weights as vLLM's transfer engines take them."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class PolicySource(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            # what is tied crosses once: only CPUs need it twice, and nothing is sent to those
            tied = getattr(policy.model, "all_tied_weights_keys", {})
            return ((name, tensor) for name, tensor in policy.weights() if name not in tied)

    return PolicySource()


def open_transfer(replica: Replica, kind: str, source: Any) -> Any:
    """vLLM's trainer-side transfer engine for one server; with "nccl" it meets the server's workers here."""
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_ip, get_open_port

    client = HTTPVLLMWeightSyncClient(replica.url, timeout=replica.timeout)
    client.shutdown_weight_transfer_engine()  # what an earlier trainer left
    where: Any = IPCTrainerInitInfo(rank=0)
    if kind == "nccl":
        world = 1 + replica.ask("GET", "/get_world_size")["world_size"]
        where = NCCLTrainerInitInfo(rank=0, master_address=get_ip(), master_port=get_open_port(), world_size=world)
    return WeightTransferTrainerFactory.trainer_init(where, client=client, source=source)


def within(seconds: float, device: torch.device, function: Callable[[], Result]) -> Result:
    """Call it in a thread and wait: a collective whose peer died never returns, and nothing can interrupt it.

    Raises:
        TimeoutError: it takes longer; the thread is abandoned and does not keep the process alive.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            with torch.accelerator.device_index(device.index):  # every thread has a current device of its own
                future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError as error:
        raise (error if future.done() else TimeoutError(f"it took more than {seconds:g} s")) from None


@contextlib.contextmanager
def weights_folder(policy: LanguageModel, parent: Path, name: str) -> Iterator[Path]:
    """A folder that holds the policy's weights while servers read them."""
    folder, unfinished = parent.absolute() / name, parent / f".writing-{name}"
    state, head = dict(policy.weights()), policy.head.weight
    # a tied head is written too, which `save_pretrained` leaves out unless it is another tensor
    tied = {name: tensor.clone() for name, tensor in state.items() if tensor.data_ptr() == head.data_ptr()}
    try:
        with disk_errors(f"writing weights to {folder}"):
            policy.model.save_pretrained(unfinished, state_dict={**state, **tied})
            unfinished.rename(folder)  # a server sees all of it or nothing
        yield folder
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def _message(answer: bytes) -> str:
    """What a server's error response says to a person."""
    try:
        parsed = json.loads(answer)
        return str(parsed["error"]["message"] if "error" in parsed else parsed["detail"])
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace")[:300] or "no reason given"
