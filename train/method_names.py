"""List the methods by name: a module ``methods/NAME.py`` each, or an installed entry point.

A method is an objective that is none of the built-in terms. It is imported when it is used, by
``method.find_method``, not to know its name: this module imports no torch.
"""

import pkgutil
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import rekindle.train.methods as home
from rekindle.data.errors import did_you_mean

GROUP = "rekindle.methods"  # of entry points, NAME = package.module:Class
UPWARDS = ("accuracy", "precision", "recall", "f1", "agreement")  # the ends of methods' values


def unknown_method(name: str) -> str | None:
    """Say why there is no method of that name, naming the nearest; None where there is one."""
    own = own_methods()
    if name in own:  # then nobody looks through what is installed
        return None
    known = sorted(own | installed_methods().keys())
    if name in known:
        return None
    former = Path(__file__).parent / f"method_{name}.py"
    if name.isidentifier() and former.is_file() and former != Path(__file__):
        return f"{former} lies where methods were once; move it to train/methods/{name}.py"
    return (
        f"there is no method {name!r}{did_you_mean(name, known)} (known: {', '.join(known)}; a new "
        f"one is a file train/methods/NAME.py, or an installed entry point of the group {GROUP})"
    )


def own_methods() -> set[str]:
    """Return the names of the methods that are modules of this package."""
    return {module.name for module in pkgutil.iter_modules(home.__path__)}


def installed_methods() -> dict[str, EntryPoint]:
    """Return the methods that other distributions bring, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def is_better_upwards(name: str) -> bool:
    """Tell whether more is better of a held-out value ``kind/of what``, or ``METHOD/value``."""
    first, _, last = name.partition("/")
    if first in ("kl", "mse", "loss", "ce"):  # of a teacher or a domain, whatever that is called
        return False
    return first in ("agreement", "cosine") or last.rpartition("/")[2] in UPWARDS
