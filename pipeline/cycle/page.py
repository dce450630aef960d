"""The report of a cycle: its scores, the differences between arms, and its students as runs."""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.storage.atomic import write_text
from rekindle.pipeline.compare.page import cache_and_cost, comparison_html, comparison_page
from rekindle.pipeline.compare.runs import Comparison, by_corpus, compare_runs, is_cycle
from rekindle.pipeline.compare.scores import heads_of
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.finetuned import EXPERT, LONGER, folder_of, read_arm
from rekindle.pipeline.cycle.inputs import TASKS_FOLDER
from rekindle.pipeline.cycle.jobs import start_folder
from rekindle.pipeline.cycle.notes import UNFINISHED, UNHELPFUL, UNLEARNED, is_gain
from rekindle.pipeline.cycle.results import read_results
from rekindle.pipeline.cycle.run_files import CACHE_FILE, of_text
from rekindle.pipeline.cycle.scores import CycleResults, TaskFacts
from rekindle.pipeline.cycle.search import DRAWS_FOLDER, FIRST_DRAW
from rekindle.pipeline.cycle.students import student_of, students_of
from rekindle.pipeline.cycle.tables import (
    arm_descriptions,
    as_text,
    own_tables,
    primary_tables,
    secondary,
)
from rekindle.pipeline.cycle.verdict import facts_of_results
from rekindle.pipeline.report.page import (
    Block,
    Commands,
    Facts,
    Figures,
    Note,
    Page,
    Section,
    as_html,
)
from rekindle.pipeline.report.scores import INTERVAL, TaskScores, difference_picture, scores_section
from rekindle.pipeline.report.table import stack_column
from rekindle.pipeline.report.text import terminal_width, wrapped
from rekindle.train.finetune.config import FinetuneConfig

TITLE = "Knowledge rekindle: experts, and students that they guided"
Used = Mapping[tuple[str, str], Mapping[str, object]]  # settings of fine-tuning, by arm and task
_SHOWN_FIRST = (
    UNFINISHED,
    UNLEARNED,
    UNHELPFUL,
)  # beginnings of the notes shown above all others


def report_html(directories: Sequence[Path], comparison: Comparison) -> str:
    """Return the page of ``pipeline compare``; the page of a cycle if only that is given."""
    cycle = directories[0] if len(directories) == 1 and is_cycle(directories[0]) else None
    if cycle is None:
        return comparison_html(comparison)
    cache, cost = cache_and_cost(comparison)
    return cycle_html(cycle, [comparison], replace(read_results(cycle), cache=cache, cost=cost))


def compare_cycle(
    directories: Sequence[Path],
    out: Path | None,
    as_json: bool,
    named: Callable[[str], str] = str,
) -> str | None:
    """Return the output of ``pipeline compare`` for a single cycle of several draws or texts.

    Its students have different corpora, so only their scores can be compared. ``out`` receives the
    page, made from the text by ``named``. None for anything else.
    """
    home = directories[0]
    if len(directories) > 1 or not is_cycle(home):
        return None
    has_draws = (home / DRAWS_FOLDER).is_dir()
    groups = [] if has_draws else by_corpus([home])
    if len(groups) < 2 and not has_draws:
        return None
    results = read_results(home)
    if out is not None:
        write_text(out, named(cycle_html(home, [*map(compare_runs, groups)], results)))
    return json.dumps(results.as_dict()) if as_json else printed(home, results)


def check_one_corpus(directories: Sequence[Path], options: Sequence[tuple[str, str]]) -> None:
    """Raise InputError if heads are to be scored (``options``, each with its value) for a single
    cycle of several draws or texts, because its students have several corpora. The message says
    what to type for each.
    """
    from rekindle.pipeline.compare.heads import head_and_place  # imports torch

    home = directories[0]
    if len(directories) > 1 or not is_cycle(home):
        return
    draws = sorted((home / DRAWS_FOLDER).glob("*/"), key=lambda folder: folder.name.zfill(9))
    folders = [one for one in draws or [home] if any(one.glob("students/*/run.json"))]
    groups = [(folder, by_corpus([folder])) for folder in folders]
    if not draws and sum(len(corpora) for _, corpora in groups) < 2:
        return
    lines = []
    for folder, corpora in groups:
        for runs in corpora:
            heads = {head for run in runs for head in heads_of(run)}
            usable = [
                (name, value)
                for name, value in options
                if name not in ("--test", "--expert") or head_and_place(value)[0] in ("", *heads)
            ]
            if any(name == "--test" for name, _ in usable):
                paths = [
                    shown_path(p.absolute()) for p in ([folder] if len(corpora) == 1 else runs)
                ]
                lines.append(shlex.join(["pipeline", "compare", *paths, *chain(*usable)]))
    kind = "of several draws of the labels" if draws else "whose tasks have texts of their own"
    advice = "no student of it has such a head yet"
    if lines:
        advice = f"score each by itself: {'; '.join(f'`{line}`' for line in lines)}"
    raise InputError(
        f"{home} is a cycle {kind}: its students read caches of different corpora, but --test "
        f"compares runs of one corpus; {advice}"
    )


