"""Compare runs of ``pipeline train-student``: what sets them apart, and how well they did.

Reads what runs leave in their directories, finished or not; opens no cache and no model.
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
from rekindle.train.measures import MEASURE, UNSEEN, measure_of, true_names
from rekindle.train.method_names import is_better_upwards
from rekindle.train.record.run_folder import differences, read_record, reading_record
from rekindle.train.record.run_log import METRICS_FILE, read_metrics
from rekindle.train.record.summary import read_summary
from rekindle.train.step_config import LENGTH, recorded_steps

Facts = dict[str, Any]  # a JSON object as a run wrote it
LOSS = "loss"
OWN_NOTE = (
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
    measure: int = MEASURE  # the rule by which its held-out values are measured

    @property
    def taught_by(self) -> list[str]:
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
    found = _find(directories)
    corpus = _one_corpus(found)
    names = shortest_tails([one.directory.resolve().parts for one in found], "/")
    differing = differences([one.settings for one in found], items=True) | _read_otherwise(found)
    compared = _compared(found)
    runs = [
        _read_run(one, name, {key: values[number] for key, values in differing.items()}, compared)
        for number, (one, name) in enumerate(zip(found, names, strict=True))
    ]
    positions, teachers = list(_position_notes(found, differing)), list(_teacher_notes(found))
    otherwise = _measured_otherwise(found)
    measured = [MEASURED_NOTE.format(names=", ".join(otherwise))] if otherwise else []
    own = [] if compared == LOSS or not _have(found, LOSS) else [own_note(compared)]
    curves = [] if positions or compared is None else [run.curve for run in runs]
    by_domain = [
        (run.name, run.evaluation, one.settings["train"].get("domains") or [])
        for run, one in zip(runs, found, strict=True)
    ]
    where = {name: one.directory for name, one in zip(names, found, strict=True)}
    return Comparison(
        corpus,
        runs,
        [one for task in read_scores(where) if (one := standing_of(task)) is not None],
        _best(runs, not positions + teachers, otherwise, own != []),
        positions + teachers + measured + own,
        compared,
        match_steps(curves),
        match_cost(curves),
        matrix_of(by_domain),
        found,
    )


def _find(directories: Sequence[Path]) -> list[RunFolder]:
    found: dict[Path, RunFolder] = {}
    strangers = []
    for directory in directories:
        begun = {one.directory.resolve(): one for one in _runs_in(directory) if one is not None}
        strangers += [] if begun else [str(directory)]
        found |= begun
    if strangers:
        raise InputError(
            f"no run and no sweep of `pipeline train-student`: {', '.join(strangers)} (there is no "
            "run.json and no sweep.json). Give directories that its --out named"
        )
    return list(found.values())


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
        whole = with_defaults(RunConfig, recorded)  # an older run lacks keys of this version
        settings = {section: dict(whole[section]) for section in SECTIONS}
        cache = {"corpus": about["cache"]["corpus"], "teachers": {}} | about["cache"]
        for name, seconds in (cache.get("teacher_seconds") or {}).items():
            if type(seconds) not in (int, float, NoneType):
                raise TypeError(f"cache.teacher_seconds.{name} is {seconds!r:.80}, no number")
        measure = measure_of(about)
        if LENGTH in about:  # given in epochs or tokens: the number of steps found at the start
            length = {"steps": recorded_steps(about), "epochs": None, "tokens": None}
            settings["train"] |= length
    records = [
        true_names(one, measure) if one["kind"] == "evaluate" else one
        for one in read_metrics(directory)
    ]
    return RunFolder(directory, settings, cache, records, measure)


def by_corpus(directories: Sequence[Path]) -> list[list[Path]]:
    """Group the directories for ``compare_runs``: runs of one corpus together, in their order."""
    return list(_groups(_find(directories)).values())


def _groups(found: Sequence[RunFolder]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for one in found:
        groups.setdefault(one.cache["corpus"], []).append(one.directory)
    return groups


def _one_corpus(found: Sequence[RunFolder]) -> str:
    groups = _groups(found)
    if len(groups) > 1:
        told = "; ".join(
            f"{', '.join(map(str, folders))} (corpus {corpus[:12]})"
            for corpus, folders in groups.items()
        )
        raise InputError(
            f"these runs are from caches of different corpora, so their values {UNSEEN} refer to "
            f"different texts: {told}. Compare runs of one corpus at a time"
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
        spent = sum(r["tokens"] / s for r in steps if (s := r["tokens_per_second"]) > 0)
    return RunFacts(
        name=name,
        directory=str(one.directory),
        finished=bool(summary),
        steps=summary.get("steps") or (steps[-1]["step"] if steps else 0),
        planned_steps=one.settings["train"]["steps"],
        seconds=summary.get("seconds"),
        tokens_per_second=sum(r["tokens"] for r in steps) / spent if spent else None,
        data_wait=steps[-1].get("data_wait") if steps else None,
        evaluation=true_names(summary.get("evaluation", {}), one.measure) if summary else last,
        coverage=summary.get("coverage", {}),
        scores=mean_scores(one.directory),
        settings=settings,
        heads=heads_of(one.directory),
        curve=_curve(one, steps, evaluations, compared),
    )


def _compared(found: Sequence[RunFolder]) -> str | None:
    """Return the held-out value that means the same in all evaluated runs."""
    each = [_evaluated(one) for one in found]
    shared = set.intersection(*[names for names in each if names] or [set()])
    objectives = differences([one.settings["train"]["objective"] for one in found], items=True)
    known = ([] if objectives else [LOSS]) + ["ce", *sorted(shared - {LOSS})]
    return next((name for name in known if name in shared and not is_better_upwards(name)), None)


def _evaluated(one: RunFolder) -> set[str]:
    """Return the names of a run's evaluated values."""
    return {name for r in one.records if r["kind"] == "evaluate" for name in r} - {"kind", "step"}


