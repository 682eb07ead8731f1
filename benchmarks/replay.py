"""pytest-benchmark for what was measured before: contenders take turns, which it cannot do by itself."""

from __future__ import annotations


class Replay:
    """A clock that is set forward by the seconds of each repeat."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, benchmark, seconds: list[float]) -> None:
        durations = iter(seconds)

        def advance() -> None:
            self.now += next(durations)

        benchmark.pedantic(advance, rounds=len(seconds))