def verdict_above(directories: Sequence[Path]) -> str:
    """Return the verdict that `pipeline compare` prints first for a single cycle; else ""."""
    if len(directories) != 1 or not is_cycle(directories[0]):
        return ""
    verdict = _sentence(read_results(directories[0]).verdict)
    return "\n".join([*wrapped(verdict, terminal_width()), "", ""])


def cycle_html(home: Path, comparisons: Sequence[Comparison], results: CycleResults) -> str:
    """Return the whole page of the cycle in ``home``. ``comparisons`` cover the students on each
    text; none if there are no students, or if the draws of the labels have their own pages.
    """
    scores = cycle_section(results)
    about = results.settings.get("settings", {}).get("about") or (
        "Experts are fine-tuned from one model and run once over unlabelled text; students start "
        "from that model, are guided on that text, and are fine-tuned again with the same budget."
    )
    lead = f"{about} {counted(len(results.tasks), 'task')}, {counted(len(results.arms), 'arm')}"
    short = Section("In short", [Facts([*facts_of_results(results)])])
    sections = [*primary_section(results), short, scores]
    pages = []
    for comparison in comparisons:
        # A student that is the only one of its arm has that arm's line in all pictures.
        names = [run.name for run in comparison.runs]
        page = comparison_page(comparison, scores, list(dict.fromkeys([*results.arms, *names])))
        # The cycle's topic comes first, how the students were trained comes last.
        suffix = f" on the text of {_text_of(comparison)}" if len(comparisons) > 1 else ""
        others = [one for one in page.sections if one is not scores]
        sections += [replace(section, title=f"{section.title}{suffix}") for section in others]
        pages.append(page)
    lead += f"; {pages[0].lead}" if len(pages) == 1 else "."
    sections += _run_sections(home, results)
    return as_html(Page(TITLE, lead, sections, _sentence(results.verdict)))


def _text_of(comparison: Comparison) -> str:
    """Return the task whose text these students have read, from the name of the cache."""
    return Path(comparison.folders[0].cache.get("path", "")).name


def primary_section(results: CycleResults) -> Iterator[Section]:
    """Yield the comparison named before anything ran, if there is one."""
    if (primary := results.primary) is None:
        return
    blocks: list[Block] = [stack_column(table, INTERVAL) for table in primary_tables(results)]
    if ones := primary.differences:
        title = f"{primary.arm}: difference on the primary comparison"
        figure = difference_picture(title, ones, [f"to {one.against}" for one in ones])
        blocks.append(Figures([figure], small=True))
    yield Section("Primary comparison", blocks)


def cycle_section(results: CycleResults) -> Section:
    """Return scores on test by arm and task, differences, and the notes."""
    first = [note for note in results.notes if note.startswith(_SHOWN_FIRST)]
    tasks = [_task_scores(results, task) for task in results.tasks]
    best = {one.title: arm for one in tasks if (arm := _best_arm(results, one)) is not None}
    warnings = [*map(_sentence, first)]
    wording = (results.unit, secondary(results))
    pictured = results.differences
    # a picture of every other comparison would fill a page
    if results.primary is not None:
        pictured = [one for one in pictured if one.task == results.judged_on]
    section = scores_section(
        results.arms, tasks, results.differences, warnings, best, *wording, pictured=pictured
    )
    arms = Facts(arm_descriptions(results), quiet=True)
    notes = [Note(_sentence(note)) for note in results.notes if note not in first]
    title = f"{section.title} (secondary)" if results.primary is not None else section.title
    return Section(title, [arms, *section.blocks, *notes, *own_tables(results)])


