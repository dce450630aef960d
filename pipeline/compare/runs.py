"""Compare runs of ``pipeline train-student``: how they differ, and how well they did.

Reads the files in the runs' directories, finished or not; opens no cache and no model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from rekindle.data.errors import InputError
from rekindle.data.former import with_defaults
from rekindle.pipeline.compare.domains import DomainMatrix, matrix_of
from rekindle.pipeline.compare.matching import Curve, Match, Point, match_cost, match_steps
from rekindle.pipeline.compare.scores import heads_of, mean_scores, read_scores
from rekindle.pipeline.compare.standing import Standing, standing_of
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plain_values import for_json
from rekindle.pipeline.report.table import best_rows
from rekindle.pipeline.several_runs import SECTIONS, STAGES_FILE, SWEEP_FILE, read_runs
from rekindle.pipeline.sweep.grid import shortest_tails
from rekindle.train.measures import EVALUATION_VERSION, UNSEEN, evaluation_version_of, true_names
from rekindle.train.method_names import is_better_upwards
from rekindle.train.record.run_folder import differences, read_record, reading_record
from rekindle.train.record.run_log import METRICS_FILE, read_metrics
from rekindle.train.record.summary import read_summary
from rekindle.train.step_config import LENGTH_SECTION, recorded_steps

Facts = dict[str, Any]  # a JSON object as a run wrote it
LOSS = "loss"
OBJECTIVES_NOTE = (
    "loss is the objective of each run, and these objectives differ: not ranked; {instead} can "
    "be compared"
)
MEASURED_NOTE = (
    "kl/… and agreement/… of {names} were measured differently in runs begun by older versions: "
    "not ranked"
)
CYCLE_FILE = "cycle.json"  # marks the directory of a cycle, and identifies the cycle
CYCLE_WRITER = "rekindle cycle"
LEAVE_OUT = "leave it out, or remove it"
# If these differ, held-out values refer to other positions, or to another loss.
EVALUATION_KEYS = ("train.held_out", "train.evaluate_sequences", "train.domains")


@dataclass(frozen=True)
class RunFacts:
    """One run. Times are in seconds; ``scores`` are the means over seeds on dev that ``pipeline
    finetune`` left below its directory. ``heads``: the task heads of its student.
    """

    name: str
    directory: str
    finished: bool
    steps: int  # done so far
    planned_steps: int | None  # None: not begun, and given in epochs or tokens
    seconds: float | None = None
    tokens_per_second: float | None = None  # mean over the steps, without evaluations
    data_wait: float | None = None  # share of the time that steps waited for data
    evaluation: dict[str, float] = field(default_factory=dict)
    coverage: dict[str, int] = field(default_factory=dict)  # as counted by train/record/coverage.py
    scores: dict[str, float] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)  # only those that differ
    heads: list[str] = field(default_factory=list)
    curve: Curve = field(default_factory=Curve)  # the compared value over steps and seconds


@dataclass(frozen=True)
class RunFolder:
    """A run's directory and content: its student and train sections, the cache it reads, and the
    records of its steps. Held-out values have today's names (``train.measures``).
    """

    directory: Path
    settings: dict[str, Facts]
    cache: Facts
    records: list[Facts] = field(default_factory=list)
    evaluation_version: int = EVALUATION_VERSION  # how its held-out values are measured

    @property
    def teachers(self) -> list[str]:
        """The teachers whose targets the run used and pays for: not those of weight 0."""
        recorded = self.cache.get("teacher_seconds")
        return list(self.cache["teachers"] if recorded is None else recorded)


@dataclass(frozen=True)
class Comparison:
    """Runs from one corpus. ``standings``: the best run at each task, and whether that is chance.
    ``best``: for each held-out value, the finished runs with the best value (one run each, so
    chance is unknown).

    ``notes`` say what may not be compared. ``compared`` is the held-out value that means the same
    in all runs: ``loss`` if they train the same objective, else ``ce`` or another shared value,
    else None. ``matched_steps`` and ``matched_cost`` hold it in the order of ``runs``
    (``compare.matching``); both are empty if held-out values may not be compared. ``folders``: what
    the runs were read from, in order.
    """

    corpus: str
    runs: list[RunFacts]
    standings: list[Standing]
    best: dict[str, list[str]]
    notes: list[str]
    compared: str | None
    matched_steps: list[Match]
    matched_cost: list[Match]
    domains: DomainMatrix
    folders: list[RunFolder]

    def as_dict(self) -> object:
        """Return everything but the folders as JSON values; values that are not finite
        become null.
        """
        values = asdict(replace(self, folders=[], standings=[]))
        del values["folders"], values["standings"]
        return for_json(values | {"tasks": [one.as_dict() for one in self.standings]})


# --- reading --------------------------------------------------------------------------------------


def compare_runs(directories: Sequence[Path]) -> Comparison:
    """Compare the runs in ``directories``. Each directory holds a run, a sweep, a run of several
    stages, or a cycle.

    Raise InputError for other directories and for runs from different corpora; CheckpointError for
    damaged ones.
    """
    folders = _find_runs(directories)
    corpus = _common_corpus(folders)
    names = shortest_tails([one.directory.resolve().parts for one in folders], "/")
    differing = differences([one.settings for one in folders], items=True)
    differing |= _cache_differences(folders)
    compared = _comparable_value(folders)
    runs = [
        _read_run(one, name, {key: values[number] for key, values in differing.items()}, compared)
        for number, (one, name) in enumerate(zip(folders, names, strict=True))
    ]
    position_notes = list(_position_notes(folders, differing))
    teacher_notes = list(_teacher_notes(folders))
    other_notes = []
    if differently_measured := _differently_measured(folders):
        other_notes.append(MEASURED_NOTE.format(names=", ".join(differently_measured)))
    own_losses = compared != LOSS and _several_evaluated(folders, LOSS)
    if own_losses:
        other_notes.append(objectives_note(compared))
    curves = [] if position_notes or compared is None else [run.curve for run in runs]
    by_domain = [
        (run.name, run.evaluation, one.settings["train"].get("domains") or [])
        for run, one in zip(runs, folders, strict=True)
    ]
    directory_of = {name: one.directory for name, one in zip(names, folders, strict=True)}
    return Comparison(
        corpus,
        runs,
        [one for task in read_scores(directory_of) if (one := standing_of(task)) is not None],
        _best(runs, not position_notes + teacher_notes, differently_measured, own_losses),
        position_notes + teacher_notes + other_notes,
        compared,
        match_steps(curves),
        match_cost(curves),
        matrix_of(by_domain),
        folders,
    )


def _find_runs(directories: Sequence[Path]) -> list[RunFolder]:
    folders: dict[Path, RunFolder] = {}
    without_runs = []
    for directory in directories:
        runs = {one.directory.resolve(): one for one in _runs_in(directory) if one is not None}
        without_runs += [] if runs else [str(directory)]
        folders |= runs
    if without_runs:
        raise InputError(
            f"no run and no sweep of `pipeline train-student`: {', '.join(without_runs)} (there is "
            "no run.json and no sweep.json). Give directories that its --out named"
        )
    return list(folders.values())


def _runs_in(directory: Path) -> list[RunFolder | None]:
    for file in (SWEEP_FILE, STAGES_FILE):
        if (recorded := read_runs(directory, file)) is not None:
            return [_open_run(directory / name, about) for name, about in recorded.items()]
    if not is_cycle(directory):
        return [_open_run(directory)]
    folders = [*directory.glob("students/*"), *directory.glob("draws/*/students/*")]
    return [_open_run(folder) for folder in sorted(folders)]


def is_cycle(directory: Path) -> bool:
    """Return whether ``pipeline rekindle`` works, or has worked, in ``directory``."""
    path = directory / CYCLE_FILE
    return path.is_file() and (read_record(path, LEAVE_OUT) or {}).get("written_by") == CYCLE_WRITER


def _open_run(directory: Path, planned: Mapping[str, Any] = {}) -> RunFolder | None:
    """Read a run; for a student that a sweep has not begun, return what is ``planned``."""
    about = read_record(directory / "run.json", LEAVE_OUT)
    if about is None and "corpus" in planned:
        about = {**planned, "cache": {"corpus": planned["corpus"]}}
    if about is None:
        return None
    with reading_record(directory / "run.json"):
        recorded = {section: dict(about[section]) for section in SECTIONS}
        complete = with_defaults(RunConfig, recorded)  # an older run lacks keys of this version
        settings = {section: dict(complete[section]) for section in SECTIONS}
        cache = {"corpus": about["cache"]["corpus"], "teachers": {}} | about["cache"]
        for name, seconds in (cache.get("teacher_seconds") or {}).items():
            if type(seconds) not in (int, float, NoneType):
                raise TypeError(f"cache.teacher_seconds.{name} is {seconds!r:.80}, no number")
        evaluation_version = evaluation_version_of(about)
        # A length given in epochs or tokens: the number of steps found at the start.
        if LENGTH_SECTION in about:
            length = {"steps": recorded_steps(about), "epochs": None, "tokens": None}
            settings["train"] |= length
    records = [
        true_names(one, evaluation_version) if one["kind"] == "evaluate" else one
        for one in read_metrics(directory)
    ]
    return RunFolder(directory, settings, cache, records, evaluation_version)


def by_corpus(directories: Sequence[Path]) -> list[list[Path]]:
    """Group the directories for ``compare_runs``: runs of one corpus together, in their order."""
    return list(_groups(_find_runs(directories)).values())


def _groups(runs: Sequence[RunFolder]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for one in runs:
        groups.setdefault(one.cache["corpus"], []).append(one.directory)
    return groups


def _common_corpus(runs: Sequence[RunFolder]) -> str:
    groups = _groups(runs)
    if len(groups) > 1:
        listed = "; ".join(
            f"{', '.join(map(str, folders))} (corpus {corpus[:12]})"
            for corpus, folders in groups.items()
        )
        raise InputError(
            f"these runs are from caches of different corpora, so their values {UNSEEN} refer to "
            f"different texts: {listed}. Compare runs of one corpus at a time"
        )
    return next(iter(groups))


def _read_run(
    one: RunFolder, name: str, settings: dict[str, object], compared: str | None
) -> RunFacts:
    summary = read_summary(one.directory, LEAVE_OUT)
    steps = [record for record in one.records if record["kind"] == "train"]
    evaluations = [record for record in one.records if record["kind"] == "evaluate"]
    last = {k: v for k, v in (evaluations or [{}])[-1].items() if k not in ("kind", "step")}
    with reading_record(one.directory / METRICS_FILE):
        step_seconds = sum(r["tokens"] / s for r in steps if (s := r["tokens_per_second"]) > 0)
    return RunFacts(
        name=name,
        directory=str(one.directory),
        finished=bool(summary),
        steps=summary.get("steps") or (steps[-1]["step"] if steps else 0),
        planned_steps=one.settings["train"]["steps"],
        seconds=summary.get("seconds"),
        tokens_per_second=sum(r["tokens"] for r in steps) / step_seconds if step_seconds else None,
        data_wait=steps[-1].get("data_wait") if steps else None,
        evaluation=true_names(summary.get("evaluation", {}), one.evaluation_version)
        if summary
        else last,
        coverage=summary.get("coverage", {}),
        scores=mean_scores(one.directory),
        settings=settings,
        heads=heads_of(one.directory),
        curve=_curve(one, steps, evaluations, compared),
    )


def _comparable_value(runs: Sequence[RunFolder]) -> str | None:
    """Return the held-out value that means the same in all evaluated runs."""
    by_run = [_evaluated_names(one) for one in runs]
    shared = set.intersection(*[names for names in by_run if names] or [set()])
    objectives = differences([one.settings["train"]["objective"] for one in runs], items=True)
    preferred = ([] if objectives else [LOSS]) + ["ce", *sorted(shared - {LOSS})]
    names = (name for name in preferred if name in shared and not is_better_upwards(name))
    return next(names, None)


def _evaluated_names(one: RunFolder) -> set[str]:
    """Return the names of a run's evaluated values."""
    return {name for r in one.records if r["kind"] == "evaluate" for name in r} - {"kind", "step"}


