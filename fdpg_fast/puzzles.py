"""Problems that the package reasoning-gym makes from a seed, as the rows of a data set."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

from pydantic import Field, JsonValue

from .config.section import Section
from .data import Row
from .errors import UserError, one_line


class PuzzlesConfig(Section):
    dataset: str
    """Name of one of reasoning-gym's data sets, such as chain_sum or countdown."""
    size: int = Field(default=1000, ge=1, le=10**6)
    """Different problems to train on."""
    eval_size: int = Field(default=64, ge=1, le=10**6)
    """Further ones for the evaluation; none of them is among those to train on."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the problems."""
    options: dict[str, JsonValue] = {}
    """Settings of the data set, such as {min_terms: 2, max_terms: 3}."""
    template: str = "{question}"
    """The prompt, with {question} for the problem."""
    chat: bool = False
    """The prompt is a message of a user, written by the chat template."""


@dataclass(frozen=True)
class Puzzles:
    """The problems of a config: those to train on, or those held out."""

    config: PuzzlesConfig
    held_out: bool

    def __str__(self) -> str:
        return f"{self.config.dataset} of reasoning-gym"

    def rows(self) -> list[Row]:
        """Rows with "prompt", the package's "answer", and "reasoning_gym": what the problem is made of again.

        Problem i of a data set is that of seed + i, so data sets of neighbouring seeds share theirs. Those held out are
        therefore the first ones of the same data set, and a question that was there already is left out.

        Raises:
            UserError: the package is missing, there is no such data set, or it has not as many different problems.
        """
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError as error:
            missing = f'{error.name} is not installed; pip install "fdpg-fast[verifiers]"'
            raise UserError(f"contexts.reasoning_gym: {missing}") from None
        config, name = self.config, self.config.dataset
        if "{question}" not in config.template:
            raise UserError("contexts.reasoning_gym.template: there is no {question} in it, so all prompts were alike")
        if taken := sorted(config.options.keys() & {"seed", "size"}):
            raise UserError(f"contexts.reasoning_gym.options: {taken[0]} is a key of contexts.reasoning_gym itself")
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.4) or sorted(DATASETS)[:5]
            raise UserError(f"contexts.reasoning_gym.dataset: there is no {name!r}; there are {', '.join(near)}, …")
        wanted = config.eval_size + config.size
        settings: dict[str, Any] = {**config.options, "seed": config.seed, "size": 2 * wanted + 100}
        try:
            data_set, questions = create_dataset(name, **settings), dict[str, int]()
            answers = {}
            for index in range(settings["size"]):
                problem = data_set[index]
                if questions.setdefault(problem["question"], index) == index:
                    answers[index] = str(problem["answer"])
                if len(questions) == (config.eval_size if self.held_out else wanted):
                    break
            else:
                raise UserError(
                    f"contexts.reasoning_gym: {name} made {len(questions)} different problems of {settings['size']}; "
                    f"size and eval_size together want {wanted}"
                )
        except UserError:
            raise
        except Exception as error:  # of assertions on its settings, too
            reason = one_line(error) or type(error).__name__
            raise UserError(f"contexts.reasoning_gym: {name} with {config.options}: {reason}") from None
        recipe = json.dumps([name, settings])
        chosen = list(questions.items())[0 if self.held_out else config.eval_size :]
        return [
            (
                f"contexts.reasoning_gym: problem {index}",
                {
                    "prompt": self._prompt(question),
                    "answer": answers[index],
                    "reasoning_gym": [recipe, index, question],
                },
            )
            for question, index in chosen
        ]

    def _prompt(self, question: str) -> Any:
        text = self.config.template.replace("{question}", question)
        return [{"role": "user", "content": text}] if self.config.chat else text
