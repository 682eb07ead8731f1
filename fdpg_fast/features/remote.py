"""A judge elsewhere: a feature that asks an HTTP server, and the patience that every remote call needs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable
from http.client import HTTPException
from itertools import chain, count
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from urllib.request import HTTPErrorProcessor, Request, build_opener

from pydantic import AfterValidator, Field, HttpUrl, ValidationError

from ..errors import UserError
from .calling import is_async
from .feature import LONGEST, Feature, FeatureSection

FIRST_PAUSE = 1.0  # seconds; each is twice the one before


async def retried(
    function: Callable[..., Any],
    *rows: Iterable[Any],
    concurrency: int = 8,
    attempts: int = 6,
    timeout: float = 60.0,
    passing: tuple[type[Exception], ...] = (ConnectionError, TimeoutError),
) -> list[Any]:
    """What a function returns for each of some rows, as `map` takes them, in their order.

    Args:
        function: async, or sync, and then called in threads.
        concurrency: calls at the same time.
        attempts: calls for one row while errors pass; before the second a second goes by, then 2, 4, 8, … or as many
            as an attribute `retry_after` of the error says.
        timeout: seconds of one attempt.
        passing: errors that may be gone in a moment; others are raised at once.

    Raises:
        ConnectionError: the last attempt for a row failed too.
    """
    if min(concurrency, attempts) < 1:
        raise ValueError(f"retried needs 1 or more of concurrency and attempts, not {concurrency} and {attempts}")
    places = asyncio.Semaphore(concurrency)
    call = function if is_async(function) else functools.partial(asyncio.to_thread, function)

    async def persist(*arguments: Any) -> Any:
        for attempt in count(1):
            try:
                async with places, asyncio.timeout(timeout):
                    result = await call(*arguments)
                    return await result if inspect.isawaitable(result) else result
            except passing as error:
                if attempt == attempts:
                    reason = str(error) or f"nothing came within {timeout:g} s"
                    raise ConnectionError(f"{reason}, at the last of {attempts} attempts") from error
                await asyncio.sleep(max(FIRST_PAUSE * 2 ** (attempt - 1), getattr(error, "retry_after", 0)))

    tasks = [asyncio.ensure_future(persist(*arguments)) for arguments in zip(*rows, strict=True)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def without_password(url: HttpUrl) -> HttpUrl:
    if url.username or url.password:
        raise ValueError("a password has no place in an address, which is written to files; see token_env")
    return url


class ServerSection(FeatureSection):
    """A server that is asked by POST, again where an error may pass."""

    url: Annotated[HttpUrl, AfterValidator(without_password)]
    token_env: str | None = None
    """Environment variable that holds its bearer token, which is written nowhere."""
    concurrency: int = Field(default=8, ge=1)
    """Requests at the same time."""
    attempts: int = Field(default=6, ge=1)
    """Attempts at a request that meets no connection, status 429 or 5xx, or no answer in time; pauses 1, 2, 4, … s."""
    request_timeout: float = Field(default=60.0, gt=0, le=LONGEST)
    """Seconds of one attempt."""

    def asker(self, path: str = "") -> Callable[..., Any]:
        """An async function that posts each of some bodies to the address with a path behind it, and reads the answers.

        Args of that function: bodies, as JSON has them; and what makes a result of a body, its answer and what to show
        of that answer: it gets None for an answer that is no JSON, and raises ValueError for one that is no result.

        Raises:
            UserError: the token is none.
        """
        kind, seconds, token = self.kind, self.request_timeout, ""
        url = str(self.url).rstrip("/") + path if path else str(self.url)
        address = self.address + path
        headers = {"Content-Type": "application/json", "User-Agent": "fdpg-fast"}
        if self.token_env is not None:
            token = os.environ.get(self.token_env, "").strip()
            if not (token and token.isascii() and token.isprintable()):
                raise UserError(f"feature {kind}: the environment variable {self.token_env} (token_env) holds no token")
            headers["Authorization"] = f"Bearer {token}"

        def post(body: Any, read: Callable[[Any, Any, str], Any]) -> Any:
            try:
                request = Request(url, json.dumps(body).encode(), headers)
                with build_opener(_AnyStatus).open(request, timeout=seconds) as response:
                    answer, status = response.read(), response.status
            except (OSError, HTTPException) as error:
                raise ConnectionError(f"{address}: {str(error) or type(error).__name__}") from error
            said = answer.decode(errors="replace").replace(token or "\0", "…")[:200]
            if not 200 <= status < 300:
                refusal = f"{address}: status {status} {response.reason} {said}".rstrip()
                if status in (408, 429) or status >= 500:
                    raise _NotNow(refusal, response.headers.get("Retry-After", ""))
                raise ValueError(refusal)
            values = None
            with contextlib.suppress(ValueError, RecursionError):  # of JSON
                values = json.loads(answer)
            return read(body, values, f"{address} answered {said!r}")

        async def ask(bodies: list[Any], read: Callable[[Any, Any, str], Any]) -> list[Any]:
            limits: dict[str, Any] = {"concurrency": self.concurrency, "attempts": self.attempts, "timeout": seconds}
            return await retried(post, bodies, [read] * len(bodies), **limits)

        return ask

    @property
    def address(self) -> str:
        """For people: without a query, which may hold a secret."""
        parts = urlsplit(str(self.url))
        return parts.netloc + parts.path.rstrip("/") * (parts.path != "/")


class HTTPFeature(ServerSection):
    kind: Literal["http"]
    """Numbers from a server, which gets prompts, completions, finished and columns by POST, as an object of lists."""
    url: Annotated[HttpUrl, AfterValidator(without_password)]
    """Its address; it answers with a JSON list of a number, or null, for each completion."""
    batch_size: int = Field(default=32, ge=1)
    """Completions in one request."""

    def make(self, device: str) -> Feature:
        ask = self.asker()

        def read(rows: dict[str, list[Any]], values: Any, answered: str) -> list[Any]:
            if not isinstance(values, list) or len(values) != len(rows["completions"]):
                raise ValueError(f"{answered}, not a list of {len(rows['completions'])} numbers")
            return values

        async def score(texts: list[str], completion_ids: list[list[int]], **sent: list[Any]) -> list[Any]:
            batches = [slice(first, first + self.batch_size) for first in range(0, len(texts), self.batch_size)]
            parts = [{name: rows[batch] for name, rows in sent.items()} for batch in batches]
            return list(chain.from_iterable(await ask(parts, read)))

        return Feature(f"http:{self.address}", score, timeout=600.0)


def http(url: str, **keys: Any) -> Feature:
    """What a server says of completions; `keys` are those of `HTTPFeature`.

    Raises:
        UserError: a key, its value or the token is wrong.
    """
    try:
        return HTTPFeature.model_validate({"kind": "http", "url": url, **keys}).build("cpu")
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"feature http: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None


class _NotNow(ConnectionError):
    """A status that may be another one in a moment."""

    def __init__(self, said: str, retry_after: str):
        super().__init__(said)
        self.retry_after = int(retry_after) if retry_after.isdecimal() else 0


class _AnyStatus(HTTPErrorProcessor):
    """Answers as they come: no redirection is followed, for another server would be sent the token."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response
