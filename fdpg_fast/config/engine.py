"""What samples, and how: the section `engine`."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from ..errors import UserError
from .section import Count, Section, UserPath


def _server_address(url: str) -> str:
    if "@" in url:  # which an error of pydantic would repeat
        raise UserError(
            "engine.urls: an address with a user name or password would end in config.yaml; leave them out, start the "
            "servers with --api-key, and set the environment variable VLLM_API_KEY to that key here"
        )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or re.search(r"[\s?#]", url):
        raise ValueError("this is no address of a server; write [http://HOST:PORT, …]")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ValueError("leave /v1 out: it is asked for more than completions")
    return url


class EngineConfig(Section):
    kind: Literal["auto", "transformers", "vllm", "vllm_server"] = "auto"
    """What samples: the learner's own module, vLLM in this process, or vLLM servers; auto: vLLM where it has a GPU."""
    max_new_tokens: Count = 64
    """Completions are cut off there; a cut completion is a text without EOS."""
    max_sequences: Count = 256
    """Completions decoded side by side; bounds the memory of the key-value cache."""
    tensor_parallel: Count = 1
    """vllm under torchrun: processes, and so GPUs, over which one vLLM is spread; each has one of its own if 1."""
    urls: list[Annotated[str, AfterValidator(_server_address)]] = []
    """vllm_server: addresses of the servers, such as http://gpu-box:8000."""
    weight_transfer: Literal["nccl", "ipc", "disk"] = "nccl"
    """vllm_server: from GPU to GPU, within one GPU, or through a folder that both sides see."""
    weights_dir: UserPath | None = None
    """vllm_server: the folder of weight_transfer disk."""
    request_timeout: float = Field(default=600.0, gt=0, le=1e6)
    """vllm_server: seconds that one request, or sending the weights, may take."""
    gap_warning: float | None = Field(default=None, gt=0)
    """Mean |log q − log π| a token, in nats, above which a round warns; left out, 1e-4, or 0.1 in bfloat16."""
    gap_limit: float | None = Field(default=None, gt=0)
    """The same, above which the run stops: the engine has other weights; left out, 0.01, or 0.3 in bfloat16."""
