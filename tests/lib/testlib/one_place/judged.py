"""A case: change one file, run one command, and judge the outcome."""

import random
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rekindle.data.errors import RekindleError
from testlib.command import pipeline
from testlib.one_place.changes import Change
from testlib.one_place.commands import COMMANDS, finite, same
from testlib.one_place.formats import FORMATS
from testlib.one_place.subjects import SUBJECTS
from testlib.one_place.world import World

SECONDS = 30


@dataclass(frozen=True)
class Case:
    """Case ``number`` of a subject, which determines the file, the command and the change."""

    subject: str
    number: int

    @property
    def draw(self) -> random.Random:
        return random.Random(f"one place {self.subject} {self.number}")


class Made(NamedTuple):
    """What a case has changed."""

    file: str
    command: str
    change: Change
    line: str
    signed: bool  # by somebody who can, so an error that distrusts the place is enough
    folder: Path  # what it belongs to: a cache, a run, a model

    def told(self) -> str:
        try:
            now = repr(self.change.now())[:80]
        except (KeyError, IndexError, TypeError):
            now = "gone"
        place = ".".join(map(str, self.change.place))
        where = f"{self.file}{self.line and f' line {self.line}'}"
        return f"{self.command} | {where} | {place} {self.change.how}: {now}"


class TooSlow(BaseException):
    """A command that does not end."""


@contextmanager
def in_time() -> Iterator[None]:
    def end(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make(case: Case, world: World) -> Made:
    """Change the file of a case."""
    subject, draw = SUBJECTS[case.subject], case.draw
    files = [
        name
        for pattern in subject.files
        for name in sorted(world.made)
        if Path(name).match(pattern) and name.count("/") == pattern.count("/")
    ]
    file = draw.choice(files)
    command = draw.choice(subject.commands)
    content, change, line = FORMATS[subject.format](draw, world.made[file])
    world.write(file, content)
    folder = world.root / Path(file).parts[0]
    return Made(file, command, change, line, subject.format == "signed", folder)


class Begun(RekindleError):
    """A cycle has accepted its file, and would now run its jobs."""

    exit_code = 0


@contextmanager
def without_jobs() -> Iterator[None]:
    """End a cycle where its jobs would begin."""

    def begun(*_: object) -> None:
        raise Begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rekindle.pipeline.cycle.run.run_counted", begun)
        yield


class Judge:
    """Judges cases in a world. ``right``: for a subject and a command, says what is wrong with a
    result that differs from the unchanged file's.
    """

    def __init__(self, world: World, right: Callable[[World, Made, Any, Any], str]):
        self.world, self.right = world, right
        self.sound: dict[str, Any] = {}

    def expected(self, name: str) -> Any:
        """Return the command's result in the original world."""
        if name not in self.sound:
            changed = {one: self.world.files().get(one) for one in self.world.changed()}
            self.world.restore()
            with without_jobs():
                done = pipeline(*COMMANDS[name].words(self.world.root))
            assert done.returncode == 0, done.stderr
            self.sound[name] = COMMANDS[name].result(self.world.root, done.stdout)
            self.world.restore()
            for one, content in changed.items():
                if content is not None:
                    self.world.write(one, content)
        return self.sound[name]

    def judge(self, case: Case) -> tuple[str, str, str]:
        """Return what is wrong ("" if nothing), what was changed, and the message."""
        made = make(case, self.world)
        try:
            wrong, said = self._judged(made)
            return wrong, made.told(), said
        finally:
            self.world.restore()

    def _judged(self, made: Made) -> tuple[str, str]:
        command, root = COMMANDS[made.command], self.world.root
        expected = self.expected(made.command)
        try:
            with in_time(), without_jobs():
                done = pipeline(*command.words(root))
        except TooSlow:
            return "does not end", ""
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "/wt/" in f.filename or "rekindle" in f.filename] or frames
            ours = [f for f in ours if "/tests/" not in f.filename] or frames
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"
            return f"traceback: {type(error).__name__} in {place}", str(error)[:300]
        told = [one for one in done.stderr.split("\n") if one.startswith("error: ")]
        if done.returncode == 0:
            return self._accepted(made, done.stdout, expected), " / ".join(told)
        if done.returncode not in (2, 3):
            return f"exit code {done.returncode}", done.stderr[-300:]
        if len(told) != 1:
            return f"{len(told)} messages", done.stderr[-300:]
        return self._refused(made, done.stdout + done.stderr, expected), done.stderr[-500:]

    def _accepted(self, made: Made, printed: str, expected: Any) -> str:
        try:
            found = COMMANDS[made.command].result(self.world.root, printed)
        except ValueError as error:
            return f"no result: {error}"
        if not finite(found) and finite(expected):
            return "numbers that are none"
        return self.right(self.world, made, found, expected)

    def _refused(self, made: Made, message: str, expected: Any) -> str:
        changed = [name for name in self.world.changed() if name != made.file]
        if changed:
            self.world.write(made.file, self.world.made[made.file])
            command, root = COMMANDS[made.command], self.world.root
            again = (root / "new" / "run.json").exists() or "half" in command.typed
            done = pipeline(*command.words(root, again=again))
            if done.returncode:
                return f"half-written ({changed[0]} …): cannot go on: {done.stderr[-200:]}"
            if not same(command.result(root, done.stdout), expected):
                return f"half-written ({changed[0]} …): goes on to something else"
        return names_the_place(made, message)


def names_the_value(made: Made, message: str) -> bool:
    """Return whether the message contains the new value."""
    try:
        now = made.change.now()
    except (KeyError, IndexError, TypeError):
        return False
    return isinstance(now, str) and len(now) > 1 and repr(now)[1:40] in message


# If one key of a model's settings decides another's meaning, the message names the mismatch.
CONSEQUENCES = ("config.json", "not finite", "has no weights", "lacks weights", "was saved as")
CONSEQUENCES += ("sees only one side",)
DAMAGE = ("checksum", "is damaged", "roll-up", "another version of this file")


def names_the_place(made: Made, message: str) -> str:
    """Return "" if the message names the file, or the folder of a model, and the key."""
    file = Path(made.file)
    told = (str(made.folder), f"data/{file.stem}-")  # the second: the file of a commit record
    if names_the_value(made, message) or (made.signed and any(one in message for one in told)):
        return ""
    if file.name not in message and str(file.parent) not in message:
        return "message does not name the file"
    told_line = re.search(r"tokenizer\.json .* line \d+", message)  # the library knows no key
    if any(told in message for told in DAMAGE) or told_line:
        return ""
    if made.line:
        return "" if made.line in message else "message does not name the line"
    keys = [key for key in made.change.keys if key]
    if keys and not any(key in message for key in keys):
        if file.name == "config.json" and any(told in message for told in CONSEQUENCES):
            return ""
        return "message does not name the key"
    return ""
