"""List the methods by name: each a module ``methods/NAME.py``, or an installed entry point.

A method is an objective that is not a built-in term. It is imported by ``method.find_method`` when
it is used, not to learn its name, so this module does not import torch.
"""

import pkgutil
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import rekindle.train.methods as methods_package
from rekindle.data.errors import did_you_mean

GROUP = "rekindle.methods"  # the group of entry points, NAME = package.module:Class
# endings of values that are better if higher
UPWARDS = ("accuracy", "precision", "recall", "f1", "agreement")


def unknown_method(name: str) -> str | None:
    """Return why there is no method of that name, naming the nearest; None if there is one."""
    own_names = own_methods()
    if name in own_names:  # found, so installed packages need not be searched
        return None
    known_names = sorted(own_names | installed_methods().keys())
    if name in known_names:
        return None
    former_file = Path(__file__).parent / f"method_{name}.py"
    if name.isidentifier() and former_file.is_file() and former_file != Path(__file__):
        return f"{former_file} is where methods used to be; move it to train/methods/{name}.py"
    return (
        f"there is no method {name!r}{did_you_mean(name, known_names)} (known: "
        f"{', '.join(known_names)}; a new one is a file train/methods/NAME.py, or an installed "
        f"entry point of the group {GROUP})"
    )


def own_methods() -> set[str]:
    """Return the names of the methods that are modules of this package."""
    return {module.name for module in pkgutil.iter_modules(methods_package.__path__)}


def installed_methods() -> dict[str, EntryPoint]:
    """Return the methods that other distributions provide, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def is_better_upwards(name: str) -> bool:
    """Return whether a held-out value ``kind/of what`` or ``METHOD/value`` is better if higher."""
    first, _, last = name.partition("/")
    if first in ("kl", "mse", "loss", "ce"):  # of a teacher or a domain, whatever its name
        return False
    return first in ("agreement", "cosine") or last.rpartition("/")[2] in UPWARDS
