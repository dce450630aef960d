"""The interface of a method to the training loop: one class in its own file, ``methods/NAME.py``.

The loop asks it which teachers it reads, how many rows its losses are over, and for its losses as
sums over the rows of a micro-batch. The loop handles weights, means, processes and micro-batches.
"""

import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import rekindle.train.methods as methods_package
from rekindle.data.batch import Batch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train.config import MethodSettings, MethodTerm
from rekindle.train.method_names import GROUP, installed_methods, own_methods, unknown_method
from rekindle.train.model.network import StudentNetwork


@dataclass(frozen=True)
class MethodRun:
    """The run that a method is part of, as known before the first step."""

    cache: Cache
    task: str  # of the student: masked_lm or causal_lm
    masked_view: str | None  # what a masked_lm student sees
    steps: int
    seed: int


class Method:
    """An objective of your own: subclass it once in ``train/methods/NAME.py``.

    What a process does must depend only on the step, never on its rows: all processes make the same
    forward passes and use the same names. Only ``count`` and ``losses`` must be written.
    """

    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    # The names that `evaluate` returns, for train.keep_best. Names that end in accuracy, precision,
    # recall, f1 or agreement are better if higher, all others if lower.
    values: ClassVar[tuple[str, ...]] = ()
    # Whether `evaluate` returns each loss under its name and as it is trained: the held-out loss
    # then uses these and does not call `losses` again.
    evaluates_losses: ClassVar[bool] = False

    def __init__(self, settings: MethodSettings, run: MethodRun):
        """Take what the method needs; raise InputError for what cannot be computed."""
        self.settings, self.run = settings, run

    @property
    def name(self) -> str:
        """Return its name in the configuration; its losses and values are NAME/…"""
        return self.settings.method

    @property
    def teachers(self) -> Sequence[str]:
        """Return all teachers whose targets it ever reads. They must be complete and have seen the
        student's masks; that is checked.
        """
        return ()

    def teachers_at(self, step: int) -> Sequence[str]:
        """Return the teachers read at ``step`` (0-based). Not called at steps where its weight is
        0.
        """
        return self.teachers

    @classmethod
    def module(cls, settings: MethodSettings, student: StudentNetwork) -> nn.Module | None:
        """Return its own parameters (such as a head), freshly initialised; None if it has none.

        They become ``student.method_module(NAME)``, and are trained, saved and loaded with the
        student.
        """
        return None

    def count(self, batch: Batch) -> Mapping[str, int]:
        """Return how many rows each of its losses is over, by the loss's name: always the same
        names.

        Called on the host for a whole step, before it is split. The loss is Σ rows / count.
        """
        raise NotImplementedError

    def losses(
        self, student: StudentNetwork, batch: Batch, step: int, device: torch.device
    ) -> Iterable[tuple[str, Tensor, Tensor]]:
        """Yield (name, loss, shown) of a micro-batch: sums over its rows. ``shown`` is logged: the
        loss itself, or the loss without one of its factors.

        Give the student ``student.with_domains(inputs, batch.domains)``. A random draw must depend
        on the example (``batch.digests``) and ``batch.epoch`` or ``step``, never on the example's
        place in the batch.
        """
        raise NotImplementedError

    def evaluate(
        self, student: StudentNetwork, batch: Batch, device: torch.device
    ) -> Mapping[str, tuple[float, int]]:
        """Return (numerator, denominator) of each held-out value in a batch; both are summed over
        batches.
        """
        return {}


def find_method(name: str) -> type[Method]:
    """Return the class of a method. Raise InputError, naming the nearest, if there is none."""
    if (problem := unknown_method(name)) is not None:
        raise InputError(problem)
    if name in own_methods():
        module_name = f"{methods_package.__name__}.{name}"
        module = pkgutil.resolve_name(module_name)
        candidates = [
            v for v in vars(module).values() if getattr(v, "__module__", None) == module_name
        ]
    else:
        entry = installed_methods()[name]
        module_name, candidates = f"{entry.value} (entry point {name!r} of {GROUP})", [entry.load()]
    classes = [v for v in candidates if isinstance(v, type) and issubclass(v, Method)]
    if len(classes) != 1:
        raise InputError(
            f"{module_name} must define exactly one subclass of rekindle.train.method.Method; "
            f"it has {len(classes)}"
        )
    return classes[0]


def make_methods(terms: Sequence[MethodTerm], run: MethodRun) -> tuple[Method, ...]:
    """Make a run's methods. Raise InputError, naming the term, for what cannot be computed."""
    methods: list[Method] = []
    for number, term in enumerate(terms):
        key = f"train.objective.methods.{number}"
        if term.method in {method.name for method in methods}:
            raise InputError(f"{key}: the method {term.method!r} is listed twice")
        method_class = find_method(term.method)
        settings = {"method": term.method} | (term.model_extra or {})
        methods.append(method_class(parse_settings(method_class.Settings, settings, key), run))
    return tuple(methods)


def add_module(
    method_class: type[Method], settings: MethodSettings, student: StudentNetwork
) -> None:
    """Give the student the method's own module."""
    dumped = settings.model_dump(mode="json", by_alias=True)
    student.add_method(settings.method, dumped, method_class.module(settings, student))
