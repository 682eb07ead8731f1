"""The command line: one function a command. Bad input ends with status 2 and one line."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import select
import sys
import time
from dataclasses import replace
from pathlib import Path

from .arguments import MAX_DRAWS, make_parser, split_overrides
from .errors import RunError, UserError, is_out_of_memory, one_line, printable
from .progress import lines_for_a_person

# threads that wait for the next loop spin for some 20 µs: for longer, as OpenMP's do by themselves, and a busy machine
# runs small models many times slower; and large tensors begin as pages of 2 MiB, each a page fault, not 512
ENVIRONMENT = {
    **{"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"},
    **{"THP_MEM_ALLOC_ENABLE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
}
PATIENCE = 20.0  # seconds
LESS_MEMORY = (
    "set trainer.activation_checkpointing: on, lower trainer.micro_batch_tokens, engine.max_sequences or "
    "trainer.samples_per_context, or train with dtype: bfloat16 or lora"
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 failed while running, 2 bad input."""
    prepare_environment()
    try:
        known, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = make_parser().parse_args(known, argparse.Namespace(overrides=overrides))
        with lines_for_a_person():
            _import_parts()
            COMMANDS[options.command](options)
            sys.stdout.flush()  # where nobody reads any more, here is where it shows
    except BrokenPipeError:
        (output := select.poll()).register(sys.stdout, 0)
        if not output.poll(0):
            raise  # another pipe, as to a process of the engine
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # who reads has seen enough, as `head` does
    except (UserError, RunError, KeyboardInterrupt) as error:
        return _end(error, str(error) or "stopped")
    except Exception as error:
        from . import ranks

        if ranks.is_lonely(error):
            return _end(error, "another process of this run has ended")
        if not is_out_of_memory(error):
            raise  # a bug of ours, and the traceback helps to mend it
        return _end(error, f"out of memory ({one_line(error)[:200] or type(error).__name__}); {LESS_MEMORY}")
    return 0


