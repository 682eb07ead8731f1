"""What reaches a terminal: no control character of anybody's name or message, and no traceback for want of memory."""

import io
import logging
import re
import sys

import pytest
import torch

from fdpg_fast import cli, progress
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.errors import RunError, UserError, is_out_of_memory
from fdpg_fast.moments import TooFewSamples
from fdpg_fast.runs.tables import text_table
from support import runs

# an escape sequence, a forged line, one that is drawn over, a bell, an 8-bit sequence, text that runs backwards
NASTY = "tea\x1b[31m\nfdpg-fast: done\r\b\a\x9b2J\u202e"
SHOWN = r"tea\x1b[31m\nfdpg-fast: done\r\x08\x07\x9b2J\u202e"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")  # all but the end of a line


@pytest.mark.parametrize("key", ["model", "run_dir", "contexts.train", "engine.kind", "divergence", "device"])
def test_a_nasty_value_of_a_key(key, tiny_model, tmp_path, capfd):
    config = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run"))
    assert runs.call("train", config, f"--{key}={NASTY}") == 2
    output, errors = capfd.readouterr()
    assert output == "" and errors.startswith("fdpg-fast: ") and errors.count("\n") == 1
    assert not CONTROL.search(errors)


def test_a_run_that_was_moved_to_a_nasty_place(tiny_model, tmp_path, capfd):
    moved = runs.train(tiny_model, tmp_path).rename(tmp_path / f"run{NASTY}")
    capfd.readouterr()
    assert runs.call("evaluate", moved) in (0, 2)
    output, errors = capfd.readouterr()
    assert not CONTROL.search(output) and not CONTROL.search(errors)
    assert not re.search("^fdpg-fast: done", output + errors, re.MULTILINE)


@pytest.mark.parametrize("error", [UserError, TooFewSamples, RunError])
def test_an_error_that_quotes_somebody_is_one_line(error, monkeypatch, capsys):
    def fails(options):
        noted = error(f"http://server: {NASTY}")
        noted.add_note(NASTY)
        raise noted

    monkeypatch.setitem(cli.COMMANDS, "doctor", fails)
    assert runs.call("doctor") == (1 if error is RunError else 2)
    assert capsys.readouterr() == ("", f"fdpg-fast: http://server: {SHOWN}; {SHOWN}\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("screen", [io.StringIO, Terminal])
def test_a_line_of_the_log_and_what_goes_on(screen, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen())
    with progress.lines_for_a_person(), progress.activity(f"loading {NASTY}"):
        logging.getLogger("fdpg_fast").warning("%s is left out: %s", "http://server", NASTY)
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", sys.stderr.getvalue())  # rich's own sequences
    assert f"http://server is left out: {SHOWN}\n" in written
    assert "\x9b" not in written and "\a" not in written and "\nfdpg-fast: done" not in written


def test_a_table_has_one_line_a_row():
    assert text_table([["", "a"], [NASTY, "1"]]).count("\n") == 1


WANTS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", WANTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["sample", "sync_weights"])
def test_out_of_memory_is_one_line_with_ways_out(error, place, tiny_model, tmp_path, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(TransformersEngine, place, fails)
    config = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run"))
    assert runs.call("train", config) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fdpg-fast: out of memory (")
    assert {"trainer.micro_batch_tokens,", "engine.max_sequences", "bfloat16"} <= set(line.split())


def test_other_errors_are_bugs_and_keep_their_traceback(tiny_model, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(TransformersEngine, "sample", fails)
    config = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        runs.call("train", config)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


LIMIT = """
import re, resource
def tea(completions):
    if len(completions) > 100:  # in the first round
        held = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (held + 2**25, held + 2**25))
    return [1.0 for _ in completions]
"""


def test_a_machine_that_has_no_more_memory(tiny_model, tmp_path):
    (tmp_path / "tea.py").write_text(LIMIT)
    target, trainer = [runs.imported(tmp_path / "tea.py", "tea")], {"samples_per_context": 4096, "rounds": 2}
    trainer |= {"micro_batch_tokens": 10**6, "activation_checkpointing": "off"}
    config = runs.settings(tiny_model, tmp_path / "run", target=target, trainer=trainer)
    ended = runs.run(tmp_path, "train", runs.write_config(tmp_path, config))
    assert ended.status == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("fdpg-fast: out of memory ("), ended.stderr
