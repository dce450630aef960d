"""The students of a cycle: what each learns, from whom, on which text, and for which arm."""

from collections.abc import Iterator
from dataclasses import dataclass

from rekindle.pipeline.cycle.arms import (
    MASKED,
    OF_ONE_EXPERT,
    ORDER,
    UNTAUGHT,
    WITH_TEACHERS,
    Arm,
)
from rekindle.pipeline.cycle.config import CycleConfig, seed_name


@dataclass(frozen=True)
class Student:
    """One student: ``students/NAME``. ``tasks``: the tasks whose experts teach it; ``text``: the
    text it reads (see ``CycleConfig.texts``); number j is trained with the seed train.seed + j.
    """

    name: str
    arm: Arm
    tasks: tuple[str, ...]
    text: str
    number: int = 0

    @property
    def learns_masked_lm(self) -> bool:
        """Whether it learns masked LM."""
        return self.arm in MASKED


def students_of(config: CycleConfig) -> dict[str, Student]:
    """Return every student by name; those that wait longest for their teachers come first."""
    students = {}
    for arm in [arm for arm in ORDER if arm in config.arms and arm not in UNTAUGHT]:
        for task in config.tasks:
            for number in range(config.students):
                one = _student(config, arm, task.name, number)
                students[one.name] = one
    return students


def student_of(config: CycleConfig, arm: Arm, task: str, number: int = 0) -> str:
    """Return the name of the student that ``arm`` fine-tunes on ``task``; empty for the start
    model.
    """
    return "" if arm in UNTAUGHT else _student(config, arm, task, number).name


def _student(config: CycleConfig, arm: Arm, task: str, number: int) -> Student:
    names = tuple(one.name for one in config.tasks)
    tasks = {"mlm": (), "mixture": names}.get(arm, (task,))
    text = task if task in config.text_names else ""
    name = f"{arm}-{task}" if arm in OF_ONE_EXPERT or text else arm
    return Student(f"{name}.{number}" if number else name, arm, tasks, text, number)


def teachers_on(config: CycleConfig, text: str) -> Iterator[tuple[str, str, int | None]]:
    """Yield each teacher of a text: its name in the cache, its task, and its seed (None: the best
    on dev).
    """
    for task in config.tasks:
        arms = [arm for arm in config.arms if arm in WITH_TEACHERS]
        if text not in ("", task.name):
            arms = [arm for arm in arms if arm == "mixture"]
        elif not arms:  # the students it teaches may come later
            arms = ["kd"]
        names = dict.fromkeys(n for arm in arms for n in config.teachers_of(task.name, arm))
        if task.name in names:
            yield task.name, task.name, None
        for seed in range(config.expert_seeds):
            if (name := seed_name(task.name, seed)) in names:
                yield name, task.name, seed
