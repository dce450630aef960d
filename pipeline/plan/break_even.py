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
        reason = "Break-even: the student's objective uses none of these teachers."
        return BreakEven(None, unused, reason)
    rates = {w.name: w.seconds_per_token for w in teachers if w.name in live if w.seconds_per_token}
    is_timed = len(rates) == len(live)
    if not is_timed:
        rates = dict.fromkeys(live, 1.0)
    cache_cost, run_cost = (sum(passes[n] * rates[n] for n in live) for passes in (cached, live))
    runs = math.ceil(cache_cost / run_cost)
    runs_by_teacher = {name: math.ceil(cached[name] / live[name]) for name in live}
    sentence = (
        f"Break-even: the cache pays for itself after {counted(runs, 'student run')} like this "
        f"one. It takes {round(sum(cached.values())):,} teacher forward passes, each of one "
        f"sequence; a run with live teachers takes {round(sum(live.values())):,}."
    )
    full_pass_cost = sum(
        corpus.sequences * rates[w.name] * (w.share or 1.0) for w in teachers if w.name in live
    )
    runs_of_full_passes = math.ceil(cache_cost / full_pass_cost)
    assumes = _describe_assumed(train, corpus, [*live], is_timed, runs_of_full_passes)
    return BreakEven(runs, unused | runs_by_teacher, sentence, assumes)


def _describe_assumed(
    train: TrainConfig,
    corpus: CorpusPlan,
    teachers: Sequence[str],
    is_timed: bool,
    runs_of_full_passes: int,
) -> str:
    """Describe the assumed runs without a cache. ``train`` is in steps; ``runs_of_full_passes`` is
    the break-even of runs that read the whole corpus once, mentioned if the configured ones do not.
    """
    assert corpus.sequences is not None
    share = train.steps * train.batch_sequences / corpus.sequences
    times = f"{share:,.0f}" if share >= 10 else f"{share:.2g}"
    share_text = f"{times} times" if share >= 1 else f"{100 * share:.2g} % of"
    weighing_note = "" if len(teachers) < 2 else "; teachers are weighed alike: not all were timed"
    if is_timed and weighing_note:
        weighing_note = "; teachers are weighed by the time measured here"
    full_pass_note = (
        (f" Runs that read the whole corpus once break even after {runs_of_full_passes:,}.")
        if share < 1
        else ""
    )
    length_key = next((name for name in LENGTHS[1:] if getattr(train, name)), LENGTHS[0])
    steps = counted(train.steps, "step")
    length = steps if length_key == LENGTHS[0] else f"{train.length} = {steps}"
    is_scaled = corpus.texts is not None and length_key != "epochs"
    scale_note = f"; train.{length_key} is the same at any size of the corpus" if is_scaled else ""
    return (
        f"It assumes runs of {length} with {train.batch_sequences:,} "
        f"sequences each (train.{length_key}, batch_sequences: {share_text} the corpus"
        f"{scale_note}), with {', '.join(teachers)} run beside the student at each step that "
        f"learns from {'it' if len(teachers) == 1 else 'them'}; reading a cache costs nothing"
        f"{weighing_note}.{full_pass_note}"
    )


def _in_steps(train: TrainConfig, corpus: CorpusPlan) -> TrainConfig:
    """Return ``train`` with its length in steps, estimated from the corpus."""
    assert corpus.sequences is not None
    sequences = max(1.0, corpus.sequences * (1 - train.held_out))
    tokens_per_sequence = (corpus.tokens or corpus.sequences) / max(corpus.sequences, 1)
    replayed = 0.0 if train.replay is None else train.replay.fraction
    return train.of_steps(steps_of(train, sequences, tokens_per_sequence, replayed))


def active_steps(train: TrainConfig, teacher: str, methods: Sequence[MethodTerm] = ()) -> int:
    """Return the number of steps at which the objective reads a teacher's targets. ``methods`` are
    the method terms that read them.
    """
    weights = [term.weight for term in train.objective.distill if teacher in term.teachers]
    for term in methods:
        settings = {"method": term.method, "weight": (term.model_extra or {}).get("weight", 1.0)}
        weights.append(parse_settings(MethodSettings, settings, "train.objective.methods").weight)
    steps = range(train.steps)
    return sum(any(weight_at(w, step, train.steps) > 0 for w in weights) for step in steps)


def taught_sequences(train: TrainConfig, teacher: str) -> int:
    """Return the number of sequences a live ``teacher`` would run on beside a run trained like
    this.

    Counts each replica, and only the steps at which the objective reads this teacher. Methods that
    name no teacher are assumed to read the teachers that no other term names.
    """
    methods = train.objective.methods
    naming_terms = [term for term in methods if teacher in strings_in(term.model_extra)]
    is_distilled = any(teacher in term.teachers for term in train.objective.distill)
    orders_text = train.curriculum is not None and train.curriculum.teacher == teacher
    reading_terms = naming_terms if naming_terms or is_distilled or orders_text else list(methods)
    return active_steps(train, teacher, reading_terms) * train.batch_sequences


def _methods_reading(config: RunConfig, work: TeacherWork) -> list[MethodTerm]:
    """Return the methods that name the teacher in their settings, as far as can be told without
    loading them.

    A method that is the student's own task uses the masked LM if it names no teacher.
    """
    assert config.student is not None
    teacher_names = {teacher.name for teacher in config.teachers}
    terms = []
    for term in config.train.objective.methods_for(config.student.task):
        named_teachers = teacher_names & set(strings_in(term.model_extra))
        uses_masked_lm = term.method in METHOD_OF_TASK.values() and work.task == "masked_lm"
        if work.name in named_teachers or (uses_masked_lm and not named_teachers):
            terms.append(term)
    return terms
