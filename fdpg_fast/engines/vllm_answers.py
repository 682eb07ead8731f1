"""What a vLLM server may answer. Anything else is an error of that server, told in one line."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ..errors import one_line
from ..rollouts import Completion

API_KEY = "VLLM_API_KEY"  # the environment variable from which vLLM's servers, too, take the key that they ask for
ROUNDING = 1e-3  # nats by which float32 arithmetic may put the log-prob of a near certain token above 0
NOT_A_NUMBER = -9999.0  # what vLLM writes for a log-prob that is NaN


class ReplicaError(Exception):
    """One server cannot do what it is asked: a line without control characters and key, whatever the server said."""

    def __init__(self, text: str):
        if key := os.environ.get(API_KEY):
            text = text.replace(key, "…")
        super().__init__(one_line(text))


def _object(**fields: Any) -> Any:
    return TypedDict("_object", fields)  # type: ignore[operator]


_LOGPROB = Annotated[float, Field(gt=NOT_A_NUMBER, le=ROUNDING, allow_inf_nan=False)]
_list: Any = list
_CHOICE = _object(
    index=int,
    token_ids=_list[int],
    finish_reason=str,
    logprobs=_object(content=_list[_object(token_id=int, logprob=_LOGPROB)]),
    weight_versions=_list[_object(version=str)] | None,
)
GENERATE = "/inference/v1/generate"
_ANSWERS = {  # what matters of them, by path; that of /health has nothing in it
    GENERATE: _object(choices=_list[_CHOICE]),
    "/pause": _object(status=Literal["paused"]),
    "/resume": _object(status=Literal["resumed"]),
    "/sleep": _object(status=Literal["sleeping"]),
    "/wake_up": _object(status=Literal["awake", "sleeping"]),  # the latter while only a part is awake
    "/collective_rpc": _object(results=_list),
    "/reset_prefix_cache": _object(success=Literal[True]),
    "/update_weight_version": _object(success=Literal[True]),
    "/get_world_size": _object(world_size=PositiveInt),
}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {path: TypeAdapter(kind) for path, kind in _ANSWERS.items()}


def parse(path: str, content_type: str, body: bytes) -> Any:
    """The answer to a request, as its path promises it; None where nothing is promised, as of /health.

    Raises:
        ReplicaError: it is something else.
    """
    if path not in _ADAPTERS:
        return None
    said = body[:100].decode(errors="replace")
    if content_type != "application/json":
        raise ReplicaError(f"{path}: it answers {content_type}, not JSON: {said}")
    try:
        return _ADAPTERS[path].validate_json(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ReplicaError(f"{path}: {place or 'its answer'}: {first['msg']}: {said}") from None


def completions(answer: Any, sampling: dict[str, Any], label: str, vocabulary: int) -> list[Completion]:
    """The completions in an answer to GENERATE, in order.

    Args:
        sampling: vLLM's parameters that they were asked for with.
        label: the name of the weights that the server was given last.
        vocabulary: how many tokens the policy knows.

    Raises:
        ReplicaError: they are others than were asked for, or contradict themselves.
    """
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    places = [choice["index"] for choice in choices]
    if places != list(range(sampling["n"])):
        raise ReplicaError(f"it gives completions number {places}, not 0 to {sampling['n'] - 1}")
    eos, limit = set(sampling["stop_token_ids"]), sampling["max_tokens"]
    found: list[Completion] = []
    for choice in choices:
        ids, end, tokens = choice["token_ids"], choice["finish_reason"], choice["logprobs"]["content"]
        labels = [span["version"] for span in choice["weight_versions"] or ()]
        ends = [place for place, token in enumerate(ids) if token in eos]
        checks = (
            (labels == [label], f"it has weights {labels}, not {label!r}: restarted, or used by another run"),
            (
                end == "stop" or (end == "length" and len(ids) >= limit),
                f"{end} after {len(ids)} tokens: does --max-model-len hold prompt and completion?",
            ),
            (0 < len(ids) <= limit, f"it gives {len(ids)} tokens where 1 to {limit} were asked for"),
            (all(0 <= token < vocabulary for token in ids), f"it gives a token that is not one of the {vocabulary}"),
            (ends == [len(ids) - 1] * (end == "stop"), f"{end} after {len(ids)} tokens, and EOS at {ends}"),
            ([token["token_id"] for token in tokens] == ids, "its log-probs are of other tokens than it gives"),
        )
        if complaint := next((complaint for holds, complaint in checks if not holds), None):
            raise ReplicaError(complaint)
        found.append((ids, [token["logprob"] for token in tokens], end == "stop"))
    return found
