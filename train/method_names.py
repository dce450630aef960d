"""List the methods by name: a module ``methods/NAME.py`` each, or an installed entry point.

A method is an objective that is none of the built-in terms. It is imported when it is used, not to
know its name: this module imports no torch.
"""

import difflib
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

import rekindle.train.methods as home
from rekindle.data.errors import InputError

if TYPE_CHECKING:
    from rekindle.train.method import Method

GROUP = "rekindle.methods"  # of entry points, NAME = package.module:Class
UPWARDS = ("accuracy", "precision", "recall", "f1", "agreement")  # the ends of methods' values


def unknown_method(name: str) -> str | None:
    """Why there is no method of that name, naming the nearest; None where there is one."""
    own = own_methods()
    if name in own:  # then nobody looks through what is installed
        return None
    known = sorted(own | installed_methods().keys())
    if name in known:
        return None
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return (
        f"there is no method {name!r}; {hint}(known: {', '.join(known)}; a new one is a file "
        f"train/methods/NAME.py, or an installed entry point of the group {GROUP})"
    )


def own_methods() -> set[str]:
    """The names of the methods that are modules of this package."""
    return {module.name for module in pkgutil.iter_modules(home.__path__)}


def installed_methods() -> dict[str, EntryPoint]:
    """The methods that other distributions bring, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def find_method(name: str) -> "type[Method]":
    """The class of the method. Raises InputError, naming the nearest, when there is none."""
    if (problem := unknown_method(name)) is not None:
        raise InputError(problem)
    from rekindle.train.method import Method

    if name in own_methods():
        where = f"{home.__name__}.{name}"
        module = pkgutil.resolve_name(where)
        found = [v for v in vars(module).values() if getattr(v, "__module__", None) == where]
    else:
        entry = installed_methods()[name]
        where, found = f"{entry.value} (entry point {name!r} of {GROUP})", [entry.load()]
    classes = [v for v in found if isinstance(v, type) and issubclass(v, Method)]
    if len(classes) != 1:
        raise InputError(
            f"{where} must define one subclass of rekindle.train.method.Method, it has "
            f"{len(classes)}"
        )
    return classes[0]


def is_better_upwards(name: str) -> bool:
    """Whether more is better of a held-out value ``kind/of what``, or ``METHOD/value``."""
    first, _, last = name.partition("/")
    if first in ("kl", "mse", "loss"):  # of a teacher or a domain, whatever that is called
        return False
    return first == "agreement" or last.rpartition("/")[2] in UPWARDS
