"""Compare what another machine runs with this process, as far as it decides the bytes they make."""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

from rekindle.data.errors import InputError

_DECIDE_TARGETS = ("torch", "transformers", "tokenizers")  # whose versions change the last bits


@cache
def running_code() -> dict[str, str]:
    """Return what decides the bytes this process makes: this package's code, and versions."""
    root = Path(__file__).resolve().parents[2]
    found = hashlib.sha256()
    for folder in ("data", "kernels", "pipeline", "train"):
        for path in sorted((root / folder).rglob("*.py")):
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {"rekindle": found.hexdigest()} | {name: version(name) for name in _DECIDE_TARGETS}


def unlike(address: str, there: Mapping[str, str], here: Mapping[str, str]) -> InputError | None:
    """Return an error if the node must not make targets: it has other code of ours, or another
    version of the tokenizers package.
    """
    if there["rekindle"] != here["rekindle"]:
        return InputError(
            f"node {address} has other code of rekindle than this process: one cache would hold "
            "targets of two versions. Install the same on every node"
        )
    if there["tokenizers"] != here["tokenizers"]:
        return InputError(
            f"node {address} has tokenizers {there['tokenizers']}, this process "
            f"{here['tokenizers']}: the same text may give other tokens there. Install the same "
            "on every node"
        )
    return None


def other_versions(address: str, there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """Name the packages whose versions differ on the node but change only the last bits."""
    other = [f"{k} {v} (here {here[k]})" for k, v in there.items() if here[k] != v]
    return f"node {address} has {', '.join(other)}: last bits may differ" if other else None
