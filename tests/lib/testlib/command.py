"""Run the command line in this process, because importing torch takes seconds; and Python in
another.
"""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock


def run_main(*arguments: object) -> None:
    """Call the console script's own function, as a shell does."""
    from rekindle.pipeline.cli import main

    with mock.patch.object(sys, "argv", ["pipeline", *map(str, arguments)]):
        main()


def pipeline(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Return the output and the exit code of ``pipeline`` with these arguments."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            run_main(*arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def python(code: str, cwd: Path | None = None, **environment: str) -> str:
    """Return what a new interpreter prints when it runs ``code``."""
    command, env = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
