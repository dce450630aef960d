"""Finds the built-in models and files that are named but not yet made, and has them made.

Reading a configuration makes nothing. Whatever needs the models calls ``make_missing`` once all
else is known to be right; that takes milliseconds if everything is there.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel

from rekindle.data.errors import InputError, RekindleError
from rekindle.pipeline.builtin.names import ABOUT, folder, places
from rekindle.pipeline.plain_values import strings_in

log = logging.getLogger("rekindle")

# Prefixes of the variables that torchrun sets.
_TORCHRUN = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_", "TORCHELASTIC_"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)


def missing(*values: object) -> dict[str, Path]:
    """Return the built-ins with paths in ``values`` that are not yet made, by name.

    ``values`` are configurations and paths.
    """
    values_and_dicts = [v.model_dump() if isinstance(v, BaseModel) else v for v in values]
    paths_named = set(strings_in(values_and_dicts))
    return {
        n: path for n, path in places().items() if str(path) in paths_named and not path.exists()
    }


def make_missing(*values: object) -> None:
    """Make the built-ins with paths in ``values`` that are not yet made.

    Raises InputError if they cannot be written, RekindleError if making them fails.
    """
    absent = missing(*values)
    if absent:
        _make(list(absent))
    for path in absent.values():
        if not path.exists():
            raise RekindleError(f"{path} was not made; remove {folder()} and try again")


def _make(names: list[str]) -> None:
    """Make the missing ones in a separate process.

    This process keeps its signals and its main module, and needs neither torch nor a GPU: the
    models are made on the CPU, where they are bit-identical every time.
    """
    log.info("made once from Python's documentation, and kept in %s:", folder())
    for name in names:
        log.info("  %s: %s", name, ABOUT[name])
    # A single process, also if torchrun has started this one: it would wait for the others to join
    # it, and those for the lock that it holds.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_TORCHRUN)}
    # A session of its own: Ctrl-C is for this process to handle. -P: no module of the current
    # folder.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "rekindle.pipeline.make_builtin", *names],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        process.terminate()  # it removes its unfinished work
        process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its helpers have nothing to remove
        raise
    if process.returncode:
        reason = output.strip() or f"its process ended with exit code {process.returncode}"
        error = InputError if process.returncode == InputError.exit_code else RekindleError
        raise error(f"{', '.join(names)} could not be made in {folder()}: {reason}")
