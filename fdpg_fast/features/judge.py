"""A language model as a judge, behind an endpoint that speaks as OpenAI's chat completions do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, HttpUrl, JsonValue

from ..errors import UserError
from ..progress import say_once
from .feature import Feature
from .remote import ServerSection, without_password

_PLACE = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_YES, _NO = "yes", "no"


class JudgeFeature(ServerSection):
    kind: Literal["judge"]
    """The verdict of a language model behind an endpoint that is compatible with OpenAI's, as `vllm serve` has one."""
    url: Annotated[HttpUrl, AfterValidator(without_password)]
    """Its address, such as http://judge:8000/v1; it is asked for /chat/completions."""
    model: str
    """Its name there."""
    template: str
    """What it is asked: a text with {prompt}, {completion} and columns of the data in braces."""
    verdict: Literal["number", "yes_no", "yes_probability"] = "number"
    """number: the first one of the answer; yes_no: 1 or 0 by its first word; yes_probability: of its first token."""
    no_verdict: float = 0.0
    """Value of a completion where the answer holds no verdict; the log says once that there was such a one."""
    request: dict[str, JsonValue] = {}
    """Keys of the request beside temperature: 0 and max_tokens: 512, such as {chat_template_kwargs: {…}}."""

    def make(self, device: str) -> Feature:
        ask, template, verdict = self.asker("/chat/completions"), self.template, _VERDICTS[self.verdict]
        names = {*_PLACE.findall(template)}
        if "completion" not in names:
            raise UserError("feature judge: template has no {completion}, so all completions would be judged alike")
        name, keys = f"judge:{self.model}", {"temperature": 0.0, "max_tokens": 512}
        if self.verdict == "yes_probability":
            keys |= {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}

        def body(values: Mapping[str, Any]) -> dict[str, Any]:
            put_in = {name: "" if value is None else str(value) for name, value in values.items()}
            content = _PLACE.sub(lambda place: put_in[place[1]], template)  # what is put in may have braces too
            return {"model": self.model, "messages": [{"role": "user", "content": content}], **keys, **self.request}

        def read(_: Any, answer: Any, answered: str) -> float:
            try:
                found = verdict(answer["choices"][0])
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
                raise ValueError(f"{answered}, not a chat completion") from None
            if found is None:
                say_once(f"feature {name}: an answer holds no verdict ({self.verdict}); such count {self.no_verdict:g}")
            return self.no_verdict if found is None else found

        async def score(completion_texts: list[str], prompt_texts: list[str], **columns: list[Any]) -> list[float]:
            rows = {name: columns[name] for name in names - {"prompt", "completion"}}
            rows |= {"prompt": prompt_texts, "completion": completion_texts}
            values = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
            return await ask([body(row) for row in values], read)

        def check(columns: Mapping[str, Any]) -> str | None:
            unknown = sorted(names - {"prompt", "completion"} - columns.keys())
            known = ", ".join(sorted({"prompt", "completion", *columns}))
            return f"template has {{{unknown[0]}}}, but there are only {known}" if unknown else None

        return Feature(name, score, timeout=600.0, check=check)


def _answer(choice: dict[str, Any]) -> str:
    """What a judge says after it has thought."""
    return (choice["message"]["content"] or "").rpartition("</think>")[2]


def _number(choice: dict[str, Any]) -> float | None:
    found = _NUMBER.search(_answer(choice))
    value = float(found[0]) if found else math.nan
    return value if math.isfinite(value) else None


def _yes_no(choice: dict[str, Any]) -> float | None:
    return {_YES: 1.0, _NO: 0.0}.get((re.findall(r"[a-z]+", _answer(choice).lower()) or [""])[0])


def _yes_probability(choice: dict[str, Any]) -> float | None:
    """P(yes)/(P(yes) + P(no)) of the first token, whatever its case and the space before it."""
    yes = no = 0.0
    for token in choice["logprobs"]["content"][0]["top_logprobs"]:
        word, chance = token["token"].strip().lower(), math.exp(min(token["logprob"], 0.0))
        yes, no = yes + chance * (word == _YES), no + chance * (word == _NO)
    return yes / (yes + no) if yes + no > 0 else None


_VERDICTS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "number": _number,
    "yes_no": _yes_no,
    "yes_probability": _yes_probability,
}
