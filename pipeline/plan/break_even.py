"""The number of student runs after which a cache pays for itself, in teacher forward passes.

Pure arithmetic on the configuration. With live teachers, every student run runs each teacher on
every sequence it sees; a cache runs each teacher once on every sequence of the corpus.
"""

import math
from collections.abc import Sequence

from rekindle.data.counted import counted
from rekindle.data.settings import parse_settings
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plain_values import strings_in
from rekindle.pipeline.plan.figures import BreakEven, CorpusPlan, TeacherWork
from rekindle.train.config import METHOD_OF_TASK, MethodSettings, MethodTerm, TrainConfig
from rekindle.train.schedules import weight_at
from rekindle.train.step_config import LENGTHS, steps_of


def break_even(config: RunConfig, corpus: CorpusPlan, teachers: Sequence[TeacherWork]) -> BreakEven:
    """Compare the cost of caching ``corpus`` with student runs as configured.

    Teachers are weighed by their probed seconds if all teachers in use were probed, else by forward
    passes alone.
    """
    unused: dict[str, int | None] = {work.name: None for work in teachers}
    if corpus.sequences is None:
        return BreakEven(None, unused, f"Break-even: not known; {corpus.basis}.")
    if config.student is None:
        return BreakEven(None, unused, "Break-even: there is no student section to compare with.")
    train = _in_steps(config.train, corpus)
    cached: dict[str, float] = {}  # sequences each teacher runs on once, for the cache
    live: dict[str, float] = {}  # sequences each teacher runs on in every student run
    for work in teachers:
        active = active_steps(train, work.name, _methods_reading(config, work))
        if active:
            share = work.share or 1.0  # with no such domain in the sample, 1: the ratio is the same
            cached[work.name] = corpus.sequences * work.replicas * share
            live[work.name] = active * config.train.batch_sequences * share
    if not live:
        none = "Break-even: the student's objective uses none of these teachers."
        return BreakEven(None, unused, none)
    rates = {w.name: w.seconds_per_token for w in teachers if w.name in live if w.seconds_per_token}
    timed = len(rates) == len(live)
    if not timed:
        rates = dict.fromkeys(live, 1.0)
    once, each = (sum(passes[n] * rates[n] for n in live) for passes in (cached, live))
    runs = math.ceil(once / each)
    own = {name: math.ceil(cached[name] / live[name]) for name in live}
    sentence = (
        f"Break-even: the cache pays for itself after {counted(runs, 'student run')} like this "
        f"one. It takes {round(sum(cached.values())):,} teacher forward passes, each of one "
        f"sequence; a run with live teachers takes {round(sum(live.values())):,}."
    )
    whole = sum(
        corpus.sequences * rates[w.name] * (w.share or 1.0) for w in teachers if w.name in live
    )
    passes_over = math.ceil(once / whole)
    assumes = _assumed(train, corpus, [*live], timed, passes_over)
    return BreakEven(runs, unused | own, sentence, assumes)


def _assumed(
    train: TrainConfig, corpus: CorpusPlan, teachers: Sequence[str], timed: bool, whole_runs: int
) -> str:
    """Describe the assumed runs without a cache. ``train`` is in steps; ``whole_runs`` is the
    break-even of runs that read the whole corpus once, mentioned if the configured ones do not.
    """
    assert corpus.sequences is not None
    share = train.steps * train.batch_sequences / corpus.sequences
    times = f"{share:,.0f}" if share >= 10 else f"{share:.2g}"
    read = f"{times} times" if share >= 1 else f"{100 * share:.2g} % of"
    weighed = "" if len(teachers) < 2 else "; teachers are weighed alike: not all were timed"
    if timed and weighed:
        weighed = "; teachers are weighed by the time measured here"
    longer = (
        (f" Runs that read the whole corpus once break even after {whole_runs:,}.")
        if share < 1
        else ""
    )
    given = next((name for name in LENGTHS[1:] if getattr(train, name)), LENGTHS[0])
    steps = counted(train.steps, "step")
    length = steps if given == LENGTHS[0] else f"{train.length} = {steps}"
    scaled = corpus.texts is not None and given != "epochs"
    same = f"; train.{given} is the same at any size of the corpus" if scaled else ""
    return (
        f"It assumes runs of {length} with {train.batch_sequences:,} "
        f"sequences each (train.{given}, batch_sequences: {read} the corpus{same}), with "
        f"{', '.join(teachers)} run beside the student at each step that learns from "
        f"{'it' if len(teachers) == 1 else 'them'}; reading a cache costs nothing{weighed}.{longer}"
    )


def _in_steps(train: TrainConfig, corpus: CorpusPlan) -> TrainConfig:
    """Return ``train`` with its length in steps, estimated from the corpus."""
    assert corpus.sequences is not None
    sequences = max(1.0, corpus.sequences * (1 - train.held_out))
    each = (corpus.tokens or corpus.sequences) / max(corpus.sequences, 1)
    replayed = 0.0 if train.replay is None else train.replay.fraction
    return train.of_steps(steps_of(train, sequences, each, replayed))


def active_steps(train: TrainConfig, teacher: str, methods: Sequence[MethodTerm] = ()) -> int:
    """Return the number of steps at which the objective reads a teacher's targets. ``methods`` are
    the method terms that read them.
    """
    weights = [term.weight for term in train.objective.distill if teacher in term.teachers]
    for term in methods:
        given = {"method": term.method, "weight": (term.model_extra or {}).get("weight", 1.0)}
        weights.append(parse_settings(MethodSettings, given, "train.objective.methods").weight)
    steps = range(train.steps)
    return sum(any(weight_at(w, step, train.steps) > 0 for w in weights) for step in steps)


def taught_sequences(train: TrainConfig, teacher: str) -> int:
    """Return the number of sequences a live ``teacher`` would run on beside a run trained like
    this.

    Counts each replica, and only the steps at which the objective reads this teacher. Methods that
    name no teacher are assumed to read the teachers that no other term names.
    """
    methods = train.objective.methods
    naming = [term for term in methods if teacher in strings_in(term.model_extra)]
    distilled = any(teacher in term.teachers for term in train.objective.distill)
    chooses = train.curriculum is not None and train.curriculum.teacher == teacher
    reading = naming if naming or distilled or chooses else list(methods)
    return active_steps(train, teacher, reading) * train.batch_sequences


def _methods_reading(config: RunConfig, work: TeacherWork) -> list[MethodTerm]:
    """Return the methods that name the teacher in their settings, as far as can be told without
    loading them.

    A method that is the student's own task uses the masked LM if it names no teacher.
    """
    assert config.student is not None
    known = {teacher.name for teacher in config.teachers}
    found = []
    for term in config.train.objective.methods_for(config.student.task):
        named = known & set(strings_in(term.model_extra))
        itself = term.method in METHOD_OF_TASK.values() and work.task == "masked_lm"
        if work.name in named or (itself and not named):
            found.append(term)
    return found
