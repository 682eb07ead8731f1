"""The calling of features: one loop for all async ones, and a limit that holds whatever a feature does with signals."""

import asyncio
import contextlib
import functools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from fdpg_fast.clock import Clock
from fdpg_fast.contexts import Context
from fdpg_fast.errors import RunError
from fdpg_fast.features import Completions, Feature, feature, started
from fdpg_fast.imports import import_object
from fdpg_fast.rollouts import Rollouts
from fdpg_fast.scoring import Scorer
from fdpg_fast.targets import rlhf

ROOT = Path(__file__).parents[2]


def batch_of(*completions):
    return Completions(list(completions), [""] * len(completions), [[]] * len(completions), [True] * len(completions))


BATCH = batch_of("a", "bb")


def values(function, timeout=60.0):
    return Feature("f", function, timeout)(BATCH).tolist()


def seconds_until(error, function, timeout=0.2):
    begun = time.monotonic()
    with pytest.raises(RunError, match=error):
        values(function, timeout)
    return time.monotonic() - begun


# --- one loop ---


@pytest.fixture
def judge():
    """An async reward that keeps a semaphore and a lock between calls, and makes its client at the first."""
    places, lock, clients = asyncio.Semaphore(1), asyncio.Lock(), []

    async def length(text):
        async with places:  # all but one of a call wait, which binds it to the loop
            await asyncio.sleep(0.001)
            return len(text)

    async def score(completions):
        async with lock:
            if not clients:
                clients.append(asyncio.get_running_loop())
        assert clients[0] is asyncio.get_running_loop()
        return await asyncio.gather(*map(length, completions))

    return score


def test_what_an_async_feature_keeps_works_in_every_call(judge):
    assert [values(judge) for _ in range(3)] == [[1, 2]] * 3

    async def notebook():  # where the main thread runs a loop too
        return values(judge)

    assert asyncio.run(notebook()) == [1, 2]
    thread_results = []
    thread = threading.Thread(target=lambda: thread_results.append(values(judge)))
    thread.start()
    thread.join()
    assert thread_results == [[1, 2]]


class Callable:
    async def __call__(self, completions):
        await asyncio.sleep(0)
        return [len(text) for text in completions]


async def scaled(completions, by):
    await asyncio.sleep(0)
    return [by * len(text) for text in completions]


class Awaitable:
    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return [1, 2]


@pytest.mark.parametrize(
    "function",
    [Callable(), functools.partial(scaled, by=1), lambda completions: scaled(completions, 1), lambda: Awaitable()],
    ids=["object", "partial", "coroutine of a sync function", "awaitable of another kind"],
)
def test_whatever_is_returned_to_be_awaited_is_awaited(function):
    assert values(function) == [1, 2]


def test_blocking_calls_may_go_to_threads():
    async def score(completions):
        return await asyncio.gather(*(asyncio.to_thread(len, text) for text in completions))

    assert values(score) == [1, 2]

    async def broken(completions):
        return await asyncio.to_thread(int, "many")

    with pytest.raises(RunError, match="'f' raised ValueError: invalid literal"):
        values(broken)


async def raises(completions):
    raise KeyError("answer")


async def exits(completions):
    sys.exit("no more")


async def exits_in_a_task(completions):
    return await asyncio.create_task(exits(completions))


async def cancelled(completions):
    raise asyncio.CancelledError


async def too_few(completions):
    return [1.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "'f' raised KeyError: 'answer'"),
        (exits, "'f' raised SystemExit: no more"),
        (exits_in_a_task, "'f' raised SystemExit: no more"),
        (cancelled, "'f' raised CancelledError"),
        (too_few, "'f' returned 1 values for 2 completions"),
    ],
)
def test_an_async_feature_that_fails_is_named_and_the_loop_goes_on(function, message, judge):
    assert values(judge) == [1, 2]
    with pytest.raises(RunError, match=message):
        values(function)
    assert values(judge) == [1, 2]


