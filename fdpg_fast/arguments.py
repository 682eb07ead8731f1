"""The arguments of the command line, dotted keys of a config among them."""

from __future__ import annotations

import argparse
import contextlib
import functools
from typing import Any, NoReturn

from . import __version__
from .errors import UserError

MAX_DRAWS = 4096
TRAIN_OPTIONS = ("--resume", "--dry-run", "--keys", "--help")


def split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take --a.b=c and --a.b c out of the arguments of a command that has a config; argparse knows no such."""
    if arguments[:1] not in (["train"], ["doctor"]):
        return arguments, {}
    known, overrides = [], {}
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name in TRAIN_OPTIONS:
            known.append(argument)
            if argument == "--resume":
                known += [value for value in [next(waiting, None)] if value is not None]
            continue
        if not equals and (value := next(waiting, "--")).startswith("--"):
            raise UserError(f"{name}: a value is missing; write {name}=VALUE")
        overrides[name[2:]] = value
    return known, overrides


def positive(text: str, kind: Any = int) -> Any:
    with contextlib.suppress(ValueError):
        if 0 < (number := kind(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive {'whole ' if kind is int else ''}number")


positive_number = functools.partial(positive, kind=float)


WHICH: dict[str, Any] = dict(
    choices=("newest", "best"),
    default="newest",
    help="which one: the newest (default), or the best by the run's checkpoint.best",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    parser = _Parser(prog="fdpg-fast", description="Align a language model with an explicit target distribution.")
    parser.add_argument("--version", action="version", version=f"fdpg-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, description: str = "") -> Any:
        return commands.add_parser(name, help=summary, description=description or summary).add_argument

    add = command(
        "train",
        "train a policy",
        "Train as CONFIG.yaml says; any key can be overridden, e.g. --trainer.rounds=20. "
        "`fdpg-fast train --keys` lists every key.",
    )
    add("config", nargs="?", help="YAML file")
    add("--resume", metavar="RUN", help="continue the run in this folder from its newest checkpoint")
    add("--dry-run", action="store_true", help="print the resolved config and what would be done")
    add("--keys", action="store_true", help="list the config keys with their documentation")

    add = command("evaluate", "measure a run's newest or best checkpoint on a fresh sample")
    add("run_dir", metavar="RUN")
    add("--checkpoint", **WHICH)
    add("--samples", type=positive, help="completions per context (default: the run's)")
    add("--seed", type=int, default=1, help="of the fresh sample")

    add = command(
        "compare",
        "measure several runs alike: a table and a Pareto plot",
        "Every run's newest checkpoint is sampled on the evaluation contexts of the first, with one seed, and held "
        "against Z from one large sample of the base, which is kept in the first run's folder.",
    )
    add("run_dirs", nargs="+", metavar="RUN")
    add("--output", default="comparison.html", help="HTML file to write")
    add("--samples", type=positive, default=32, help="completions per context of each run")
    add("--base-samples", type=positive, default=256, help="completions per context of the base")
    add("--seed", type=int, default=1, help="of the samples")

    add = command("sample", "print completions of a run's newest or best checkpoint as JSON lines")
    add("run_dir", metavar="RUN")
    add("--checkpoint", **WHICH)
    add("--prompt", help="continue this text, or chat: messages in JSON (default: the run's evaluation contexts)")
    add("--count", type=positive, default=8, help="how many completions")
    add("--seed", type=int, default=0)
    beta = "keep a draw with probability min(1, p/(B·policy)): nearer to the target p the larger B is, and fewer; also "
    add("--quasi-rejection-beta", type=positive_number, metavar="B", help=f"{beta}prints what other values would do")
    add("--max-draws", type=positive, help=f"with the former: give up after so many (default: {MAX_DRAWS})")

    add = command(
        "push",
        "upload a run's newest or best checkpoint to the Hugging Face hub, with a model card",
        "The card says what the run was and did, and how to load what it left; it names no licence.",
    )
    add("run_dir", metavar="RUN")
    add("repo", metavar="REPO", help="OWNER/NAME, or a NAME of your own")
    add("--checkpoint", **WHICH)
    add("--private", action="store_true", help="make a repository that others do not see")
    add("--update", action="store_true", help="add a commit to a repository that exists")
    add("--output", metavar="FOLDER", help="write the card there, to look at, and upload nothing")

    add = command(
        "experiment",
        "a sweep of runs whose findings are judged from their numbers",
        "Runs the cases of examples/experiments/NAME that are not done yet, or of any folder with an experiment.yaml, "
        "and writes results.md. Stopped, it goes on where it was.",
    )
    add("name", metavar="NAME")
    add("--budget", default="quick", help="quick (default), full, or another one of the experiment")
    add("--divergences", help="only these, separated by commas")
    add("--seeds", type=positive, help="how many (default: the budget's)")
    add("--output", help="folder for runs and results (default: runs/experiments/NAME/BUDGET)")
    add("--jobs", type=positive, default=1, help="runs side by side on the CPU")

    add = command(
        "doctor",
        "what this machine can run, and why not more",
        "With CONFIG.yaml also what its run would do; keys can be overridden as for `train`.",
    )
    add("config", nargs="?", help="YAML file")
    return parser