def _best_arm(results: CycleResults, task: TaskScores) -> str | None:
    """Return the arm with the highest mean, if it beats the base by more than chance."""
    base = (task.task, results.base)
    differences = [one for one in results.differences if (one.task, one.against) == base]
    best = max(differences, key=lambda one: one.mean, default=None)
    return best.arm if best is not None and is_gain(best) else None


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}."


def _task_scores(results: CycleResults, task: TaskFacts) -> TaskScores:
    scores = {arm: one.scores for (arm, name), one in results.main.items() if name == task.name}
    sizes = f"{counted(task.train, 'example')} to train on, {task.test:,} to test"
    about = f"{task.about} {sizes}" if task.about else ""
    return TaskScores(task.name, task.metric, "test", scores, task.chance, about)


# --- what was run ---------------------------------------------------------------------------------


def shown_path(path: str | Path) -> str:
    """Return a path as one would type it in the current directory."""
    here = Path.cwd()
    inside = Path(path).is_relative_to(here)
    return str(Path(path).relative_to(here) if inside else path)


def _run_sections(home: Path, results: CycleResults) -> list[Section]:
    """Return what was run, and the commands that repeat each kind of stage."""
    try:
        config = parse_settings(CycleConfig, results.settings.get("settings"), "cycle.json")
    except InputError:  # of another version
        return []
    if config.label_draws > 1:
        home, config = home / DRAWS_FOLDER / str(FIRST_DRAW), config.of_draw(FIRST_DRAW)
    used = settings_used(home, config)
    facts, commands = facts_of(config, used), commands_of(home.absolute(), config, used)
    return [Section("What was run", [Facts(facts)]), Section("By hand", [Commands(commands)])]


def settings_used(home: Path, config: CycleConfig) -> Used:
    """Return the recorded settings with which every arm was fine-tuned on every task; without a
    record, the planned ones, unless a search still has to choose them.
    """
    points = config.search_points()
    used: dict[tuple[str, str], Mapping[str, object]] = {}
    for task in config.tasks:
        for arm in config.arms:
            result = read_arm(home, folder_of(arm, task.name), arm, task.name, config.students)
            if result is not None:
                used[arm, task.name] = result.config
            elif len(points) == 1:
                planned = config.finetune_of(task, points[0], arm)
                used[arm, task.name] = planned.model_dump(mode="json")
    return used


def facts_of(config: CycleConfig, used: Used) -> list[tuple[str, str]]:
    """Return text, start model and budgets, as pairs of label and value."""
    train, expert_model = config.train, config.experts.model
    sources = [one for text in config.text_names for one in config.corpus_of(text).places]
    more = f" (of experts {config.expert_seeds})" * (config.expert_seeds != config.seeds)
    teachers = "the experts that teach are the best on dev"
    if config.all_teach:
        teachers = "all seeds of an expert teach together"
    return [
        ("text", ", ".join(map(shown_path, sources))),
        ("start model", shown_path(config.student.model)),
        *(
            [("model of the experts", shown_path(str(expert_model)))]
            if config.has_other_experts
            else []
        ),
        (
            "students",
            f"{train.length} of {counted(train.batch_sequences, 'sequence')}, all "
            f"in the same order of the same masks; learning rate {train.learning_rate:g}",
        ),
        (
            "fine-tuning",
            f"{'; '.join(_budget(config, used))}; seeds: {config.seeds}{more}; {teachers}",
        ),
    ]


def _budget(config: CycleConfig, used: Used) -> Iterator[str]:
    """Yield epochs, learning rate and other searched settings, with their tasks and arms if they
    differ.
    """
    for key in dict.fromkeys(("epochs", "learning_rate", *config.search)):
        cells: dict[object, list[tuple[str, str]]] = {}
        for (arm, task), settings in used.items():
            if key != "epochs" or arm != LONGER:  # a note says that it has twice as many
                cells.setdefault(settings.get(key), []).append((arm, task))
        name, values = key.replace("_", " "), [_value(one) for one in cells]
        if len(values) > 1:
            values = [
                f"{value} ({_name_cells(ones, used)})"
                for value, ones in zip(values, cells.values(), strict=True)
            ]
        chosen = ", chosen on dev" if len(config.search.get(key, ())) > 1 else ""
        yield f"{name} {', '.join(values)}{chosen}" if values else f"{name} not chosen yet"