def _several_evaluated(runs: Sequence[RunFolder], name: str) -> bool:
    """Return whether several runs have evaluated a value."""
    return sum(name in _evaluated_names(one) for one in runs) > 1


def objectives_note(compared: str | None) -> str:
    """Return that the runs have different objectives, and which value can be compared instead."""
    return OBJECTIVES_NOTE.format(instead=compared or "task scores")


def _curve(
    one: RunFolder, steps: Sequence[Facts], evaluations: Sequence[Facts], compared: str | None
) -> Curve:
    """Return the compared value over steps and seconds, as far as it is recorded."""
    seconds = {record["step"]: record.get("seconds") for record in steps}
    points = [
        Point(record["step"], seconds.get(record["step"]), record[compared])
        for record in evaluations
        if compared in record
    ]
    costs = [(one.cache.get("teacher_seconds") or {}).get(name) for name in one.teachers]
    known = [cost for cost in costs if cost is not None]
    return Curve(sum(known, 0.0) if len(known) == len(costs) else None, points)


def _cache_differences(runs: Sequence[RunFolder]) -> dict[str, list[object]]:
    """Return what runs have read of the cache, where runs that read it differ."""
    replicas: list[object] = [one.cache.get("replicas") for one in runs]
    facts = {"cache.replicas": replicas}
    targets = [one.cache.get("targets") or {} for one in runs]
    for name in dict.fromkeys(name for of_run in targets for name in of_run):
        facts[f"cache.targets.{name}.k"] = [of_run.get(name, {}).get("k") for of_run in targets]
    known = {key: {value for value in values if value is not None} for key, values in facts.items()}
    return {key: values for key, values in facts.items() if len(known[key]) > 1}