def in_child(results):
    results.put(values(Callable()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_new_process_has_a_loop_of_its_own(method):
    assert values(Callable()) == [1, 2]
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    child = context.Process(target=in_child, args=(results,))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and results.get() == [1, 2]


def python(source):
    """A process that runs the source: its status, stderr, and the seconds that it took to end after calling `end`."""
    head = """
        import asyncio, signal, sys, time
        from fdpg_fast.errors import RunError
        from fdpg_fast.features import Completions, Feature
        BATCH = Completions(["a", "bb"], ["", ""], [[], []], [True, True])
        def end(): print(time.time(), flush=True)
    """
    source = textwrap.dedent(head) + textwrap.dedent(source)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths}
    ended = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    return ended.returncode, ended.stderr, time.time() - float(ended.stdout.splitlines()[-1])


def test_async_features_that_hang_do_not_keep_the_process():
    status, errors, seconds = python("""
        async def waits(completions):
            await asyncio.sleep(100)
        async def threads(completions):
            await asyncio.gather(*(asyncio.to_thread(time.sleep, seconds) for seconds in [100] * 9 + [0.3] * 99))
        async def hangs(completions):  # and the loop with it
            time.sleep(100)
        for function in (waits, threads, hangs):
            try:
                Feature("f", function, timeout=0.2)(BATCH)
            except RunError as error:
                assert "'f' did not return within its timeout of 0.2 s for 2 completions" in str(error)
            else:
                raise AssertionError(function)
        time.sleep(1)
        end()
    """)
    assert (status, errors) == (0, "") and seconds < 10


# --- together ---


class Event(threading.Event):
    """Something that happens in one thread, waited for in another."""

    def must_come(self):
        assert self.wait(20)


def test_async_features_are_awaited_together_while_sync_ones_run():
    fast_ended, in_block = Event(), Event()

    async def slow(completions):
        await asyncio.to_thread(in_block.must_come)
        return [1, 2]

    async def fast(completions):
        await asyncio.sleep(0)
        fast_ended.set()
        return [1, 2]

    def sync(completions):  # though it is the first of the three
        fast_ended.must_come()
        return [10, 20]

    with started([feature(function) for function in (sync, slow, fast)], BATCH) as wait_for_values:
        in_block.set()
        values = wait_for_values()
    assert values.tolist() == [[10, 1, 1], [20, 2, 2]] and values.dtype == torch.float64


def test_one_failure_stops_those_that_are_still_awaited():
    cancelled = threading.Event()

    async def waits(completions):
        try:
            await asyncio.sleep(20)
        finally:
            cancelled.set()

    def fails(completions):
        time.sleep(0.05)
        raise ValueError("no")

    for features in (
        [Feature("first", waits, 0.5), Feature("second", fails)],
        [Feature("second", raises), Feature("first", waits, 0.5)],
    ):
        cancelled.clear()
        with pytest.raises(RunError, match="'second' raised"), started(features, BATCH) as wait_for_values:
            wait_for_values()
        assert cancelled.wait(5)


class Base:
    """A base model whose log a is 0, and whose forward pass waits for something."""

    continues_prompt = True

    def __init__(self, waits):
        self.waits, self.ended = waits, Event()

    def as_base(self):
        return contextlib.nullcontext(self)

    def token_logprobs(self, rollouts, micro_batch_tokens):
        self.waits()
        self.ended.set()
        return torch.zeros(rollouts.num_tokens)


class Letters:
    """A tokenizer of bytes."""

    def batch_decode(self, ids, **options):
        return [bytes(tokens).decode() for tokens in ids]


def rollouts_of(*completions):
    return Rollouts(
        contexts=(Context(0, "", (0,)),),
        context_index=torch.zeros(len(completions), dtype=torch.long),
        token_ids=torch.tensor(list("".join(completions).encode())),
        cu_seqlens=torch.tensor([0, *(len(text) for text in completions)]).cumsum(0).int(),
        behavior_logprob=torch.zeros(sum(map(len, completions))),
        finished=torch.zeros(len(completions), dtype=torch.bool),
    )


@pytest.mark.parametrize("judge_is_last", [False, True])
def test_the_base_is_scored_while_async_features_are_awaited(judge_is_last):
    judged, clock = Event(), Clock()
    base = Base(lambda: None if judge_is_last else judged.must_come())

    async def judge(completions):
        if judge_is_last:
            await asyncio.to_thread(base.ended.must_come)
            await asyncio.sleep(0.3)
        judged.set()
        return [len(text) for text in completions]

    def sync(completions):
        assert not base.ended.is_set()
        return [10 * len(text) for text in completions]

    target = rlhf(feature(judge), 1.0) * rlhf(feature(sync), 1.0)
    scores = Scorer(target, base, Letters(), 100)(rollouts_of("a", "bb"), clock)
    assert scores.values.tolist() == [[1, 10], [2, 20]] and scores.log_score.tolist() == [11, 22]
    assert clock.phases.keys() == {"features", "base"}
    assert clock.phases["features"] >= (0.25 if judge_is_last else 0)  # what is left of the waiting


def test_values_do_not_depend_on_which_features_are_async():
    """Nor on which of them is done first."""

    def numbers(texts):
        return [float(random.Random(text).random()) for text in texts]

    async def late(completions):
        await asyncio.sleep(0.05 * random.random())
        return numbers(completions)

    def at_once(completions):
        return numbers(completions)

    results = set()
    for functions in ([late, at_once, late], [at_once, late, at_once], [at_once] * 3):
        features = [Feature(f"f{index}", function) for index, function in enumerate(functions)]
        with started(features, BATCH) as wait_for_values:
            results.add(tuple(wait_for_values().flatten().tolist()))
    assert len(results) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_feature_that_works_elsewhere_leaves_the_run_where_it_was(fails, tmp_path):
    """As one that executes programs in a folder of their own; paths of a config are relative."""

    def score(completions):
        os.chdir(tmp_path)
        return None if fails else [1, 2]

    before = os.getcwd()
    with contextlib.suppress(RunError):
        values(score)
    assert os.getcwd() == before


@pytest.mark.parametrize("at_import", [False, True])
@pytest.mark.parametrize(
    "setting", ["set_grad_enabled(False)", "set_default_dtype(torch.bfloat16)", "set_default_device('meta')"]
)
def test_what_a_feature_sets_for_all_of_torch_is_set_back(setting, at_import, tmp_path):
    """As code that judges by a model of its own may: the run would stop, or round its numbers in silence."""
    above, within = ("torch." + setting, "pass") if at_import else ("", "torch." + setting)
    file = tmp_path / f"judge_{setting.partition('(')[0]}_{at_import}.py"
    file.write_text(f"import torch\n{above}\ndef score(completions):\n    {within}\n    return [1, 2]\n")
    assert values(import_object(f"{file}:score")) == [1.0, 2.0]
    made = torch.ones(1, requires_grad=True) * 2
    assert (made.requires_grad, made.dtype, made.device.type) == (True, torch.float32, "cpu")


# --- the limit ---


def takes_the_alarm_away(completions):
    """As a verifier that guards its own part with SIGALRM."""

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(5)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def then(hang):
    def score(completions):
        takes_the_alarm_away(completions)
        hang()

    return score


def swallow():
    for _ in range(5):
        try:
            time.sleep(10)
        except:  # noqa: E722
            continue


def swallow_and_try_again():
    while True:
        try:
            return time.sleep(10)
        except BaseException:
            time.sleep(0.2)


def turn_into_another_error():
    try:
        time.sleep(10)
    except BaseException:
        raise ValueError("judge failed") from None


def block_the_alarm():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        time.sleep(10)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def ignore_the_alarm():
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        time.sleep(10)
    finally:
        signal.signal(signal.SIGALRM, before)


def wait_for_a_thread():
    thread = threading.Thread(target=time.sleep, args=(10,), daemon=True)
    thread.start()
    thread.join()


HANGS = {
    "sleeps": lambda: time.sleep(10),
    "loops": lambda: sum(number for number in range(10**10)),
    "holds the GIL": lambda: re.search("(a+)+$", "a" * 40 + "!"),
    "sleeps, then holds the GIL": lambda: (time.sleep(0.1), re.search("(a+)+$", "a" * 40 + "!")),
    "swallows what is raised": swallow,
    "swallows it and tries again": swallow_and_try_again,
    "fails for being interrupted": turn_into_another_error,
    "blocks the alarm": block_the_alarm,
    "ignores the alarm": ignore_the_alarm,
    "waits for a thread": wait_for_a_thread,
}


@pytest.fixture
def signals_as_before():
    numbers = [number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)]
    timers = signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF
    values(lambda completions: [0, 0])  # from here on what stands in for a default stays
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    assert [signal.getitimer(timer) for timer in timers] == [(0, 0)] * 3
    time.sleep(0.25)  # nothing comes late


