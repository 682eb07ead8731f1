"""Features of plain text: a word, a pattern, its sentiment, the verdict of a classifier."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from .feature import Feature, FeatureSection


class WordFeature(FeatureSection):
    kind: Literal["word"]
    """1 where the completion contains the word."""
    word: str
    """The word: whole, in upper or lower case."""

    def make(self, device: str) -> Feature:
        return word(self.word)


def word(word: str) -> Feature:
    """1 where the completion contains the word (whole, in any case), else 0."""
    word = word.strip()
    if not word:
        raise UserError("feature word: the word is empty")
    return replace(regex(rf"(?i)(?<!\w){re.escape(word)}(?!\w)"), name=f"word:{word}")


class RegexFeature(FeatureSection):
    kind: Literal["regex"]
    """1 where the pattern is found in the completion."""
    pattern: str
    """A Python regular expression."""

    def make(self, device: str) -> Feature:
        return regex(self.pattern)


def regex(pattern: str) -> Feature:
    """1 where the pattern is found anywhere in the completion, else 0."""
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"feature regex: {pattern!r} is not a regular expression: {error}") from None
    return Feature(f"regex:{pattern}", lambda completions: [float(search(text) is not None) for text in completions])


class SentimentFeature(FeatureSection):
    kind: Literal["sentiment"]
    """How positive the completion is by the VADER lexicon: (1 + compound)/2, in [0, 1]; neutral is ½."""

    def make(self, device: str) -> Feature:
        return sentiment()


def sentiment() -> Feature:
    """How positive the completion is by VADER's lexicon and rules (Hutto & Gilbert 2014), in [0, 1]; neutral is ½.

    The compound score c ∈ [−1, 1] as (1 + c)/2, in the range of a classifier's probability. Not its logarithm, which
    falls without bound as c nears −1: the most negative texts would decide a round.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError:
        raise UserError("feature sentiment: needs vaderSentiment; pip install vaderSentiment") from None
    score = SentimentIntensityAnalyzer().polarity_scores
    return Feature("sentiment", lambda completions: [(1 + score(text)["compound"]) / 2 for text in completions])


class ClassifierFeature(FeatureSection):
    kind: Literal["classifier"]
    """Probability of a label under a Hugging Face sequence classifier."""
    model: str
    """Folder or hub name of the classifier; safetensors only."""
    label: str
    """One of the classifier's labels."""
    batch_size: int = Field(default=32, ge=1)
    """Texts per forward pass."""

    def make(self, device: str) -> Feature:
        return classifier(self.model, self.label, batch_size=self.batch_size, device=device)


def classifier(model: str, label: str, *, batch_size: int = 32, device: str = "cpu") -> Feature:
    """Probability of a label under a Hugging Face sequence classifier.

    Args:
        model: folder or hub name; only safetensors are loaded and no code of the repository is run.
        label: one of the model's `id2label` values.
        batch_size: texts per forward pass, longest first, so that padding stays small.
        device: where the classifier runs.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        options = {"use_safetensors": True, "output_loading_info": True}
        network, loading = AutoModelForSequenceClassification.from_pretrained(model, **options)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"feature classifier: cannot load {model!r}: {str(error).splitlines()[0]}") from None
    if loading["missing_keys"]:  # transformers would make a random head, another one in every run
        raise UserError(f"feature classifier: {model!r} is no sequence classifier: it has no trained head")
    network = network.to(device).eval()
    independent = network.config.problem_type == "multi_label_classification" or network.config.num_labels == 1
    columns = {name.lower(): int(index) for index, name in network.config.id2label.items()}
    if label.lower() not in columns:
        raise UserError(f"feature classifier: {model!r} has no label {label!r}, only {', '.join(columns)}")

    @torch.no_grad()
    def score(completions: list[str]) -> Tensor:
        chances = torch.empty(len(completions))
        by_length = torch.tensor([len(text) for text in completions]).argsort(descending=True, stable=True)
        for rows in by_length.split(batch_size):
            inputs = tokenizer([completions[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
            logits = network(**inputs.to(device)).logits.float()
            chances[rows] = (logits.sigmoid() if independent else logits.softmax(-1))[:, columns[label.lower()]].cpu()
        return chances

    return Feature(f"classifier:{label}", score, timeout=600.0)
