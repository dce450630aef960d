"""pytest, with a line of a file for each test as it begins and ends: what is known if it is ended.

    python recorded_tests.py FILE [pytest's arguments]

A line is a JSON list: what happened, the test, and why it failed. It ends with pytest's exit code.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

LONGEST = 1500  # characters of why a test failed


class Recorder:
    """Writes the lines; in pytest's main process, which hears of the tests of all others."""

    def __init__(self, path: Path):
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (as long as pytest)

    def write(self, what: str, test: str, why: str = "") -> None:
        self.file.write(json.dumps([what, test, why]) + "\n")
        self.file.flush()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self.write("chosen", item.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        for test in ids:  # every process has the same, and says so
            self.write("chosen", test)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write("begun", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            why = report.longreprtext[-LONGEST:] if report.failed else ""
            self.write(report.outcome, report.nodeid, why)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write("failed", report.nodeid, report.longreprtext[-LONGEST:])


if __name__ == "__main__":
    # pytest alone is to find what it imports: this folder has modules of common names
    sys.path[:] = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]
    sys.exit(pytest.main(sys.argv[2:], plugins=[Recorder(Path(sys.argv[1]))]))
