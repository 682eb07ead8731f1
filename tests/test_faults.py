"""A part of `make faults`, of each kind of fault; the whole is a command because it takes minutes."""

from faults import fuzz, inputs, kills, servers

from support.fake_server import DAMAGES

INPUTS = inputs.inputs()


def test_there_are_enough_of_each():
    assert len(INPUTS) >= 300 and len({bad.name for bad in INPUTS}) == len(INPUTS)
    assert len(servers.CHOSEN) >= 60 and {path for path, _ in servers.CHOSEN} == {path for path, _ in DAMAGES}
    assert sum(count for _, count in kills.SETTINGS.values()) == 50 and len(kills.SETTINGS) == 9


def test_bad_input_is_refused_in_a_line(tiny_model):
    assert inputs.refusals(tiny_model, INPUTS[::4]).wrong == []


def test_made_up_examples_find_nothing(tiny_model):
    tallies = list(fuzz.fuzz(tiny_model, 800, seed=1))
    assert [tally.wrong for tally in tallies] == [[] for _ in tallies]
    assert all(tally.tried >= 50 for tally in tallies)


def test_a_bad_server_changes_nothing(tiny_model):
    assert servers.misbehaviours(tiny_model, 0.05).wrong == []


def test_signals_lose_no_round(tiny_model):
    assert [tally.wrong for tally in kills.signals({"tiny": tiny_model}, 6, seed=1)] == [[], []]
