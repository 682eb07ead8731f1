"""What a case of the exact experiment is made of."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fdpg_kernels import divergences

from ..errors import UserError
from .enumerable import D_F


class ExactCase(BaseModel):
    """The settings of one case."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    divergence: str = "jensen_shannon"
    """D_f to descend."""
    policy: Literal["tabular", "low_rank", "transformer"] = "tabular"
    """Family of base and policy: any distribution; one number a prefix; weights shared between prefixes."""
    target: Literal["soft", "hard", "rare"] = "soft"
    """a·exp(r/beta), r counting token 2; a·1[token 2 appears]; the same where the base hardly ever writes it."""
    beta: float = Field(default=0.7, gt=0)
    """Of the soft target."""
    start: Literal["base", "other"] = "base"
    """Where π starts: at the base, or at another random policy."""
    vocab: int = Field(default=4, ge=3)
    """Tokens, EOS included."""
    max_length: int = Field(default=4, ge=1)
    """Texts are cut off there."""
    samples: int | None = Field(default=128, ge=2)
    """Texts a round; null: every text with its probability, so the expected gradient."""
    rounds: int = Field(default=400, ge=0)
    """Steps of Adam; 0: the starting policy is measured."""
    learning_rate: float = Field(default=0.05, gt=0)
    """Of Adam; falls linearly to 0."""
    baseline: Literal["leave_one_out", "running", "none"] | float = "leave_one_out"
    """As `loss.baseline` of a run, or a constant; −1 makes forward KL's reward the p/π of plain DPG."""
    partition: Literal["running", "batch", "oracle"] = "running"
    """As `partition.kind` of a run, but the oracle's Z is exact."""
    z_scale: float = Field(default=1.0, gt=0)
    """What the estimated Z is multiplied by."""
    gradient_batches: int = Field(default=0, ge=0)
    """Batches from which bias and variance of the gradient are estimated; 0: neither, nor their exact values."""

    @field_validator("divergence")
    @classmethod
    def _known(cls, name: str) -> str:
        divergences.get(name)
        if name not in D_F:
            raise ValueError(f"no closed form here; choose one of {', '.join(D_F)}")
        return name

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.samples is None and (self.baseline == "leave_one_out" or self.gradient_batches):
            raise ValueError("samples null draws none: it needs another baseline than leave_one_out and no batches")
        if self.target != "soft" and not divergences.get(self.divergence).allows_zeros:
            raise ValueError(f"{self.divergence} is infinite on the {self.target} target; take the soft one")
        return self


def parse_case(settings: dict[str, Any]) -> ExactCase:
    """Validate plain data.

    Raises:
        UserError: one line with the setting, its value and what would be valid.
    """
    try:
        return ExactCase.model_validate(settings)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        return f"exact case: {first['loc'][0]}: there is no such setting; choose of {', '.join(ExactCase.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"exact case: {first['loc'][0]}: {first['input']!r}: {message}" if first["loc"] else f"exact case: {message}"