def _end(error: BaseException, said: str) -> int:
    """Say in one line how the command ended and, in the error's notes, where finished work is; its exit status."""
    line = "; ".join([said, *getattr(error, "__notes__", [])])
    if number := int(os.environ.get("RANK", 0)):
        line = f"process {number}: {line}"
        if isinstance(error, UserError):  # which all find: the first one says it, and torchrun ends the others
            time.sleep(PATIENCE)
    print(f"fdpg-fast: {printable(line)}", file=sys.stderr)
    sys.last_value = error  # as Python has it of an exception that nobody caught, for what runs at exit
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def prepare_environment() -> None:
    """Set what PyTorch reads when it loads; what somebody has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _import_parts() -> None:
    """Import what all commands take: 400,000 objects that stay; a look for garbage among them takes 0.2 s."""
    if "torch" not in sys.modules:
        gc.disable()
        from . import session  # noqa: F401

        gc.freeze()
        atexit.register(gc.unfreeze)  # or compiled parts complain at the end that they have leaked
        gc.enable()


def _train(options: argparse.Namespace) -> None:
    from .config.load import config_keys, dump_config, load_config
    from .runs.folder import read_config

    if options.keys:
        print("\n".join(f"{key}\n    {text}" for key, text in config_keys().items()))
        return
    if options.resume is not None:
        if options.config is not None:
            raise UserError("train: --resume takes the run's own config; leave CONFIG.yaml out")
        config = read_config(options.resume, options.overrides)
    elif options.config is None:
        raise UserError("train: give a CONFIG.yaml, or --resume RUN")
    else:
        config = load_config(options.config, options.overrides)

    from . import ranks
    from .doctor import describe
    from .runs.tables import before_after_table
    from .trainer import Trainer

    trainer = Trainer(config, resume=options.resume is not None)
    if options.dry_run:
        does = f"{describe(trainer.session)}; nothing was done yet"
        print(*map(printable, dump_config(config).split("\n")), does, sep="\n")
        return
    result = trainer.train()
    if ranks.is_first():
        print(f"\n{before_after_table(result.run_dir)}\n\nreport: {result.report}")


def _evaluate(options: argparse.Namespace) -> None:
    from .runs.finished import evaluate_checkpoint, read_finished
    from .runs.folder import to_json, write_whole
    from .runs.tables import evaluation_table
    from .session import Session

    session = Session(read_finished(options.run_dir), resume=True, best=options.checkpoint == "best")
    evaluation = evaluate_checkpoint(session, options.samples, options.seed)
    row = {"round": session.state.round, **evaluation.as_dict()}
    print(evaluation_table(row))  # first: it is not lost where the disk is full
    path = write_whole(Path(options.run_dir) / "evaluation.json", to_json(row) + "\n")
    print(f"\nwritten to {printable(str(path))}")


def _compare(options: argparse.Namespace) -> None:
    from .experiments.compare import compare_table, measure_runs, read_runs, write_comparison

    runs = read_runs(options.run_dirs)
    evaluations = measure_runs(options.run_dirs, options.samples, options.base_samples, options.seed)
    runs = [replace(run, after=evaluation.metrics) for run, evaluation in zip(runs, evaluations, strict=True)]
    print(f"{compare_table(runs)}\n\n{printable(str(write_comparison(runs, options.output)))}")


def _sample(options: argparse.Namespace) -> None:
    from .runs.finished import quasi_rejection_sample, read_finished, sample_checkpoint
    from .runs.folder import to_json
    from .runs.tables import advice, quality_table
    from .session import Session

    beta, draws = options.quasi_rejection_beta, options.max_draws
    if beta is None and draws is not None:
        raise UserError("sample: --max-draws bounds the draws of --quasi-rejection-beta B, which is missing")
    session = Session(read_finished(options.run_dir), resume=True, best=options.checkpoint == "best")
    if beta is None:
        for row in sample_checkpoint(session, options.prompt, options.count, options.seed):
            print(to_json(row))
        return
    draws = draws or MAX_DRAWS
    accepted = quasi_rejection_sample(session, options.prompt, options.count, options.seed, beta, draws)
    for row in accepted.items:
        print(to_json(row))
    print(quality_table(accepted.quality), file=sys.stderr)
    if accepted.items:
        print(f"Z, and so β, is known to ± {1.96 * accepted.beta_error:.0%} in a context", file=sys.stderr)
    if accepted.unreachable:
        print(f"{len(accepted.unreachable)} contexts left out: no draw satisfies the target there", file=sys.stderr)
    if len(accepted.items) < options.count:
        raise RunError(advice(accepted, options.count, beta, draws))


def _push(options: argparse.Namespace) -> None:
    from .runs import hub
    from .runs.best import best_checkpoint
    from .runs.checkpoint import latest_checkpoint
    from .runs.finished import read_finished
    from .runs.folder import write_whole

    config = read_finished(options.run_dir)
    checkpoint = best_checkpoint(config) if options.checkpoint == "best" else latest_checkpoint(config.run_dir)
    assert checkpoint is not None
    if options.output is not None:
        path = Path(options.output) / "README.md"
        write_whole(path, hub.make_card(config, checkpoint, options.repo))
        print(f"written to {printable(str(path))}")
        return
    print(hub.push(config, checkpoint, options.repo, private=options.private, update=options.update))


def _experiment(options: argparse.Namespace) -> None:
    from .experiments.sweep import run_experiment

    wanted = {name: getattr(options, name) for name in ("budget", "seeds", "output", "jobs")}
    only = options.divergences and options.divergences.split(",")
    page = run_experiment(options.name, divergences=only, **wanted)
    print(f"{page.read_text(encoding='utf-8').partition('## How')[0]}\n{printable(str(page))}")


def _doctor(options: argparse.Namespace) -> None:
    from .config.load import load_config
    from .doctor import report

    if options.config is None and options.overrides:
        raise UserError(f"doctor: --{next(iter(options.overrides))} changes a config; give a CONFIG.yaml")
    for line in report(options.config and load_config(options.config, options.overrides)):
        print(line, flush=True)


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "sample": _sample,
    "push": _push,
    "experiment": _experiment,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