@pytest.mark.parametrize("name", HANGS)
def test_the_limit_holds_though_the_feature_uses_the_alarm_itself(name, signals_as_before):
    assert seconds_until("'f' did not return within its timeout of 0.2 s for 2", then(HANGS[name])) < 3


def test_a_feature_s_own_alarm_works_undisturbed(signals_as_before):
    def score(completions):
        def ring(*_):
            raise TimeoutError

        before = signal.signal(signal.SIGALRM, ring)
        scores = []
        for pause in (0.0, 5.0):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            try:
                time.sleep(pause)
                scores.append(1.0)
            except TimeoutError:
                scores.append(0.0)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        return scores

    assert values(score, 5.0) == [1, 0]


def test_the_program_s_own_handlers_and_timers_come_back():
    def own(*_):
        raise AssertionError("the program's handler ran")

    before = {number: signal.signal(number, own) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_REAL, 1000)
    signal.setitimer(signal.ITIMER_PROF, 1000, 500)
    try:
        assert values(lambda completions: [1, 2]) == [1, 2]
        assert seconds_until("timeout of 0.2 s", then(HANGS["loops"])) < 3
        assert signal.getsignal(signal.SIGALRM) is own and signal.getsignal(signal.SIGPROF) is own
        remaining, interval = signal.getitimer(signal.ITIMER_PROF)
        assert 900 < remaining < 1001 and interval == 500
    finally:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_one_feature_may_call_another(signals_as_before):
    def outer(completions):
        assert seconds_until("'f' did not return within its timeout of 0.2 s", then(HANGS["loops"])) < 3
        time.sleep(10)

    begun = time.monotonic()
    with pytest.raises(RunError, match="'outer' did not return within its timeout of 1 s"):
        Feature("outer", outer, 1.0)(BATCH)
    assert time.monotonic() - begun < 5


