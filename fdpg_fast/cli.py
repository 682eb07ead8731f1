"""The command line: train, evaluate, compare, sample, experiment, doctor. Bad input ends with status 2 and one line."""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from .environment import prepare_environment
from .errors import RunError, UserError

TRAIN_OPTIONS = ("--resume", "--dry-run", "--keys", "--help")
MAX_DRAWS = 4096


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 failed while running, 2 bad input."""
    prepare_environment()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM on a CPU warns of how it binds memory
    try:
        known, overrides = _split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_args(known)
        options.overrides = overrides
        return options.run(options)
    except UserError as error:
        print(f"fdpg-fast: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"fdpg-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fdpg-fast: stopped; continue with --resume", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fdpg-fast", description="Align a language model with an explicit target distribution.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a policy",
        description="Train as CONFIG.yaml says; any key can be overridden, e.g. --trainer.rounds=20. "
        "`fdpg-fast train --keys` lists every key.",
    )
    train.add_argument("config", nargs="?", help="YAML file")
    train.add_argument("--resume", metavar="RUN", help="continue the run in this folder from its newest checkpoint")
    train.add_argument("--dry-run", action="store_true", help="print the resolved config and what would be done")
    train.add_argument("--keys", action="store_true", help="list the config keys with their documentation")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="measure a run's newest checkpoint on a fresh sample")
    evaluate.add_argument("run_dir", metavar="RUN")
    evaluate.add_argument("--samples", type=_positive, help="completions per context (default: the run's)")
    evaluate.add_argument("--seed", type=int, default=1, help="of the fresh sample")
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser(
        "compare",
        help="measure several runs alike: a table and a Pareto plot",
        description="Every run's newest checkpoint is sampled on the evaluation contexts of the first, with one seed, "
        "and held against Z from one large sample of the base, which is kept in the first run's folder.",
    )
    compare.add_argument("run_dirs", nargs="+", metavar="RUN")
    compare.add_argument("--output", default="comparison.html", help="HTML file to write")
    compare.add_argument("--samples", type=_positive, default=32, help="completions per context of each run")
    compare.add_argument("--base-samples", type=_positive, default=256, help="completions per context of the base")
    compare.add_argument("--seed", type=int, default=1, help="of the samples")
    compare.set_defaults(run=_compare)

    sample = commands.add_parser("sample", help="print completions of a run's newest checkpoint as JSON lines")
    sample.add_argument("run_dir", metavar="RUN")
    sample.add_argument("--prompt", help="continue this text (default: the run's evaluation contexts)")
    sample.add_argument("--count", type=_positive, default=8, help="how many completions")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument(
        "--quasi-rejection-beta",
        type=_positive_number,
        metavar="B",
        help="keep a draw with probability min(1, p/(B·policy)): nearer to the target p the larger B is, and fewer; "
        "also prints what other values would do",
    )
    sample.add_argument(
        "--max-draws", type=_positive, help=f"with the former: give up after so many (default: {MAX_DRAWS})"
    )
    sample.set_defaults(run=_sample)

    experiment = commands.add_parser(
        "experiment",
        help="a sweep of runs whose findings are judged from their numbers",
        description="Runs the cases of examples/experiments/NAME that are not done yet, or of any folder with an "
        "experiment.yaml, and writes results.md. Stopped, it goes on where it was.",
    )
    experiment.add_argument("name", metavar="NAME")
    experiment.add_argument("--budget", default="quick", help="quick (default), full, or another one of the experiment")
    experiment.add_argument("--divergences", help="only these, separated by commas")
    experiment.add_argument("--seeds", type=_positive, help="how many (default: the budget's)")
    experiment.add_argument("--output", help="folder for runs and results (default: runs/experiments/NAME/BUDGET)")
    experiment.add_argument("--jobs", type=_positive, default=1, help="runs side by side on the CPU")
    experiment.set_defaults(run=_experiment)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine can run, and why not more",
        description="With CONFIG.yaml also the memory that its run takes; keys can be overridden as for `train`.",
    )
    doctor.add_argument("config", nargs="?", help="YAML file")
    doctor.set_defaults(run=_doctor)
    return parser


def _train(options: argparse.Namespace) -> int:
    from .config.load import config_keys, load_config
    from .config.schema import RESUMABLE
    from .runs.folder import read_config

    if options.keys:
        for key, text in config_keys().items():
            print(f"{key}\n    {text}")
        return 0
    if options.resume is not None:
        if options.config is not None:
            raise UserError("train: --resume takes the run's own config; leave CONFIG.yaml out")
        for key in options.overrides:
            if key not in RESUMABLE:
                raise UserError(f"--{key}: a resumed run keeps its config; only {', '.join(RESUMABLE)} may change")
        config = read_config(options.resume, options.overrides)
    elif options.config is None:
        raise UserError("train: give a CONFIG.yaml, or --resume RUN")
    else:
        config = load_config(options.config, options.overrides)

    from .dry_run import describe
    from .runs.tables import before_after_table
    from .trainer import Trainer

    trainer = Trainer(config, resume=options.resume is not None)
    if options.dry_run:
        print(describe(trainer))
        return 0
    result = trainer.train()
    print(f"\n{before_after_table(result.run_dir)}\n\nreport: {result.report}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from .runs.comparison import read_finished
    from .runs.finished import evaluate_checkpoint
    from .runs.folder import to_json
    from .runs.tables import evaluation_table
    from .trainer import Trainer

    trainer = Trainer(read_finished(options.run_dir), resume=True)
    evaluation = evaluate_checkpoint(trainer, options.samples, options.seed)
    row = {"round": trainer.state.round, **evaluation.as_dict()}
    path = Path(options.run_dir) / "evaluation.json"
    path.write_text(to_json(row) + "\n", encoding="utf-8")
    print(f"{evaluation_table(row)}\n\nwritten to {path}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from .runs.comparison import measure_runs
    from .runs.folder import read_runs
    from .runs.report import write_comparison
    from .runs.tables import compare_table

    runs = read_runs(options.run_dirs)
    found = measure_runs(options.run_dirs, options.samples, options.base_samples, options.seed, _say)
    runs = [replace(run, after=evaluation.metrics) for run, evaluation in zip(runs, found, strict=True)]
    print(compare_table(runs))
    print(f"\n{write_comparison(runs, options.output)}")
    return 0


def _sample(options: argparse.Namespace) -> int:
    from .runs.comparison import read_finished
    from .runs.finished import quasi_rejection_sample, sample_checkpoint
    from .runs.folder import to_json
    from .runs.tables import advice, quality_table
    from .trainer import Trainer

    beta, draws = options.quasi_rejection_beta, options.max_draws
    if beta is None and draws is not None:
        raise UserError("sample: --max-draws bounds the draws of --quasi-rejection-beta B, which is missing")
    trainer = Trainer(read_finished(options.run_dir), resume=True)
    if beta is None:
        for row in sample_checkpoint(trainer, options.prompt, options.count, options.seed):
            print(to_json(row))
        return 0
    draws = draws or MAX_DRAWS
    kept = quasi_rejection_sample(trainer, options.prompt, options.count, options.seed, beta, draws)
    for row in kept.items:
        print(to_json(row))
    print(quality_table(kept.quality), file=sys.stderr)
    if kept.unreachable:
        print(f"{len(kept.unreachable)} contexts left out: no draw satisfies the target there", file=sys.stderr)
    if len(kept.items) < options.count:
        raise RunError(advice(kept, options.count, beta, draws))
    return 0


def _experiment(options: argparse.Namespace) -> int:
    from .experiments.sweep import run_experiment

    page = run_experiment(
        options.name,
        budget=options.budget,
        seeds=options.seeds,
        divergences=options.divergences and options.divergences.split(","),
        output=options.output,
        jobs=options.jobs,
    )
    print(f"{page.read_text(encoding='utf-8').partition('## How')[0]}\n{page}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .config.load import load_config
    from .doctor import report

    if options.config is None and options.overrides:
        raise UserError(f"doctor: --{next(iter(options.overrides))} changes a config; give a CONFIG.yaml")
    config = None if options.config is None else load_config(options.config, options.overrides)
    for line in report(config):
        print(line, flush=True)
    return 0


def _split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take --a.b=c and --a.b c out of the arguments of `train` and `doctor`; argparse knows no such."""
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