# --- comparing ------------------------------------------------------------------------------------


def _position_notes(runs: Sequence[RunFolder], differing: Mapping[str, object]) -> Iterator[str]:
    """Yield reasons why held-out losses of these runs are not comparable, if any."""
    causal = {one.settings["student"].get("task") == "causal_lm" for one in runs}
    keys = ["student.task"] if len(causal) > 1 else []
    prefixes = [f"{key}." for key in differing]
    keys += [key for key in EVALUATION_KEYS if any(one.startswith(f"{key}.") for one in prefixes)]
    if keys:
        yield f"{', '.join(keys)} differ: values {UNSEEN} are not for the same tokens"
    if len({one.cache.get("masked_view", ...) for one in runs if "path" in one.cache}) > 1:
        yield f"the runs see different masks: values {UNSEEN} are not for the same tokens"


def _teacher_notes(runs: Sequence[RunFolder]) -> Iterator[str]:
    """Yield a note if one name stands for several teachers."""
    fingerprints: dict[str, set[str]] = {}
    for one in runs:
        for name, fingerprint in one.cache["teachers"].items():
            fingerprints.setdefault(name, set()).add(str(fingerprint))
    if changed := ", ".join(name for name, known in fingerprints.items() if len(known) > 1):
        yield f"not the same teacher in all runs: {changed}"


