"""The inputs of a cycle: its tasks, and the models that experts and students start from.

  OUT/tasks/TASK/{train,dev,test}.jsonl

These files fix which examples train, which select and which are scored; every arm is fine-tuned on
them. They are written once, whole or not at all.
"""

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from rekindle.data.corpus.shared_ids import describe_difference, differing_ids
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import InputError, naming
from rekindle.data.source.held_texts import normalised
from rekindle.data.storage.atomic import write_lines
from rekindle.data.text_files import FileState, state_of
from rekindle.pipeline.cycle.arms import WITH_TEACHERS
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.sections import CycleTask
from rekindle.pipeline.cycle.students import teachers_on
from rekindle.train.finetune.config import FinetuneConfig, TaskSettings
from rekindle.train.finetune.label_lists import SEVERAL
from rekindle.train.finetune.metrics import chosen_metric
from rekindle.train.finetune.task_data import TaskData, read_task
from rekindle.train.ranking.groups import count_whole_groups, shuffle_groups

TASKS_FOLDER = "tasks"
logger = logging.getLogger("rekindle")

_DEFAULT_SETTINGS = TaskSettings()
_DEV_DIVISOR = 5  # dev is at most a fifth of train


@dataclass(frozen=True)
class TaskFiles:
    """A task with the rows of its files that train, select and are scored, in whole groups."""

    task: CycleTask
    regression: bool
    metric: str
    pairs: str | None  # how pairs are made from the unlabelled text; None: single texts
    splits: dict[str, TaskData]
    rows: dict[str, np.ndarray]  # of each split, ascending
    digests: dict[str, str]  # sha256 of its source files
    held: dict[str, int]  # by split, the rows of train and dev that are also rows of test

    @property
    def chance(self) -> float | None:
        """The accuracy on test of always answering the most common class; None for other
        metrics.
        """
        if self.metric != "accuracy":
            return None
        labels = self.splits["test"].labels[self.rows["test"]]
        return float(np.bincount(labels).max() / len(labels))

    def own_settings(self, config: FinetuneConfig) -> FinetuneConfig:
        """Return ``config`` for the files written here, in which columns and rows are already
        chosen.
        """
        data = self.splits["train"]
        settings = TaskSettings(
            problem=data.problem, positive=data.positive, threshold=data.threshold
        )
        return config.model_copy(update=settings.model_dump())

    def texts_of(self, split: str) -> list[tuple[str, str | None]]:
        """Return the texts of a split's rows, each with the second one of its pair."""
        return _examples(self.splits[split], self.rows[split])

    def files_in(self, home: Path) -> dict[str, Path]:
        """Return the file of each split in a cycle's folder."""
        return {name: home / TASKS_FOLDER / self.task.name / f"{name}.jsonl" for name in self.rows}

    @property
    def facts(self) -> dict[str, object]:
        """The task's entry in ``cycle.json``."""
        counts = {name: len(rows) for name, rows in self.rows.items()}
        train_texts = set(self.texts_of("train"))
        shared = sum(text in train_texts for text in self.texts_of("test"))
        return {
            "metric": self.metric,
            "regression": self.regression,
            "pairs": self.pairs,
            **counts,
            "test_in_train": shared,
            "held": self.held,
            "chance": self.chance,
            "files": self.digests,
        }


def read_tasks(config: CycleConfig, verbose: bool = True) -> list[TaskFiles]:
    """Read and split the files of every task; if ``verbose``, log what was read. Raise InputError
    for anything wrong with them.
    """
    remove = config.test_texts == "remove"
    tasks = [
        _read(task, config.seed, config.finetune_of(task, {}, "start"), remove, verbose)
        for task in config.tasks
    ]
    for one in tasks if verbose else ():
        for name, split in one.splits.items():
            if name != "dev" or one.task.dev:  # without a dev file, dev is part of train
                logger.info("task %s, %s: %s", one.task.name, name, split.describe())
    return tasks


