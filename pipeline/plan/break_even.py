"""After how many student runs a cache has paid for itself, counted in forward passes of teachers.

Pure arithmetic on the configuration: a student that is taught by live teachers runs each of them on
every sequence that it sees, a cache runs them on every sequence of the corpus once.
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
    """Compare the cache of ``corpus`` with runs of the configured student.

    The total weighs teachers by their probed seconds, if all that matter were probed, else by
    forward passes alone.
    """
    unused: dict[str, int | None] = {work.name: None for work in teachers}
    if corpus.sequences is None:
        return BreakEven(None, unused, f"Break-even: not known; {corpus.basis}.")
    if config.student is None:
        return BreakEven(None, unused, "Break-even: there is no student section to compare with.")
    train = _in_steps(config.train, corpus)
    cached: dict[str, float] = {}  # sequences that each teacher is run on once
    live: dict[str, float] = {}  # and in every student run
    for work in teachers:
        active = active_steps(train, work.name, _methods_reading(config, work))
        if active:
            share = work.share or 1.0  # of domains not in the sample: the ratio is the same
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
    """Say what runs without a cache are taken to be, ``train`` being in steps; ``whole_runs``: the
    break-even of those that read all of the corpus once, which is said where these do not.
    """
    assert corpus.sequences is not None
    share = train.steps * train.batch_sequences / corpus.sequences
    times = f"{share:,.0f}" if share >= 10 else f"{share:.2g}"
    read = f"{times} times" if share >= 1 else f"{100 * share:.2g} % of"
    weighed = "" if len(teachers) < 2 else "; teachers are weighed alike: not all were timed"
    if timed and weighed:
        weighed = "; teachers are weighed by the time measured here"
    longer = f" Runs that read all of it once: after {whole_runs:,}." if share < 1 else ""
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
    """Return ``train`` with about as many steps as it will have."""
    assert corpus.sequences is not None
    sequences = max(1.0, corpus.sequences * (1 - train.held_out))
    each = (corpus.tokens or corpus.sequences) / max(corpus.sequences, 1)
    replayed = 0.0 if train.replay is None else train.replay.fraction
    return train.of_steps(steps_of(train, sequences, each, replayed))


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
    naming = [term for term in methods if teacher in strings_in(term.model_extra)]
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
        named = known & set(strings_in(term.model_extra))
        itself = term.method in METHOD_OF_TASK.values() and work.task == "masked_lm"
        if work.name in named or (itself and not named):
            found.append(term)
    return found
