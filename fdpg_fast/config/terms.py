"""Terms of the target, and the features that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from ..errors import UserError, one_line
from ..features.answers import ExactAnswerFeature, MathFeature
from ..features.code import Pep8Feature, PythonParsesFeature
from ..features.entities import EntitiesFeature
from ..features.feature import ImportedFeature
from ..features.formats import InstructionsFeature, JSONSchemaFeature
from ..features.judge import JudgeFeature
from ..features.remote import HTTPFeature
from ..features.solved import ReasoningGymFeature
from ..features.text import ClassifierFeature, RegexFeature, SentimentFeature, WordFeature
from ..imports import import_object
from ..targets import Target, base_power, distributional, pointwise, rlhf
from .section import Section, UserPath

RESERVED = ("in_support", "ess", "pareto_k")  # keys under target/ of a round's metrics, which no feature may take

FeatureConfig = Annotated[
    WordFeature
    | RegexFeature
    | PythonParsesFeature
    | Pep8Feature
    | SentimentFeature
    | EntitiesFeature
    | ClassifierFeature
    | HTTPFeature
    | JudgeFeature
    | ExactAnswerFeature
    | MathFeature
    | JSONSchemaFeature
    | InstructionsFeature
    | ReasoningGymFeature
    | ImportedFeature,
    Field(discriminator="kind"),
]


class PointwiseTerm(Section):
    kind: Literal["pointwise"]
    """φ = the feature: a hard constraint where it is 0 or 1."""
    feature: FeatureConfig
    """What is asked of a text."""

    def build(self, device: str) -> Target:
        return pointwise(self.feature.build(device))


class RLHFTerm(Section):
    kind: Literal["rlhf"]
    """φ = exp(reward/beta)."""
    feature: FeatureConfig
    """The reward."""
    beta: float = Field(gt=0)
    """Weight of the KL penalty of the equivalent reinforcement learning problem."""

    def build(self, device: str) -> Target:
        return rlhf(self.feature.build(device), self.beta)


class DistributionalTerm(Section):
    kind: Literal["distributional"]
    """φ = exp(λ·features) with λ such that the features have the given means."""
    features: list[FeatureConfig] = Field(min_length=1)
    """Features whose means are prescribed."""
    moments: list[float] = Field(min_length=1)
    """Their means under the target, one a feature."""

    def build(self, device: str) -> Target:
        return distributional([feature.build(device) for feature in self.features], self.moments)


class BasePowerTerm(Section):
    kind: Literal["base_power"]
    """φ = a^(kappa − 1) of the base a, so that with the other terms' φ the target is a^kappa·φ."""
    kappa: float = Field(ge=0)
    """1: the base itself; more sharpens it, less flattens it; 0: all texts that the other terms allow are alike."""

    def build(self, device: str) -> Target:
        return base_power(self.kappa)


class ImportedTarget(Section):
    kind: Literal["import"]
    """Your own `fdpg_fast.targets.Target`, or a function without arguments that makes one."""
    path: UserPath
    """package.module:name or file.py:name."""

    def build(self, device: str) -> Target:
        target = import_object(self.path)
        try:
            target = target() if callable(target) else target
        except Exception as error:  # the user's code
            raise UserError(f"target: {self.path!r} raised {type(error).__name__}: {one_line(error)}") from error
        if not isinstance(target, Target):
            kind = type(target).__name__
            raise UserError(f"target: {self.path!r} is a {kind}, not a Target or a function that makes one")
        return target


TermConfig = Annotated[
    PointwiseTerm | RLHFTerm | DistributionalTerm | BasePowerTerm | ImportedTarget, Field(discriminator="kind")
]


def build_target(terms: Sequence[TermConfig], device: str) -> Target:
    """The product of terms.

    Raises:
        UserError: a feature or target cannot be made, or two features share a name.
    """
    target = Target(())
    for term in terms:
        target *= term.build(device)
    names = [feature.name for feature in target.features]
    for name in names:
        if name in RESERVED:
            raise UserError(f"target: {name!r} is the name of a metric of its own; give the feature another name")
        if names.count(name) > 1:
            raise UserError(f"target: two features are called {name!r}; give one of them another name")
    return target