def read_draws(config: CycleConfig) -> list[TaskFiles]:
    """Return the tasks of ``config`` for the first draw of the labels. Raise InputError for a
    problem in any draw, so that none fails after others have run.
    """
    draws = []
    for number in range(config.label_draws):
        with naming(f"draw {number} of the labels"):
            draws.append(read_tasks(config.of_draw(number), verbose=False))
    _check_draws_differ(draws)
    return draws[0]


def _read(
    task: CycleTask,
    seed: int,
    settings: TaskSettings = _DEFAULT_SETTINGS,
    remove: bool = False,
    verbose: bool = True,
) -> TaskFiles:
    """Read one task; ``remove``: without the rows of train and dev that are also rows of test."""
    paths = {"train": task.train, "test": task.test} | ({"dev": task.dev} if task.dev else {})
    states = tuple((path, state_of(path)) for path in paths.values())
    splits = dict(zip(paths, _read_files(states, settings), strict=True))
    train = splits["train"]
    if train.words is not None:
        raise InputError(
            f"task {task.name!r}: {task.train} has tokens with tags, but a cycle needs texts. "
            "Make an expert of it with pipeline finetune, and name it as a teacher with task: "
            "token_classification in a run file (pipeline train-student)"
        )
    random = np.random.Generator(np.random.Philox(key=[seed, 0]))
    order = random.permutation(len(train))
    if train.groups is not None:
        order = shuffle_groups(train.groups, random)
    rows = {name: np.arange(len(split)) for name, split in splits.items()}
    tests = {*map(_normalised, _examples(splits["test"], rows["test"]))}
    held = {
        name: np.array([_normalised(one) in tests for one in _examples(split, rows[name])])
        for name, split in splits.items()
        if name != "test"
    }
    if remove:
        order = order[~held["train"][order]]
        rows |= {name: rows[name][~is_held] for name, is_held in held.items()}
        for name in [name for name in held if not len(rows[name])]:
            without_dev = "leave it out, " if name == "dev" else ""
            raise InputError(
                f"task {task.name!r}: all {counted(len(held[name]), 'row')} of {name} "
                f"({paths[name]}) are rows of test, which are removed: give another {name}, "
                f"{without_dev}or give test_texts: keep"
            )
    if task.dev is None:
        count = min(task.dev_examples, len(order) // _DEV_DIVISOR)
        if count and train.groups is not None:  # a group must not be split
            count = count_whole_groups(train.groups[order], count) % len(order)
        if count == 0:
            raise InputError(
                f"task {task.name!r}: {task.train} has {counted(len(train), 'example')}, too "
                "few to take any for dev; give a dev file"
            )
        splits["dev"], rows["dev"], order = train, np.sort(order[:count]), order[count:]
    order = _limit_per_class(task, train, order, verbose)
    limit = task.train_examples
    if limit and train.groups is not None:
        limit = count_whole_groups(train.groups[order], limit)
    rows["train"] = np.sort(order[:limit])
    metric = chosen_metric(task.metric, train)
    if task.pairs and train.pairs is None:
        raise InputError(
            f"task {task.name!r}: pairs is {task.pairs}, but {task.train} has no sentence2; an "
            "expert on single texts is shown single texts: leave pairs out"
        )
    pairs = (task.pairs or "adjacent") if train.pairs is not None else None
    # The remaining training rows must contain every class.
    labels = train.labels[rows["train"]]
    classes = labels.nonzero()[1] if train.problem == SEVERAL else labels
    missing = set(range(len(train.label_names))) - set(classes.tolist())
    if missing:
        ways = ["raise train_examples"] if task.train_examples is not None else []
        ways += ["lower dev_examples", "give a dev file"] if task.dev is None else []
        ways += ["give test_texts: keep"] if remove and held["train"].any() else []
        raise InputError(
            f"task {task.name!r}: none of the {len(rows['train'])} examples that are left to train "
            f"on has the label {train.label_names[min(missing)]!r}; {', or '.join(ways)}"
        )
    digests = {path: _digest(path, state_of(path)) for path in paths.values()}
    counts = {name: int(is_held.sum()) for name, is_held in held.items()}
    return TaskFiles(task, not train.label_names, metric, pairs, splits, rows, digests, counts)


# All draws of the labels use the same files; each is read once.
@lru_cache(maxsize=64)
def _read_files(
    files: tuple[tuple[str, FileState], ...], settings: TaskSettings
) -> tuple[TaskData, ...]:
    return tuple(read_task(*(path for path, _ in files), settings=settings))


@lru_cache(maxsize=192)
def _digest(path: str, state: FileState) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _limit_per_class(
    task: CycleTask, train: TaskData, order: np.ndarray, verbose: bool
) -> np.ndarray:
    """Return the first ``train_per_class`` rows of each class in ``order``; all if it is null."""
    if task.train_per_class is None:
        return order
    if not train.label_names or train.problem == SEVERAL:
        labels = "lists of labels" if train.label_names else "scores"
        raise InputError(
            f"task {task.name!r}: train_per_class is for rows of one class each, and "
            f"{task.train} has {labels}; give train_examples"
        )
    chosen = []
    for number, name in enumerate(train.label_names):
        of_class = order[train.labels[order] == number][: task.train_per_class]
        if verbose and len(of_class) < task.train_per_class:
            logger.info(
                "task %s: %s of class %s are trained on, and train_per_class is %d: there are no "
                "more",
                *(task.name, counted(len(of_class), "row"), name, task.train_per_class),
            )
        chosen.append(of_class)
    return np.concatenate(chosen)


def _check_draws_differ(draws: Sequence[Sequence[TaskFiles]]) -> None:
    """Raise InputError for a task with the same rows in every draw of the labels."""
    for one, *others in zip(*draws, strict=True):
        pairs = itertools.product(others, ("train", "dev"))
        if all(np.array_equal(one.rows[name], other.rows[name]) for other, name in pairs):
            raise InputError(
                f"task {one.task.name!r}: label_draws asks for several draws, and all would be the "
                f"same rows: dev is a file, and all {len(one.rows['train']):,} rows of train are "
                "trained on. Give train_examples (fewer than these) or train_per_class, or leave "
                "dev out"
            )


def _examples(data: TaskData, rows: Sequence[int] | np.ndarray) -> list[tuple[str, str | None]]:
    return [(data.texts[r], data.pairs[r] if data.pairs else None) for r in rows]


def _normalised(example: tuple[str, str | None]) -> tuple[str, ...]:
    """Return the normalised texts, sorted, so that a pair is the same in either order."""
    # Normalisation leaves nothing of "?!", but that does not make it equal to "...".
    return tuple(sorted(normalised(text) or text for text in example if text is not None))


# --- writing --------------------------------------------------------------------------------------


def test_files(home: Path, config: CycleConfig) -> list[Path]:
    """Return the test splits of all tasks, which no text may contain."""
    return [home / TASKS_FOLDER / task.name / "test.jsonl" for task in config.tasks]


def write_tasks(tasks: Sequence[TaskFiles], home: Path) -> None:
    """Write the missing split files of every task."""
    for one in tasks:
        for name, file in one.files_in(home).items():
            if not file.exists():
                rows = map(int, one.rows[name])
                write_lines(file, (_record(one.splits[name], row) for row in rows))


def _record(data: TaskData, row: int) -> dict[str, object]:
    """Return a line that ``read_task`` reads as the same example."""
    texts: dict[str, object] = {"text": data.texts[row]}
    if data.pairs is not None:
        texts = {"sentence1": data.texts[row], "sentence2": data.pairs[row]}
    if data.groups is not None:
        texts["group"] = data.group_names[row]
    label: object = data.labels[row].tolist()
    if data.problem == SEVERAL:
        label = [
            name for name, held in zip(data.label_names, data.labels[row], strict=True) if held
        ]
    elif data.label_names:
        label = data.label_names[data.labels[row]]
        label = int(str(label)) if _are_numbers(data.label_names) else label
    return texts | {"label": label}


def _are_numbers(names: Sequence[str]) -> bool:
    """Return whether the class names, in order, are those of numbers: "07" is a word, and so are
    "10" and "9" in this order.
    """
    try:
        numbers = [int(name) for name in names]
    except ValueError:
        return False
    return [str(number) for number in sorted(numbers)] == [*names]


# --- the start model ------------------------------------------------------------------------------


def check_start(config: CycleConfig) -> dict[str, str]:
    """Return the fingerprints of the start model, and of the experts' model if it is another one,
    for ``cycle.json``.

    Raise InputError if a model, its weights or its tokenizer is missing, or if the corpus has
    another tokenizer than the students, who would see the corpus's.
    """
    from rekindle.train.model.files import weights_fingerprint
    from rekindle.train.model.folder import tokenizer_folder

    directory = _check_model(config.student.model, "student.model")
    student_tokenizer = load_tokenizer(str(tokenizer_folder(directory)))
    corpus_tokenizer = load_tokenizer(config.corpus.tokenizer)
    ids = differing_ids(corpus_tokenizer, student_tokenizer)
    if len(ids):
        difference = describe_difference(corpus_tokenizer, student_tokenizer, ids)
        raise InputError(
            f"student.model {config.student.model!r} has another tokenizer than corpus.tokenizer "
            f"{config.corpus.tokenizer!r}: {difference}. The student would read other words: name "
            "the model's own"
        )
    fingerprints = {"weights": weights_fingerprint(directory)}
    if config.has_other_experts:
        expert = _check_model(str(config.experts.model), "experts.model")
        load_tokenizer(str(tokenizer_folder(expert)))
        fingerprints["expert_weights"] = weights_fingerprint(expert)
    return fingerprints


def _check_model(model: str, key: str) -> Path:
    """Return the folder of a model that experts or students can start from."""
    from rekindle.train.model.folder import resolve_model
    from rekindle.train.model.headers import check_expert_files, check_student_files

    with naming(key):
        directory = resolve_model(model)
        check_expert_files(directory)
    check_student_files(directory, "masked_lm", f"{key} {model!r}")
    return directory


def check_teaching(config: CycleConfig, tasks: Sequence[TaskFiles]) -> None:
    """Raise InputError for a task whose expert cannot teach an arm as the arm requires."""
    for text in config.text_names:
        _check_pairs(config, text, tasks)
    for one in tasks:
        task, problem = f"task {one.task.name!r} is", one.splits["train"].problem
        if "pseudo" in config.arms and one.regression:
            raise InputError(
                f"{task} a regression, whose expert has no most likely class; the arm pseudo "
                "would be kd: leave it out of arms"
            )
        arms = [arm for arm in config.arms if arm in WITH_TEACHERS]
        committees = [arm for arm in arms if len(config.teachers_of(one.task.name, arm)) > 1]
        if committees and (one.regression or problem == SEVERAL):
            kind = "a regression" if one.regression else "of lists of labels"
            is_only_arm = committees == ["committee"]
            advice = "leave it out of arms" if is_only_arm else "give experts.teacher: best"
            raise InputError(
                f"{task} {kind}, and only classifiers of one label teach together (the arm "
                f"{committees[0]}, with all seeds of the expert): {advice}"
            )


def _check_pairs(config: CycleConfig, text: str, tasks: Sequence[TaskFiles]) -> None:
    """Raise InputError for an expert that cannot read a text of paired records."""
    if config.corpus_of(text).pair_field is None:
        return
    experts = {task for _, task, _ in teachers_on(config, text)}
    label = f"the text of task {text!r}" if text else "the text"
    for one in [one for one in tasks if one.task.name in experts]:
        if one.pairs is None:
            raise InputError(
                f"{label} has pairs (corpus.pair_field), but the expert on {one.task.name} reads "
                "single texts: give that task a corpus of its own without pair_field, and leave "
                "the arm mixture out"
            )
        if one.task.pairs is not None:
            raise InputError(
                f"task {one.task.name!r}: pairs is {one.task.pairs}, but {label} already has "
                "pairs (corpus.pair_field): leave tasks.….pairs out"
            )
