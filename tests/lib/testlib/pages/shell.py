"""The bash of a page, a command after another; ``pipeline`` within the tests' own process."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from testlib.command import pipeline


class Command(NamedTuple):
    """A command: its words, and the file that its output goes to ('' where it is shown)."""

    words: list[str]
    into: str = ""

    @property
    def is_ours(self) -> bool:
        return self.words[0] == "pipeline"


def commands_of(text: str) -> list[Command]:
    """The commands of a block: one a line, or several that ``&&`` joins."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            into = ""
            if ">" in command:
                into = command[command.index(">") + 1]
                command = command[: command.index(">")]
            found.append(Command(command, into))
    return found


# Sizes alone, so that a page's program takes seconds.
SIZES = {
    "cache-teachers": ("--set", "corpus.limit_sequences=48"),
    "finetune": ("--set", "max_steps=2"),
    "generate": ("--set", "limit=4", "--set", "max_new_tokens=4"),
    "train-student": (
        *("--set", "train.steps=2", "--set", "train.warmup_steps=1", "--set"),
        *("train.batch_sequences=8", "--set", "train.evaluate_every=2"),
        *("--set", "train.evaluate_sequences=8", "--set", "corpus.limit_sequences=48"),
    ),
    "plan": ("--set", "corpus.limit_sequences=48"),
}


def run_command(
    command: Command, small: bool, before: Callable[[list[str]], None] = lambda words: None
) -> str:
    """Run a command in the current folder; return what it says. ``before`` is told its words."""
    assert command.is_ours, f"a page runs pipeline alone, or says why not: {command.words}"
    before(command.words)
    more = SIZES.get(command.words[1], ()) if small else ()
    done = pipeline(*command.words[1:], *more)
    assert done.returncode == 0, f"{shlex.join(command.words)}\n{done.stdout}\n{done.stderr}"
    if command.into:
        Path(command.into).write_text(done.stdout, encoding="utf-8")
        return ""
    return done.stdout + done.stderr
