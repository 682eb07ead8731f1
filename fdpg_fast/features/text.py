"""Features of plain text: a word, a pattern, its sentiment, the verdict of a classifier."""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..config.section import UserPath
from ..errors import UserError, one_line
from ..model_files import reading
from ..progress import say_once
from .feature import Feature, FeatureSection

# scripts without spaces between words, as the Unicode names of their characters begin
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH", "IDEOGRAPHIC", "BOPOMOFO", "THAI", "LAO"}
_UNSPACED |= {"KHMER", "MYANMAR", "TIBETAN", "TAI", "JAVANESE", "BALINESE"}
# the i of Turkish in both cases; variation selectors
_SAME = str.maketrans("İı", "ii", "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])))


class WordFeature(FeatureSection):
    kind: Literal["word"]
    """1 where the completion contains the word."""
    word: str
    """The word: whole, in upper or lower case."""

    def make(self, device: str) -> Feature:
        return word(self.word)


def word(word: str) -> Feature:
    """1 where the completion contains the word (whole, in any case, composed or decomposed), else 0.

    Whole: no letter, digit, underscore or accent next to it. In scripts without spaces between words letters are no
    bound: there the word is found wherever its characters stand.
    """
    word = word.strip()
    wanted = _folded(word)
    if not wanted:  # also of characters that only choose a glyph
        raise UserError("feature word: the word is empty")

    def holds(text: str) -> bool:
        text, start = _folded(text), -1
        while (start := text.find(wanted, start + 1)) >= 0:
            before, after = text[:start][-1:], text[start + len(wanted) :][:1]
            accented = after and unicodedata.category(after)[0] == "M"
            if not (accented or _joined(before, wanted[0]) or _joined(after, wanted[-1])):
                return True
        return False

    return Feature(_named("word", word), lambda completion_texts: [float(holds(text)) for text in completion_texts])


def _folded(text: str) -> str:
    """One spelling of all that differ in case, in composition, or in what only chooses a glyph."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).translate(_SAME).casefold())


def _joined(neighbour: str, own: str) -> bool:
    """Whether a character beside a word, which may be none, belongs to it, by the word's character there."""
    if not neighbour or not (neighbour == "_" or unicodedata.category(neighbour)[0] in "LNM"):
        return False
    return all(unicodedata.name(letter, "").split(" ")[0] not in _UNSPACED for letter in (neighbour, own))


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
    except Exception as error:  # also of repetitions beyond counting, or brackets by the thousand
        raise UserError(f"feature regex: {pattern[:80]!r} is not a regular expression: {one_line(error)}") from None

    def score(completion_texts: list[str]) -> list[float]:
        return [float(search(text) is not None) for text in completion_texts]

    return Feature(_named("regex", pattern), score)


def _named(kind: str, text: str) -> str:
    return f"{kind}:{text if text.isprintable() else repr(text)[1:-1]}"


class SentimentFeature(FeatureSection):
    kind: Literal["sentiment"]
    """How positive the completion is by the VADER lexicon: (1 + compound)/2, in [0, 1]; neutral is ½."""

    def make(self, device: str) -> Feature:
        return sentiment()


def sentiment() -> Feature:
    """How positive the completion is by VADER's lexicon and rules (Hutto & Gilbert 2014): (1 + compound)/2.

    Not its logarithm, which falls without bound: the most negative texts would decide a round.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError:
        raise UserError("feature sentiment: needs vaderSentiment; pip install vaderSentiment") from None
    score = SentimentIntensityAnalyzer().polarity_scores
    return Feature("sentiment", lambda completion_texts: [(1 + score(x)["compound"]) / 2 for x in completion_texts])


class ClassifierFeature(FeatureSection):
    kind: Literal["classifier"]
    """Probability of a label under a Hugging Face sequence classifier."""
    model: UserPath
    """Folder or hub name of the classifier; safetensors only."""
    label: str
    """One of the classifier's labels."""
    batch_size: int = Field(default=32, ge=1)
    """Texts per forward pass."""

    def make(self, device: str) -> Feature:
        return classifier(self.model, self.label, batch_size=self.batch_size, device=device)


def classifier(model: str, label: str, *, batch_size: int = 32, device: str = "cpu") -> Feature:
    """Probability of a label, in any case, under a Hugging Face sequence classifier from a folder or the hub.

    Only safetensors are loaded and no code is run. A forward pass takes texts of similar length.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with reading(model, key="feature classifier"):
        options = {"use_safetensors": True, "output_loading_info": True}
        kind: Any = AutoModelForSequenceClassification
        network, loading = kind.from_pretrained(model, trust_remote_code=False, **options)  # None would ask
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if missing := sorted(loading["missing_keys"]):  # transformers would make random ones, others in every run
        raise UserError(f"feature classifier: {model!r} is no sequence classifier: it has no weights {missing[0]}")
    network = network.to(device).eval()
    rows_of_table = len(network.get_input_embeddings().weight)
    tables = (module for name, module in network.named_modules() if name.endswith("position_embeddings"))
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)  # RoBERTa's texts begin behind it
    places = (getattr(network.config, "max_position_embeddings", None) or 0) - (0 if padding is None else padding + 1)
    limit = min((n for n in (tokenizer.model_max_length, places) if 0 < n < 2**31), default=None)  # else none is known
    independent = network.config.problem_type == "multi_label_classification" or network.config.num_labels == 1
    columns = {name.lower(): int(index) for index, name in network.config.id2label.items()}
    if label.lower() not in columns:
        raise UserError(f"feature classifier: {model!r} has no label {label!r}, only {', '.join(columns)}")

    @torch.no_grad()
    def score(completion_texts: list[str]) -> Tensor:
        chances = torch.empty(len(completion_texts))
        by_length = torch.tensor([len(text) for text in completion_texts]).argsort(descending=True, stable=True)
        for rows in by_length.split(batch_size):
            texts = [completion_texts[i] for i in rows]
            cut: dict[str, Any] = {"truncation": limit is not None, "max_length": limit}
            inputs = tokenizer(texts, padding=True, return_tensors="pt", **cut)
            if any(encoding.overflowing for encoding in inputs.encodings or ()):
                say_once(f"feature classifier: {model} reads the first {limit} tokens of a text; there are longer ones")
            if int(inputs["input_ids"].max()) >= rows_of_table:  # a GPU would end the process
                raise ValueError(f"the tokenizer of {model!r} has tokens without an embedding")
            logits = network(**inputs.to(device)).logits.float()
            chances[rows] = (logits.sigmoid() if independent else logits.softmax(-1))[:, columns[label.lower()]].cpu()
        return chances

    try:
        if not bool(score(["a", "two words"]).isfinite().all()):
            raise ValueError("what it returns is not finite")
    except Exception as error:
        raise UserError(f"feature classifier: {model!r} cannot score two texts: {one_line(error)}") from None
    return Feature(f"classifier:{label}", score, timeout=600.0)
