"""What the trainer asks of a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..contexts import Context
from ..models.language_model import LanguageModel
from ..rollouts import Rollouts


class Engine(Protocol):
    """Samples at temperature 1 from the policy's full distribution, and says what each sampled token's log-prob was.

    Attributes:
        version: of the weights that it samples with; −1 before the first sync.
    """

    @property
    def version(self) -> int: ...

    def sample(self, contexts: Sequence[Context], samples_per_context: int, seed: int) -> Rollouts:
        """Draw completions; equal arguments and weights give equal completions, whatever was drawn before.

        Args:
            contexts: C prompts.
            samples_per_context: n; the result holds B = C·n completions, those of a context side by side.
            seed: of this call alone; the global generators are left as they are.

        Raises:
            RunError: it cannot, and trying again did not help.
        """
        ...

    def sync_weights(self, policy: LanguageModel, version: int) -> None:
        """Sample from these weights from now on; wakes an engine that sleeps.

        Raises:
            RunError: the weights did not arrive.
        """
        ...

    def sleep(self) -> None:
        """Let go of memory that the learner can use; nothing is sampled before the next sync."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...
