"""A checkpoint for the hub: its files, without what only the trainer reads, and a card written from the run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from ..config.schema import TrainConfig
from ..data import READERS
from ..errors import RunError, UserError, one_line
from .best import read_evaluations
from .checkpoint import STATE, SUMS, round_of
from .folder import read_run
from .report import render
from .tables import before_after_rows

log = logging.getLogger(__name__)

REFUSALS = {
    401: "the hub wants to know who you are: `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "your token may not write there; take another one, or a name of your own",
    409: "it exists; --update adds a commit to it",
}


def make_card(config: TrainConfig, checkpoint: Path, repo: str) -> str:
    """README.md of a checkpoint in a repository: metadata as the hub takes it, without a licence, then text."""
    run, done = read_run(config.run_dir), round_of(checkpoint)
    evaluation = read_evaluations(run.path).get(done)
    ends = replace(run, before=run.evaluations.get(0, {}), after=run.evaluations.get(done, {}))
    base_model, lora = _hub_name(config.model), config.lora is not None
    train = config.contexts.train
    data_set = None if train is None else _hub_name(train.partition(":")[0], "(?:/[\\w.-]+)?")
    settings = checkpoint / "config.json"
    causal = not (settings.exists() and json.loads(settings.read_text()).get("is_encoder_decoder"))
    text = render(
        "runs/card.md.j2",
        escapes=False,
        config=config,
        repo=repo,
        name=repo.split("/")[-1],
        model=Path(config.model).name if base_model is None else base_model,
        base_model=base_model,
        terms=run.config["target"],
        data=_data(train, data_set),
        rounds=done,
        contexts=None if evaluation is None else evaluation.num_contexts,
        rows=before_after_rows(ends),
        auto="AutoModelForCausalLM" if causal else "AutoModelForSeq2SeqLM",
        causal=causal,
        version=__version__,
        versions=[f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", *["peft"] * lora)],
    )
    data = ModelCardData(
        base_model=base_model,
        datasets=None if data_set is None else [data_set],
        library_name="peft" if lora else "transformers",
        pipeline_tag="text-generation" if causal else "text2text-generation",
        tags=["fdpg-fast", "f-dpg", *["lora"] * lora],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def push(config: TrainConfig, checkpoint: Path, repo: str, *, private: bool = False, update: bool = False) -> str:
    """Upload a checkpoint with its card in one commit; its address.

    Args:
        repo: OWNER/NAME, or a NAME of the user's own.
        private: make a repository that others do not see.
        update: add a commit to a repository that exists.

    Raises:
        UserError: the hub refuses, or there is no such name.
        RunError: it cannot be reached.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    kept = [path.relative_to(checkpoint) for path in files]
    kept = [name for name in kept if name.parts[0] != Path(STATE).parts[0] and name.name != SUMS]
    operations = [CommitOperationAdd("README.md", make_card(config, checkpoint, repo).encode())]
    operations += [CommitOperationAdd(str(name), checkpoint / name) for name in kept]
    with _in_one_line(repo):
        validate_repo_id(repo)
        if config.lora is not None and _hub_name(config.model) is None:
            log.warning("push: the adapter is for %r, a folder of this machine that others do not find", config.model)
        hub = HfApi()
        repo = hub.create_repo(repo, private=private, exist_ok=update).repo_id
        try:
            message = f"{checkpoint.name} of {Path(config.run_dir).name}, by fdpg-fast"
            hub.create_commit(repo, operations, commit_message=message)
        except Exception as error:
            error.add_note("the repository is there: push again with --update")
            raise
    return f"{hub.endpoint}/{repo}"


@contextlib.contextmanager
def _in_one_line(repo: str) -> Iterator[None]:
    said: UserError | RunError
    try:
        yield
        return
    except HFValidationError:
        said = UserError(f"push: {repo!r} cannot be the name of a repository; write OWNER/NAME")
    except OfflineModeIsEnabled:
        said = UserError("push: HF_HUB_OFFLINE is set; nothing can be uploaded")
    except HfHubHTTPError as error:
        status = error.response.status_code
        known = REFUSALS.get(status)
        said = UserError(f"push: {repo}: {known}") if known else RunError(f"push: {repo}: {one_line(error)}")
        said.__notes__ = getattr(error, "__notes__", [])
    except (OSError, HTTPError) as error:
        said = RunError(f"push: the hub cannot be reached: {one_line(error) or type(error).__name__}")
        said.__notes__ = getattr(error, "__notes__", [])
    raise said from None


def _hub_name(path: str, behind: str = "") -> str | None:
    """A name on the hub, if a config's model or data set is one; paths of this machine are nobody else's business."""
    if os.path.exists(path) or Path(path).suffix.lower() in READERS:
        return None
    found = re.fullmatch(rf"([\w.-]+/[\w.-]+){behind}", path)
    return found and found[1]


def _data(train: str | None, data_set: str | None) -> str:
    if train is None:
        return "texts without a prompt"
    if data_set is None:
        return f"the prompts of {Path(train).name}"
    return f"the prompts of [{train}](https://huggingface.co/datasets/{data_set})"