def _value(one: object) -> str:
    return f"{one:g}" if isinstance(one, float) else str(one)


def _name_cells(cells: Sequence[tuple[str, str]], used: Used) -> str:
    """Return the tasks, with the arms unless these are all."""
    names = []
    for task in dict.fromkeys(task for _, task in cells):
        arms = [arm for arm, name in cells if name == task]
        others = {arm for arm, name in used if name == task} - {*arms, LONGER}
        names.append(f"{', '.join(arms)} on {task}" if others else task)
    return "; ".join(names)


def commands_of(home: Path, config: CycleConfig, used: Used) -> list[tuple[str, str]]:
    """Return commands for every kind of stage, each into its own directory, as pairs of purpose and
    line.
    """
    root, task, text = shown_path(home), config.tasks[0], config.text_names[0]
    config = config.with_cache_in(home)
    stage = of_text(CACHE_FILE, text)
    files = f"{root}/{TASKS_FOLDER}/{task.name}"
    metric = [f"--metric {task.metric}"] if task.metric else []

    def finetune(arm: str, start: str, name: str) -> str:
        splits = (f"--{split} {files}/{split}.jsonl" for split in ("train", "dev"))
        settings = used.get((arm, task.name)) or config.finetune_of(task, {}, arm).model_dump(
            mode="json"
        )
        seeds = config.expert_seeds if arm == EXPERT else config.seeds
        options = " ".join([*splits, f"--seeds {seeds}", *metric, *_changed(settings)])
        return f"pipeline finetune {root}/{start} {options} --out {root}/by-hand/{name}"

    evaluate = f"pipeline evaluate {root}/by-hand/{{}} --test {files}/test.jsonl"
    commands = [
        (f"The expert on {task.name}", finetune(EXPERT, start_folder(config, EXPERT), task.name)),
        ("Its score on test", evaluate.format(task.name)),
        ("The experts into the cache (stage 1)", f"pipeline cache-teachers {root}/{stage}"),
        ("What is in it", f"pipeline inspect {shown_path(config.cache_of(text).path)}"),
    ]
    for student in list(students_of(config))[:1]:
        run, name = f"students/{student}", f"{student}-{task.name}"
        arm = next(arm for arm in config.arms if student_of(config, arm, task.name) == student)
        line = f"pipeline train-student {root}/{run}.yaml --out {root}/by-hand/{student}"
        commands += [
            (f"The student {student} from it (stage 2)", line),
            ("The student fine-tuned on the task", finetune(arm, run, name)),
            ("Its score on test", evaluate.format(name)),
        ]
    return commands


def _changed(settings: Mapping[str, object]) -> Iterator[str]:
    """Yield the options that give `pipeline finetune` these settings."""
    defaults = FinetuneConfig().model_dump(mode="json")
    for key, value in settings.items():
        if key in defaults and value != defaults[key]:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"--set {shlex.quote(f'{key}={text}')}"


def _summary(results: CycleResults) -> Iterator[str]:
    """Yield the verdict, and the inputs and experts behind it."""
    yield _sentence(results.verdict)
    for label, words in facts_of_results(results):
        yield f"{label}: {words}"


def printed(home: Path, results: CycleResults) -> str:
    """Return the command's output: the verdict, tables and notes, and the paths of everything."""
    root, task = shown_path(home.absolute()), results.tasks[0].name
    first = (results.file.get("tasks") or [{}])[0]
    stage = of_text(CACHE_FILE, task if first.get("corpus") else "")
    paths = {"report": "report.html", "results": "results.json"}
    if results.draws is None:
        paths["experts"] = f"{folder_of('expert', task)}, …"
        paths["students"] = "students/"
        paths["configuration"] = f"run.yaml; of each stage: {stage}, students/*.yaml"
    else:
        paths["draws"] = f"{DRAWS_FOLDER}/{FIRST_DRAW}/, …, each a cycle with its own report"
        paths["configuration"] = "run.yaml"
    path_lines = (f"{label + ':':15}{root}/{path}" for label, path in paths.items())
    width = terminal_width()
    summary = [line for text in _summary(results) for line in wrapped(text, width)]
    return "\n".join([*summary, "", as_text(results), "", *path_lines])
