"""Whether a small instruct model went on with the function: the feature of the study `documented`."""

from fdpg_fast.features.code import parses


def body(prompts: list[str], completions: list[str]) -> list[float]:
    """1 where the function goes on in an indented line, and all whole lines parse after the prompt.

    SmolLM2 hardly ever ends by itself within the tokens that it has, so the last line, cut anywhere, does not count.
    """
    values = []
    for prompt, completion in zip(prompts, completions, strict=True):
        whole = completion[: completion.rfind("\n") + 1]
        values.append(float(whole.lstrip("\n").startswith("    ") and parses(prompt + whole)))
    return values
