"""The arithmetic of docs/scaling.md: memory against what was measured, and tables that are what the scripts print."""

import json
from pathlib import Path

import pytest

import rank_idle
from memory_table import SHAPES, memory_table, time_table
from step_memory import CASES, compared, comparison

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = json.loads((RESULTS / "2026-12-01-step-memory-cpu.json").read_text())["cases"]
RECORDED = json.loads((RESULTS / "2026-12-01-lengths.json").read_text())


def test_all_cases_were_measured():
    assert {case["shape"]["name"] for case in MEASURED} == {shape.name for shape, *_ in CASES}


@pytest.mark.parametrize(("measured", "reckoned", "_"), compared(MEASURED).values(), ids=compared(MEASURED).keys())
def test_what_is_reckoned_is_what_was_measured(measured, reckoned, _):
    assert measured == pytest.approx(reckoned, rel=0.15)


@pytest.mark.parametrize(("shape", "parameters"), zip(SHAPES, [1.236e9, 8.03e9, 32.8e9, 70.55e9], strict=True))
def test_shapes_have_the_parameters_of_their_models(shape, parameters):
    assert shape.parameters == pytest.approx(parameters, rel=2e-3)


def test_the_document_has_these_tables():
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in (memory_table(), time_table(), comparison(MEASURED), rank_idle.table(RECORDED)):
        assert table in document