def _have(found: Sequence[RunFolder], name: str) -> bool:
    """Return whether several runs have evaluated a value."""
    return sum(name in _evaluated(one) for one in found) > 1


def own_note(compared: str | None) -> str:
    """Say that the runs' losses have different objectives, and which value can be compared."""
    return OWN_NOTE.format(instead=compared or "task scores")


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
    costs = [(one.cache.get("teacher_seconds") or {}).get(name) for name in one.taught_by]
    known = [cost for cost in costs if cost is not None]
    return Curve(sum(known, 0.0) if len(known) == len(costs) else None, points)


def _read_otherwise(found: Sequence[RunFolder]) -> dict[str, list[object]]:
    """Return what runs have read of the cache, where runs that read it differ."""
    each: dict[str, list[object]] = {"cache.replicas": [one.cache.get("replicas") for one in found]}
    kept = [one.cache.get("targets") or {} for one in found]
    for name in dict.fromkeys(name for one in kept for name in one):
        each[f"cache.targets.{name}.k"] = [one.get(name, {}).get("k") for one in kept]
    known = {key: {value for value in values if value is not None} for key, values in each.items()}
    return {key: values for key, values in each.items() if len(known[key]) > 1}


# --- comparing ------------------------------------------------------------------------------------


def _position_notes(found: Sequence[RunFolder], differing: Mapping[str, object]) -> Iterator[str]:
    """Yield reasons why held-out losses of these runs are not comparable, if any."""
    causal = {one.settings["student"].get("task") == "causal_lm" for one in found}
    keys = ["student.task"] if len(causal) > 1 else []
    below = [f"{key}." for key in differing]
    keys += [key for key in EVALUATION_KEYS if any(one.startswith(f"{key}.") for one in below)]
    if keys:
        yield f"{', '.join(keys)} differ: values {UNSEEN} are not for the same tokens"
    if len({one.cache.get("masked_view", ...) for one in found if "path" in one.cache}) > 1:
        yield f"the runs see different masks: values {UNSEEN} are not for the same tokens"


def _teacher_notes(found: Sequence[RunFolder]) -> Iterator[str]:
    """Say if one name stands for several teachers."""
    prints: dict[str, set[str]] = {}
    for one in found:
        for name, fingerprint in one.cache["teachers"].items():
            prints.setdefault(name, set()).add(str(fingerprint))
    if changed := ", ".join(name for name, known in prints.items() if len(known) > 1):
        yield f"not the same teacher in all runs: {changed}"


def _measured_otherwise(found: Sequence[RunFolder]) -> list[str]:
    """Return the teachers whose held-out values follow different rules in different runs."""
    rules: dict[str, set[object]] = {}
    for one in found:
        for name in one.cache["teachers"]:
            rules.setdefault(name, set()).add(one.cache.get("measured", {}).get(name))
    return [name for name, known in rules.items() if len(known) > 1]


def _best(
    runs: Sequence[RunFacts], evaluations: bool, otherwise: Sequence[str], own: bool
) -> dict[str, list[str]]:
    """Return, for each held-out value that several finished runs have and that differs, the runs
    with the best: the highest for agreement and for values that methods declare, else the lowest.

    Leaves out teachers that some runs measured ``otherwise``, and losses that are each run's
    ``own``.
    """
    finished = [run for run in runs if run.finished]
    left_out = set() if evaluations else {name for run in runs for name in run.evaluation}
    left_out |= {f"{what}/{name}" for name in otherwise for what in ("kl", "agreement")}
    left_out |= {LOSS} if own else set()
    best = {}
    for name in dict.fromkeys(name for run in finished for name in run.evaluation):
        values = [run.evaluation.get(name) for run in finished]
        rows = best_rows(values, max if is_better_upwards(name) else min)
        if rows and name not in left_out:
            best[name] = [finished[row].name for row in sorted(rows)]
    return best
