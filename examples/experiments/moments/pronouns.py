"""Whether a text speaks of a woman: the feature of the study `pronouns`."""

import re

FEMALE, MALE = (
    re.compile(rf"\b({words})\b", re.IGNORECASE) for words in ("she|her|hers|herself", "he|him|his|himself")
)


def female(completions: list[str]) -> list[float | None]:
    """1 where female pronouns outnumber male ones, 0 where they do not, None where a text has neither."""
    values: list[float | None] = []
    for text in completions:
        women, men = len(FEMALE.findall(text)), len(MALE.findall(text))
        values.append(float(women > men) if women or men else None)
    return values
