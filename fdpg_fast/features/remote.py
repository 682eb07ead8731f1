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
from itertools import chain
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pydantic import Field

from ..errors import UserError
from .calling import is_async
from .feature import Feature, FeatureSection

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
    places = asyncio.Semaphore(concurrency)
    call = function if is_async(function) else functools.partial(asyncio.to_thread, function)

    async def persist(*arguments: Any) -> Any:
        for attempt in range(1, attempts + 1):
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


class HTTPFeature(FeatureSection):
    kind: Literal["http"]
    """Numbers from a server, which gets prompts, completions, finished and columns by POST, as an object of lists."""
    url: str = Field(pattern=r"^https?://[^\s/@]+(/\S*)?$")
    """Its address; it answers with a JSON list of a number, or null, for each completion."""
    token_env: str | None = None
    """Environment variable that holds its bearer token, which is written nowhere."""
    batch_size: int = Field(default=32, ge=1)
    """Completions in one request."""
    concurrency: int = Field(default=8, ge=1)
    """Requests at the same time."""
    attempts: int = Field(default=6, ge=1)
    """Attempts at a request that meets no connection, status 429 or 5xx, or no answer in time; pauses 1, 2, 4, … s."""
    request_timeout: float = Field(default=60.0, gt=0)
    """Seconds of one attempt."""

    def make(self, device: str) -> Feature:
        address = urlsplit(self.url).netloc + urlsplit(self.url).path  # no query: it may hold a secret
        headers = {"Content-Type": "application/json", "User-Agent": "fdpg-fast"}
        if self.token_env is not None:
            token = os.environ.get(self.token_env, "").strip()
            if not (token and token.isascii() and token.isprintable()):
                raise UserError(f"feature http: the environment variable {self.token_env} (token_env) holds no token")
            headers["Authorization"] = f"Bearer {token}"
        limits: dict[str, Any] = {
            "concurrency": self.concurrency,
            "attempts": self.attempts,
            "timeout": self.request_timeout,
        }

        def ask(rows: dict[str, list[Any]]) -> list[Any]:
            answer = _post(Request(self.url, json.dumps(rows).encode(), headers), address, self.request_timeout)
            values = None
            with contextlib.suppress(ValueError):  # of JSON
                values = json.loads(answer)
            if not isinstance(values, list) or len(values) != len(rows["completions"]):
                said = answer[:100].decode(errors="replace")
                raise ValueError(f"{address} answered {said!r}, not a list of {len(rows['completions'])} numbers")
            return values

        async def score(texts: list[str], completion_ids: list[list[int]], **sent: list[Any]) -> list[Any]:
            batches = [slice(first, first + self.batch_size) for first in range(0, len(texts), self.batch_size)]
            parts = [{name: rows[batch] for name, rows in sent.items()} for batch in batches]
            return list(chain.from_iterable(await retried(ask, parts, **limits)))

        return Feature(f"http:{address}", score, timeout=600.0)


def http(url: str, **keys: Any) -> Feature:
    """What a server says of completions; `keys` are those of `HTTPFeature`."""
    return HTTPFeature(kind="http", url=url, **keys).build("cpu")


def _post(request: Request, address: str, seconds: float) -> bytes:
    """What a server answers.

    Raises:
        ConnectionError: it may answer in a moment.
        ValueError: it refuses.
    """
    try:
        with build_opener(_NoRedirects).open(request, timeout=seconds) as response:
            return response.read()
    except HTTPError as error:
        said = f"{address}: status {error.code} {error.reason} {error.read(200).decode(errors='replace')}".rstrip()
        if error.code in (408, 429) or error.code >= 500:
            raise _NotNow(said, error.headers.get("Retry-After", "")) from None
        raise ValueError(said) from None
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{address}: {str(error) or type(error).__name__}") from error


class _NotNow(ConnectionError):
    """A status that may be another one in a moment."""

    def __init__(self, said: str, retry_after: str):
        super().__init__(said)
        self.retry_after = int(retry_after) if retry_after.isdecimal() else 0


class _NoRedirects(HTTPRedirectHandler):
    """Others would be sent the token."""

    def redirect_request(self, *_: Any) -> None:
        return None
