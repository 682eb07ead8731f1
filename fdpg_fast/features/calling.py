"""The calling of a user's function within a time limit: sync ones in this thread, async ones on one event loop.

The loop runs in a thread for the whole life of the process: what an async function keeps between calls (a client, a
lock, a semaphore) stays usable, and it does not matter whether the main thread runs a loop too, as in a notebook.
All its threads are daemons: what hangs there does not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from ..imports import torch_as_before

_INTERVAL = 0.1  # seconds from one interruption to the next: a bare `except:` may swallow the first
# not SIGALRM, with which functions limit their own parts; nor one that libraries or schedulers use
_WAKE = signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR2

_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: the thread of a loop does not survive a fork
_starting = threading.Lock()


class TimeUp(BaseException):
    """A limit has passed. Not an Exception: a function's own `except Exception` must not swallow it."""


class Call:
    """A call that has begun: a sync function has returned already, what an async one returned is being awaited.

    In the main thread a sync function is interrupted when its `seconds` are over, elsewhere it is only judged when it
    returns; an async one is cancelled, which it must let happen. Both then raise TimeUp.
    """

    def __init__(self, function: Callable[..., Any], arguments: Mapping[str, Any], seconds: float):
        self._deadline = time.monotonic() + seconds
        returned = _call(function, arguments, self._deadline)
        self._result: Future[Any] = Future()
        if inspect.isawaitable(returned):
            self._result = asyncio.run_coroutine_threadsafe(_await(returned, self._deadline), event_loop())
        else:
            self._result.set_result(returned)

    def result(self) -> Any:
        """What it returned, waited for; raises what it raised."""
        wait([self._result], self._deadline - time.monotonic())
        if not self._result.done():
            self.cancel()
            raise TimeUp
        return self._result.result()

    def cancel(self) -> None:
        """Stop what is still awaited."""
        self._result.cancel()


def is_async(function: Callable[..., Any]) -> bool:
    """Whether it is known, without calling it, that it only has to be awaited."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def event_loop() -> asyncio.AbstractEventLoop:
    """The loop of this process, started at first use."""
    with _starting:
        if os.getpid() not in _loops:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            loop.set_default_executor(_DaemonThreads())
            threading.Thread(target=_serve, args=(loop,), name="async features", daemon=True).start()
        return _loops[os.getpid()]


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # with which a task stops its loop
            loop.run_forever()


async def _await(awaitable: Any, deadline: float) -> Any:
    result = await awaitable
    if time.monotonic() > deadline:  # though nobody was waiting then
        raise TimeUp
    return result


def _call(function: Callable[..., Any], arguments: Mapping[str, Any], deadline: float) -> Any:
    try:
        with torch_as_before(), contextlib.chdir("."):  # and back again, wherever it goes
            if threading.current_thread() is threading.main_thread():
                return _call_interruptibly(function, arguments, deadline)
            return function(**arguments)
    finally:
        if time.monotonic() > deadline:  # it swallowed the interruption, or could not be interrupted
            raise TimeUp


def _call_interruptibly(function: Callable[..., Any], arguments: Mapping[str, Any], deadline: float) -> Any:
    """Call in the main thread; from the deadline on a signal handler raises TimeUp in it, again and again.

    A thread sends the signal. A function that holds the GIL, as a regular expression gone exponential does, keeps that
    thread from running; but it uses the CPU, and a timer of CPU time signals without the GIL.
    """
    armed, over, main_thread = False, threading.Event(), threading.get_ident()

    def interrupt(_signal: int, _frame: Any) -> None:
        if armed and time.monotonic() >= deadline:
            raise TimeUp

    def watch() -> None:
        while not over.wait(max(deadline - time.monotonic(), _INTERVAL)):
            signal.pthread_kill(main_thread, _WAKE)

    before = {number: signal.signal(number, interrupt) for number in (_WAKE, signal.SIGPROF)}
    signal.siginterrupt(signal.SIGPROF, False)  # system calls of all threads go on: _WAKE is for those of this one
    timer = signal.setitimer(signal.ITIMER_PROF, _INTERVAL, _INTERVAL)
    watchdog = threading.Thread(target=watch, daemon=True)
    watchdog.start()
    try:
        try:
            armed = True
            return function(**arguments)
        finally:
            armed = False
    finally:
        armed = False  # again: the last interruption may have come just before the first time
        signal.setitimer(signal.ITIMER_PROF, *timer)
        over.set()
        watchdog.join()
        for number, handler in before.items():
            if handler not in (None, signal.SIG_DFL):  # which would end the process if a signal is still on its way
                signal.signal(number, handler)


class _DaemonThreads(ThreadPoolExecutor):
    """Where `asyncio.to_thread` of async functions runs; the standard pool is waited for when the process ends."""

    def __init__(self) -> None:
        super().__init__()
        self._places = threading.Semaphore(32)  # the most that asyncio's own pool has

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            with self._places:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(function(*arguments, **keywords))
                    except BaseException as error:
                        future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future