def test_in_another_thread_the_clock_judges_afterwards():
    results = []

    def work():
        for pause in (0.0, 1.2):
            try:
                results.append(values(lambda completions, pause=pause: [time.sleep(pause), 1], 1.0))
            except RunError as error:
                results.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "did not return within its timeout of 1 s" in results[1] and isinstance(results[0], list)


async def sleeps(completions):
    await asyncio.sleep(20)


async def blocks_the_loop(completions):
    time.sleep(1.5)
    return [0, 0]


async def refuses_to_be_cancelled(completions):
    for _ in range(4):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.5)
    return [0, 0]


@pytest.mark.parametrize("function", [sleeps, blocks_the_loop, refuses_to_be_cancelled])
def test_the_limit_holds_for_async_features(function, judge):
    assert seconds_until("'f' did not return within its timeout of 0.2 s for 2 completions", function) < 1.2
    assert values(judge) == [1, 2]  # the loop is free again


def test_an_async_feature_is_late_though_nobody_waited_for_it():
    async def late(completions):
        await asyncio.sleep(0.4)
        return [0, 0]

    with (
        started([Feature("late", late, 0.2)], BATCH) as wait_for_values,
        pytest.raises(RunError, match="'late' did not return within its timeout of 0.2 s"),
    ):
        time.sleep(0.8)
        wait_for_values()


def test_an_async_feature_in_time_may_be_collected_later():
    with started([feature(Callable()), Feature("quick", Callable(), 1.0)], BATCH) as wait_for_values:
        time.sleep(1.2)
        assert wait_for_values().tolist() == [[1, 1], [2, 2]]
