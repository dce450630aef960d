"""Versions of this package, and of those that results depend on."""

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

# pip's name of this package. The name `rekindle` belongs to somebody else there.
DISTRIBUTION = "rekindle-kd"


def package_versions() -> dict[str, str]:
    """Return the versions a run was made with; informative. Ours is under the import's name."""
    names = ("torch", "transformers", "tokenizers", "numpy", "pyarrow")
    versions = {name: _version(name) for name in names}
    return {"python": platform.python_version(), "rekindle": _version(DISTRIBUTION)} | versions


@cache
def _version(name: str) -> str:
    """Return a distribution's version; finding it takes milliseconds, and every teacher's plan
    asks.
    """
    try:
        return version(name)
    except PackageNotFoundError:  # run from a folder on the path
        return "not installed"
