"""The command line itself: how fast it answers, what it says of itself, and readers that stop reading."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

import fdpg_fast
from fdpg_fast import cli
from support import runs


def shell(command, **environment):
    return subprocess.run(
        command, shell=True, capture_output=True, text=True, executable="/bin/bash", env=os.environ | environment
    )


CLI = f"{sys.executable} -m fdpg_fast.cli"


def test_version(capsys):
    assert runs.call("--version") == 0
    assert capsys.readouterr().out == f"fdpg-fast {fdpg_fast.__version__}\n"
    assert importlib.metadata.version("fdpg-fast") == fdpg_fast.__version__


@pytest.mark.parametrize("arguments", ["--help", "train --help", "--version"])
def test_help_needs_no_torch(arguments):
    program = f"import sys; from fdpg_fast.cli import main; main({arguments.split()!r})"
    report = f"{sys.executable} -X importtime -c '{program.replace(chr(39), chr(34))}'"
    imported = {line.rpartition("|")[2].strip() for line in shell(report).stderr.splitlines() if "|" in line}
    assert "fdpg_fast.cli" in imported and not imported & {"torch", "numpy", "pydantic", "yaml", "rich"}


def test_imports_are_not_searched_for_garbage():
    program = """
import gc
from fdpg_fast.cli import main
gc.callbacks.append(lambda phase, of: print("searched") if (phase, of["generation"]) == ("start", 2) else None)
print(main(["train", "--keys"]), gc.isenabled(), gc.get_freeze_count() > 10**5)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.partition("searched")[0].endswith("0 True True\n")  # at the very end it may be


def test_a_reader_that_stops_reading_is_no_error():
    done = shell(f"set -o pipefail; {CLI} train --keys | head -n 1")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    done = shell(f"set -o pipefail; {CLI} train --keys | :")
    assert (done.returncode, done.stderr) == (0, "")


def test_another_pipe_that_breaks_is_no_reader(monkeypatch, capfd):
    def fails(options):
        raise BrokenPipeError("of the engine")

    monkeypatch.setitem(cli.COMMANDS, "doctor", fails)
    with pytest.raises(BrokenPipeError, match="of the engine"):
        runs.call("doctor")


@pytest.mark.parametrize("device", ["meta", "hpu", "privateuseone", "cuda:99", "nonsense"])
def test_a_device_that_is_of_no_use(device, tiny_model, tmp_path, capsys):
    config = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run"))
    assert runs.call("train", config, f"--device={device}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fdpg-fast: device: {device!r} ")


def test_public_names_stay_where_they_are():
    from fdpg_fast import Trainer, TrainConfig, load_config  # noqa: F401, I001
    from fdpg_fast.engines import TransformersEngine, VLLMEngine, VLLMServerEngine  # noqa: F401
    from fdpg_fast.features import classifier, feature, python_parses, regex, word  # noqa: F401
    from fdpg_fast.targets import Target, distributional, pointwise, rlhf  # noqa: F401
    from fdpg_kernels import divergences, fdpg_loss, linear_logprob, sequence_weights  # noqa: F401

    with pytest.raises(AttributeError, match="has no attribute 'Traniner'"):
        fdpg_fast.Traniner  # noqa: B018
