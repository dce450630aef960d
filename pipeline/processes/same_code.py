"""Compare what another machine runs with this process, as far as it decides the bytes they make."""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

from rekindle.data.errors import InputError

_DECIDING_PACKAGES = ("torch", "transformers", "tokenizers")  # whose versions change the last bits


@cache
def running_code() -> dict[str, str]:
    """Return what decides the bytes this process makes: this package's code, and versions."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in ("data", "kernels", "pipeline", "train"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {"rekindle": digest.hexdigest()} | {name: version(name) for name in _DECIDING_PACKAGES}


def code_difference(
    address: str, node_code: Mapping[str, str], own_code: Mapping[str, str]
) -> InputError | None:
    """Return an error if the node must not make targets: it has other code of ours, or another
    version of the tokenizers package.
    """
    if node_code["rekindle"] != own_code["rekindle"]:
        return InputError(
            f"node {address} has other code of rekindle than this process: one cache would hold "
            "targets of two versions. Install the same on every node"
        )
    if node_code["tokenizers"] != own_code["tokenizers"]:
        return InputError(
            f"node {address} has tokenizers {node_code['tokenizers']}, this process "
            f"{own_code['tokenizers']}: the same text may give other tokens there. Install the "
            "same on every node"
        )
    return None


def version_differences(
    address: str, node_code: Mapping[str, str], own_code: Mapping[str, str]
) -> str | None:
    """Name the packages whose versions differ on the node but change only the last bits."""
    differences = [
        f"{k} {v} (here {own_code[k]})" for k, v in node_code.items() if own_code[k] != v
    ]
    return (
        f"node {address} has {', '.join(differences)}: last bits may differ"
        if differences
        else None
    )
