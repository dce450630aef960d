"""After how many student runs a cache has paid for itself, counted in forward passes of teachers.

Pure arithmetic on the configuration: a student that is taught by live teachers runs each of them on
every sequence that it sees, a cache runs them on every sequence of the corpus once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rekindle.data.settings import parse_settings
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.teacher import TeacherWork
from rekindle.train.config import METHOD_OF_TASK, MethodSettings, MethodTerm, TrainConfig
from rekindle.train.schedules import weight_at


class Passes(NamedTuple):
    """Sequences that a teacher is run on."""

    cached: float  # once
    live: float  # in every student run


@dataclass(frozen=True)
class BreakEven:
    """Student runs after which the cache has paid for itself; None where it cannot be said."""

    runs: int | None
    teachers: Mapping[str, int | None]
    sentence: str


def break_even(config: RunConfig, sequences: int, teachers: Sequence[TeacherWork]) -> BreakEven:
    """Compare the cache of ``sequences`` with runs of the configured student.

    The total weighs teachers by their probed seconds, if all that matter were probed, else by
    forward passes alone.
    """
    unused: dict[str, int | None] = {work.name: None for work in teachers}
    if config.student is None:
        return BreakEven(None, unused, "Break-even: there is no student section to compare with.")
    passes = {
        work.name: _passes(config, sequences, work, active)
        for work in teachers
        if (active := active_steps(config.train, work.name, _methods_reading(config, work)))
    }
    if not passes:
        none = "Break-even: the student's objective uses none of these teachers."
        return BreakEven(None, unused, none)
    known = {work.name: work.seconds_per_token for work in teachers if work.name in passes}
    rates = {name: rate if all(known.values()) else 1.0 for name, rate in known.items()}
    cached = sum(each.cached * (rates[name] or 1.0) for name, each in passes.items())
    live = sum(each.live * (rates[name] or 1.0) for name, each in passes.items())
    runs = math.ceil(cached / live)
    own = {name: math.ceil(each.cached / each.live) for name, each in passes.items()}
    return BreakEven(runs, unused | own, _sentence(runs, passes))


def active_steps(train: TrainConfig, teacher: str, methods: Sequence[MethodTerm] = ()) -> int:
    """Steps at which the objective reads a teacher's targets, ``methods`` being those that do."""
    weights = [term.weight for term in train.objective.distill if teacher in term.teachers]
    for term in methods:
        given = {"method": term.method, "weight": (term.model_extra or {}).get("weight", 1.0)}
        weights.append(parse_settings(MethodSettings, given, "train.objective.methods").weight)
    steps = range(train.steps)
    return sum(any(weight_at(w, step, train.steps) > 0 for w in weights) for step in steps)


def taught_sequences(train: TrainConfig, teacher: str) -> int:
    """Sequences that a live ``teacher`` would be run on beside a run that was trained like this,
    replicas counted one by one: those of the steps at which the objective reads it.

    Methods that name no teacher are taken to read those that no other term names.
    """
    methods = train.objective.methods
    naming = [term for term in methods if teacher in _words(term)]
    distilled = any(teacher in term.teachers for term in train.objective.distill)
    chooses = train.curriculum is not None and train.curriculum.teacher == teacher
    reading = naming if naming or distilled or chooses else list(methods)
    return active_steps(train, teacher, reading) * train.batch_sequences


def _methods_reading(config: RunConfig, work: TeacherWork) -> list[MethodTerm]:
    """Methods that name the teacher among their settings, as far as that is known unloaded.

    A method that is a student's task takes the masked LM if it names none.
    """
    assert config.student is not None
    known = {teacher.name for teacher in config.teachers}
    found = []
    for term in config.train.objective.methods_for(config.student.task):
        named = known & set(_words(term))
        itself = term.method in METHOD_OF_TASK.values() and work.task == "masked_lm"
        if work.name in named or (itself and not named):
            found.append(term)
    return found


def _words(term: MethodTerm) -> Iterator[str]:
    """The words that are a method's settings, or items of them."""
    for value in (term.model_extra or {}).values():
        yield from (v for v in (value if isinstance(value, list) else [value]) if type(v) is str)


def _passes(config: RunConfig, sequences: int, work: TeacherWork, active: int) -> Passes:
    share = work.share or 1.0  # of domains that are not in the sample: the ratio is the same
    live = active * config.train.batch_sequences
    return Passes(sequences * work.replicas * share, live * share)


def _sentence(runs: int, passes: Mapping[str, Passes]) -> str:
    cached = round(sum(each.cached for each in passes.values()))
    live = round(sum(each.live for each in passes.values()))
    shown = "student run" if runs == 1 else "student runs"
    return (
        f"Break-even: the cache pays for itself after {runs:,} {shown} like this one. It takes "
        f"{cached:,} teacher forward passes, counted in sequences; a run with live teachers takes "
        f"{live:,}."
    )
