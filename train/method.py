"""What a method is to the training loop: one class in a file of its own, ``methods/NAME.py``.

The loop asks it which teachers it reads, how many rows its losses are over, and for its losses as
sums over the rows of a micro-batch. Weights, means, processes and micro-batches are not its
business.
"""

import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import rekindle.train.methods as home
from rekindle.data.batch import Batch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train.config import MethodSettings, MethodTerm
from rekindle.train.method_names import GROUP, installed_methods, own_methods, unknown_method
from rekindle.train.model.network import StudentNetwork


@dataclass(frozen=True)
class MethodRun:
    """The run that a method is part of, known before the first step."""

    cache: Cache
    task: str  # of the student: masked_lm or causal_lm
    masked_view: str | None  # what a masked_lm student sees
    steps: int
    seed: int


class Method:
    """An objective of one's own: subclass it once in ``train/methods/NAME.py``.

    What every process does must depend on the step alone, never on the rows it has: the same
    forward passes in all of them, the same names. Only ``count`` and ``losses`` must be written.
    """

    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    # What `evaluate` returns, for train.keep_best. Names that end in accuracy, precision, recall,
    # f1 or agreement are better upwards, all others downwards.
    values: ClassVar[tuple[str, ...]] = ()
    # Whether `evaluate` returns each of its losses, by its name and as it is trained: then the
    # held-out loss takes it from there, and does not ask `losses` for it once more.
    evaluates_losses: ClassVar[bool] = False

    def __init__(self, settings: MethodSettings, run: MethodRun):
        """Takes what it needs; raises InputError for what cannot be computed."""
        self.settings, self.run = settings, run

    @property
    def name(self) -> str:
        """What it is called in the configuration; its losses and values are NAME/…"""
        return self.settings.method

    @property
    def teachers(self) -> Sequence[str]:
        """All teachers whose targets it ever reads. They must be complete and have seen the
        student's masks; that is checked.
        """
        return ()

    def teachers_at(self, step: int) -> Sequence[str]:
        """Those it reads at ``step`` (0-based). Not asked at steps where its weight is 0."""
        return self.teachers

    @classmethod
    def module(cls, settings: MethodSettings, student: StudentNetwork) -> nn.Module | None:
        """Parameters of its own (a head, say), freshly initialised; None for none.

        They are ``student.method_module(NAME)`` afterwards, trained, saved and loaded with it.
        """
        return None

    def count(self, batch: Batch) -> Mapping[str, int]:
        """How many rows each of its losses is over, by the loss's name: always the same names.

        Asked on the host for a whole step, before it is split. The loss is Σ rows / count.
        """
        raise NotImplementedError

    def losses(
        self, student: StudentNetwork, batch: Batch, step: int, device: torch.device
    ) -> Iterable[tuple[str, Tensor, Tensor]]:
        """(name, loss, shown) of a micro-batch: sums over its rows. ``shown`` is what is logged:
        the loss itself, or without a factor that the loss carries.

        What a pass of the student is given is ``student.with_domains(inputs, batch.domains)``.
        A random draw must depend on the example (``batch.digests``) and ``batch.epoch`` or
        ``step``, never on the example's place in the batch.
        """
        raise NotImplementedError

    def evaluate(
        self, student: StudentNetwork, batch: Batch, device: torch.device
    ) -> Mapping[str, tuple[float, int]]:
        """(numerator, denominator) of each held-out value in a batch; they are summed up first."""
        return {}


def find_method(name: str) -> type[Method]:
    """Return the class of a method. Raises InputError, naming the nearest, where there is none."""
    if (problem := unknown_method(name)) is not None:
        raise InputError(problem)
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


def make_methods(terms: Sequence[MethodTerm], run: MethodRun) -> tuple[Method, ...]:
    """Make a run's methods. Raises InputError, naming the term, for what cannot be computed."""
    made: list[Method] = []
    for number, term in enumerate(terms):
        where = f"train.objective.methods.{number}"
        if term.method in {method.name for method in made}:
            raise InputError(f"{where}: the method {term.method!r} stands there twice")
        kind = find_method(term.method)
        given = {"method": term.method} | (term.model_extra or {})
        made.append(kind(parse_settings(kind.Settings, given, where), run))
    return tuple(made)


def add_module(kind: type[Method], settings: MethodSettings, student: StudentNetwork) -> None:
    """Give the student what the method adds to it."""
    dumped = settings.model_dump(mode="json", by_alias=True)
    student.add_method(settings.method, dumped, kind.module(settings, student))
