"""What few samples a context do to every estimate that is normalised within contexts, and that it is marked."""

import re

import pytest

from support.small_samples import SITUATIONS, biases, documented, gradient

EACH = (2, 4, 8, 16, 32, 64, 128)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_what_is_biased_is_marked(situation):
    """Unmarked, no number is off by more than 0.06, but KL(p‖π) and its like, whose tail few samples cannot show."""
    unmarked = []
    for each in EACH:
        found, effective, marked = biases(situation, each, 200_000 // each)
        assert marked == (effective < 16)
        if not marked:
            unmarked.append(each)
            assert max(abs(bias) for name, bias in found.items() if name != "forward_kl") < 0.06, found
            assert abs(found["forward_kl"]) < 0.2
    assert set(unmarked) <= {64, 128}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_two_samples_of_a_context_are_badly_off(situation):
    found, _, marked = biases(situation, 2, 50_000)
    assert marked and abs(found["jensen_shannon"]) > 0.2 and abs(found["log_z"]) > 0.3


def test_the_document_says_what_is_measured_here():
    lines = documented("few samples: bias")[0].splitlines()[2:]
    measured = {(line.split(" | ")[0].strip("| "), int(line.split(" | ")[1])): line for line in lines}
    assert len(measured) == len(SITUATIONS) * len(EACH)
    for situation in SITUATIONS:
        for each in (4, 64):
            found, effective, marked = biases(situation, each, 200_000 // each)
            cells = measured[situation.name, each].split(" | ")
            numbers = [float(x) for x in re.findall(r"[-+]?[\d.]+", " ".join([cells[2], *cells[4:]]))]
            values = [effective, found["log_z"], found["feature_of_target/length"], found["jensen_shannon"]]
            values += [found["total_variation"], found["forward_kl"], found["acceptance"]]
            values += gradient(situation, "jensen_shannon", each, 200_000 // each)
            assert numbers == pytest.approx(values, rel=0.05, abs=0.02) and marked == (cells[3] == "?")
