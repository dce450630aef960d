"""RESULTS.md says what the recorded results say: its tables are theirs, cell by cell."""

import json
from pathlib import Path

from rekindle.pipeline.cycle.scores import CycleResults
from testlib.cycles import as_markdown

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_cycle_are_those_of_its_results():
    recorded = ROOT / "tests" / "benchmarks" / "glue" / "glue_two_cores_results.json"
    results = CycleResults.from_dict(json.loads(recorded.read_text()))
    tables = as_markdown(results).split("**tasks and their examples**")[0]
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    written = (ROOT / "RESULTS.md").read_text().splitlines()
    assert len(rows) == 2 * 4 + 7 + 55
    assert [line for line in written if line in set(rows)] == rows