def _differently_measured(runs: Sequence[RunFolder]) -> list[str]:
    """Return the teachers whose held-out values follow different rules in different runs."""
    rules: dict[str, set[object]] = {}
    for one in runs:
        for name in one.cache["teachers"]:
            rules.setdefault(name, set()).add(one.cache.get("measured", {}).get(name))
    return [name for name, known in rules.items() if len(known) > 1]


def _best(
    runs: Sequence[RunFacts],
    comparable: bool,
    differently_measured: Sequence[str],
    own_losses: bool,
) -> dict[str, list[str]]:
    """Return, for each held-out value that several finished runs have and that differs, the runs
    with the best: the highest for agreement and for values that methods declare, else the lowest.

    Empty unless the values are ``comparable``. Teachers that are ``differently_measured`` are left
    out, and so is the loss if the runs have ``own_losses``, of different objectives.
    """
    finished = [run for run in runs if run.finished]
    left_out = set() if comparable else {name for run in runs for name in run.evaluation}
    left_out |= {
        f"{prefix}/{name}" for name in differently_measured for prefix in ("kl", "agreement")
    }
    left_out |= {LOSS} if own_losses else set()
    best = {}
    for name in dict.fromkeys(name for run in finished for name in run.evaluation):
        values = [run.evaluation.get(name) for run in finished]
        rows = best_rows(values, max if is_better_upwards(name) else min)
        if rows and name not in left_out:
            best[name] = [finished[row].name for row in sorted(rows)]
    return best
