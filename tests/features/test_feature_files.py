"""A feature file is an ordinary program: itself, once, under its name, for the processes that it starts too."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fdpg_fast.errors import UserError
from fdpg_fast.features import Completions, import_feature

ROOT = Path(__file__).parents[2]
BATCH = Completions(["a", "bb"], ["", ""], [[], []], [True, True])

POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from beside_it import scale
if multiprocessing.current_process().name == "MainProcess":
    with open({log!r}, "a") as log: log.write("executed\\n")
def one(text): return scale * len(text)
def pooled(method):
    def score(completions):
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(1, mp_context=context) as pool: return list(pool.map(one, completions))
    return score
spawned, forkserved = pooled("spawn"), pooled("forkserver")
def plain(completions): return [scale * len(text) for text in completions]
"""


def python(folder, source):
    """Run a source as a script would be, in a process of its own."""
    (folder / "main.py").write_text(textwrap.dedent(source))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "main.py"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["rewards", "json", "code", "my-rewards"])
def test_a_file_is_executed_once_and_its_pools_and_helpers_work(name, tmp_path):
    """Also under the name of a module that is there already, or may be imported later."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "beside_it.py").write_text("scale = 10\n")
    log = str(tmp_path / "log")
    (folder / f"{name}.py").write_text(POOL.format(log=log))
    lines = python(
        tmp_path,
        f"""
        if __name__ == "__main__":
            from fdpg_fast.features import Completions, import_feature
            batch = Completions(["a", "bb"], ["", ""], [[], []], [True, True])
            for feature in ("plain", "spawned", "forkserved"):
                print(import_feature("mine/{name}.py:" + feature)(batch).tolist())
            import json, code
            print(json.dumps([1]), code.InteractiveConsole.__name__)
        """,
    )
    assert lines == ["[10.0, 20.0]"] * 3 + ["[1] InteractiveConsole"]
    assert Path(log).read_text() == "executed\n"


def write(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_may_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "at_home.py", "def f(completions): return [1] * len(completions)\n")
    assert import_feature("~/at_home.py:f")(BATCH).tolist() == [1, 1]


def test_two_files_of_one_name_are_two_modules(tmp_path):
    source = "def f(completions): return [{}] * len(completions)\n"
    paths = [write(tmp_path / folder, "twins.py", source.format(i)) for i, folder in enumerate(("one", "two"))]
    found = [import_feature(f"{path}:f") for path in paths + paths]
    assert [feature(BATCH).tolist()[0] for feature in found] == [0, 1, 0, 1]
    assert found[0].score is found[2].score and found[1].score is found[3].score


@pytest.mark.parametrize("number", [2, 20])
def test_an_edited_file_is_executed_again(number, tmp_path, monkeypatch):
    """Within a second and at the same size too, by which Python knows its compiled files."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write(tmp_path, f"edited_{number}.py", "def f(completions): return [1] * len(completions)\n")
    before = import_feature(f"{path}:f")
    write(tmp_path, f"edited_{number}.py", f"def f(completions): return [{number}] * len(completions)\n")
    assert [feature(BATCH).tolist()[0] for feature in (before, import_feature(f"{path}:f"))] == [1, number]


def test_a_module_of_the_same_name_stays_what_it_is(tmp_path):
    import json

    path = write(tmp_path, "json.py", "def f(completions): return [1] * len(completions)\n")
    assert import_feature(f"{path}:f")(BATCH).tolist() == [1, 1]
    assert sys.modules["json"] is json and import_feature(f"{path}:f").score is import_feature(f"{path}:f").score


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "dotted.name.py",
            "def f(): pass\n",
            "'dotted.name' is the name of another .* rename",
        ),
        ("needs_more.py", "import no_such_helper\n", "No module named 'no_such_helper'"),
        ("leaves.py", "import sys; sys.exit('bye')\n", "SystemExit: bye"),
        ("panics.py", "class Panic(BaseException): pass\nraise Panic('out of\\nbounds')\n", "Panic: out of bounds"),
        ("mute.py", "class E(Exception):\n  def __str__(self): raise self\nraise E\n", "E: without a message"),
    ],
)
def test_files_that_cannot_be_imported_are_refused_in_one_line(name, text, message, tmp_path):
    path = write(tmp_path, name, text)
    with pytest.raises(UserError, match=message) as refusal:
        import_feature(f"{path}:f")
    assert "\n" not in str(refusal.value)
