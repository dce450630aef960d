"""Stage 1 killed at any step, by several processes at once, interrupted, or failing: it goes on.

Children are forked from the warm test process: importing torch costs seconds. What a child does to
the file system is noted in a journal, so that it can be stopped at any one of these steps.
"""

import builtins
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from rekindle.data.cache import Cache
from rekindle.data.inventory import shard_sets
from rekindle.data.storage import atomic as atomic_module
from rekindle.data.storage import shards as shards_module
from rekindle.data.storage.store import open_store
from rekindle.pipeline.caching import cache_teachers as stage_one
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.cli import main
from rekindle.pipeline.config import dump_config

Teachers = list[dict[str, Any]]
Act = Callable[[], None]

CORPUS = {"limit_sequences": 8}
ATTEMPT = re.compile(r"-[0-9a-f]{8}\.arrow")
TEMPORARY = re.compile(r"/\.(.*)\.[0-9a-f]{8}\.tmp")
CLI = [sys.executable, "-m", "rekindle.pipeline.cli"]


# --- caches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every(make_model, wordpiece) -> Teachers:
    """A teacher of each kind."""

    def teacher(name: str, family: str, auto: str, task: str, **more: Any) -> dict[str, Any]:
        model = make_model(family, f"AutoModelFor{auto}", wordpiece)
        return {"name": name, "model": str(model), "task": task} | more

    causal = ("llama", "CausalLM", "causal_lm")
    classes = ("bert", "SequenceClassification", "sequence_classification")
    return [
        teacher("lm", "bert", "MaskedLM", "masked_lm", targets={"kind": "topk", "k": 4}),
        teacher("hidden", *causal, targets={"kind": "hidden"}),
        teacher("packed", *causal, targets={"kind": "topk", "k": 4, "codec": "compact"}),
        teacher("classes", *classes, monte_carlo={"passes": 2}),
        teacher("words", "bert", "TokenClassification", "token_classification"),
        teacher("pairs", *classes, pairs="adjacent"),
    ]


@pytest.fixture(scope="module")
def few(every) -> Teachers:
    """Masks, and a matrix beside the targets."""
    return every[:2]


def made(tmp_path_factory, configure, teachers: Teachers) -> Path:
    path = tmp_path_factory.mktemp("whole") / "cache"
    cache_teachers(configure(path, teachers, CORPUS))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, configure, few) -> Path:
    """The cache of an uninterrupted run."""
    return made(tmp_path_factory, configure, few)


@pytest.fixture(scope="module")
def whole_of_every(tmp_path_factory, configure, every) -> Path:
    return made(tmp_path_factory, configure, every)


def contents(cache: Path) -> dict[str, bytes]:
    """The bytes of every committed data file by unit, and of the files beside them."""
    found = {}
    for shards in shard_sets(open_store(cache)):
        for unit, commit in shards.committed().items():
            found[f"{shards.folder}/{unit}"] = (cache / shards.folder / commit.path).read_bytes()
    for name in names(cache):
        if not re.search(r"/data/|/commits/|(^|/)\..*\.tmp$", name):
            found[name] = (cache / name).read_bytes()
    return found


def names(cache: Path) -> list[str]:
    """Every file there is, half-written ones included."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())


def roles(cache: Path) -> Counter[str]:
    """The files by what they are, without what differs between two attempts."""
    return Counter(ATTEMPT.sub("", name) for name in names(cache))


def units(cache: Path) -> set[str]:
    """The committed units of teachers."""
    found = cache.glob("targets/**/commits/[0-9]*.json")
    return {str(p.relative_to(cache)) for p in found}


# --- processes ------------------------------------------------------------------------------------


class Child:
    """A forked process that runs ``work``; what it says on stderr is kept."""

    def __init__(self, work: Callable[[], object]):
        # A pipe: it takes what a process says that may not write to files.
        self._pipe, end = os.pipe()
        self._said = b""
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, end)
        os.close(end)
        os.set_blocking(self._pipe, False)

    def _run(self, work: Callable[[], object], end: int) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come along
            sys.stderr = open(end, "w", buffering=1)  # noqa: SIM115
            try:
                work()
                code = 0
            except SystemExit as leaving:
                code = int(leaving.code or 0)
            except BaseException:
                traceback.print_exc()
        finally:
            os._exit(code)

    @property
    def errors(self) -> str:
        with suppress(BlockingIOError):
            while more := os.read(self._pipe, 1 << 16):
                self._said += more
        return self._said.decode()

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, seconds: float = 60) -> int:
        """Its exit code, or minus the signal that ended it."""
        until(self.ended, seconds)
        if self.status is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"it did not end: {self.errors}")
        return self.status


def until(condition: Callable[[], object], seconds: float = 60) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def stat_of(pid: int) -> list[str]:
    """State, parent, group, … of a process; [] when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if (stat := stat_of(pid)) and stat[0] not in "ZX"}


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    everything = {int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()}
    parents = {p: int(stat[1]) for p in everything if (stat := stat_of(p))}
    while more := {p for p, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


# --- the steps of the protocol --------------------------------------------------------------------


class Journal:
    """Notes what a process does to a cache, and calls ``act`` at one of these steps."""

    def __init__(
        self, path: Path, cache: Path, at: int | str | None = None, act: Act = lambda: None
    ):
        self.path, self.cache, self.at, self.act = path, cache, at, act
        self.count = -1
        self.acted = False

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def note(self, label: str) -> None:
        self.count += 1
        descriptor = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(descriptor, f"{label}\n".encode())
        os.close(descriptor)
        if self.at in (self.count, label) and not self.acted:
            self.acted = True
            self.act()

    def name(self, path: Any) -> str | None:
        """What a path of the cache is, without what differs between two attempts."""
        text = os.fspath(path)
        if not text.startswith(f"{self.cache}/"):
            return None
        name = text.removeprefix(str(self.cache))
        return TEMPORARY.sub(r"/temporary \1", ATTEMPT.sub("", name))

    def around(self, step: str, call: Callable, path_of: Callable) -> Callable:
        def noted(*arguments: Any, **named: Any) -> Any:
            name = self.name(path_of(*arguments))
            if name is None:
                return call(*arguments, **named)
            self.note(f"before {step} {name}")
            result = call(*arguments, **named)
            self.note(f"after {step} {name}")
            return result

        return noted

    def open(self, path: Any, mode: str = "r", **named: Any) -> Any:
        name = self.name(path)
        if "x" not in mode or name is None:
            return builtins.open(path, mode, **named)
        return Halved(path, self, name)

    def follow(self) -> None:
        """From here on in this process, for good."""
        os.link = self.around("link", os.link, lambda source, to: to)
        os.replace = self.around("replace", os.replace, lambda source, to: to)
        by_descriptor = lambda number: os.readlink(f"/proc/self/fd/{number}")  # noqa: E731
        os.fsync = self.around("sync", os.fsync, by_descriptor)
        Path.unlink = self.around("unlink", Path.unlink, lambda path, **_: path)
        atomic_module.open = shards_module.open = self.open
        original = stage_one.run_unit

        def run(*arguments: Any, **named: Any) -> Any:
            self.note(f"begun {arguments[0].info.name} {arguments[3].name}")
            result = original(*arguments, **named)
            self.note(f"computed {arguments[0].info.name} {arguments[3].name}")
            return result

        stage_one.run_unit = run


class Halved:
    """A new file, of which half is on the disk when the journal notes so."""

    def __init__(self, path: Path, journal: Journal, name: str):
        self.file = builtins.open(path, "xb")  # noqa: SIM115
        self.journal, self.name = journal, name

    def write(self, data: Any) -> None:
        content = bytes(data)
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.journal.note(f"within {self.name}")
        self.file.write(content[len(content) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Halved":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forked(config: Any, journal: Journal, **named: Any) -> Child:
    """A process that makes the cache of ``config``, noting what it does."""

    def work() -> None:
        journal.follow()
        cache_teachers(config, **named)

    return Child(work)


@pytest.fixture(scope="module")
def steps(tmp_path_factory, configure, few) -> list[str]:
    """All that a run over ``few`` does, in its order."""
    folder = tmp_path_factory.mktemp("steps")
    journal = Journal(folder / "journal", folder / "cache")
    child = forked(configure(folder / "cache", few, CORPUS), journal)
    assert child.wait() == 0, child.errors
    return journal.lines()


def assert_finished(cache: Path, config: Any, whole: Path, journal: Journal | None = None) -> None:
    """The same command again makes the rest, and leaves the cache of an uninterrupted run."""
    there = units(cache)
    planned = len(units(whole))
    done = cache_teachers(config)
    assert (done.units_done, done.units_present) == (planned - len(there), len(there))
    assert contents(cache) == contents(whole)
    report = verify_cache(str(cache))
    assert report.problems == []
    left = [n for n, count in (roles(cache) - roles(whole)).items() for _ in range(count)]
    assert report.orphans == sum("/data/" in name for name in left)
    collected(cache, len(left))
    assert roles(cache) == roles(whole)
    assert verify_cache(str(cache)).problems == []
    Cache.open(cache).example(0)


def collected(cache: Path, count: int) -> None:
    """``pipeline gc`` removes so many files."""
    before = set(names(cache))
    result = command("gc", cache, "--older-than", 0, "--json")
    removed = set(json.loads(result)["removed"])
    gone = before - set(names(cache))
    assert removed == gone
    hidden = [name for name in names(cache) if "/." in f"/{name}"]
    assert len(gone) == count, f"left over: {hidden}"


def command(*arguments: object) -> str:
    """The console script's stdout, run in this process."""
    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        run_command(*arguments)
    return out.getvalue()


def run_command(*arguments: object) -> None:
    """The console script's own function, as it is called by a shell."""
    with mock.patch.object(sys, "argv", ["pipeline", *map(str, arguments)]):
        main()


def killed_at(step: int | str, cache: Path, config: Any, folder: Path) -> Journal:
    """Run until the process kills itself at that step."""
    journal = Journal(folder / f"journal-{step}".replace("/", "_"), cache, step, die)
    child = forked(config, journal)
    assert child.wait() == -signal.SIGKILL, child.errors
    return journal


def assert_little_lost(journal: Journal, cache: Path, workers: int = 1) -> None:
    """Of what was computed, all is committed but one unit at most of each worker."""
    computed = sum(line.startswith("computed") for line in journal.lines())
    assert computed - len(units(cache)) <= workers


def kinds_of(steps: list[str]) -> dict[str, str]:
    """A step of each kind: one of several units, the last, stands for all."""
    return {re.sub(r"\d{5}(-r\d{3})?", "unit", step): step for step in steps}


# --- killed ---------------------------------------------------------------------------------------


def test_the_journal_knows_every_step(steps, whole):
    """Each data file is begun, made durable, and then committed by a link; nothing is missed."""
    for unit in units(whole):
        record = f"/{unit}"
        data = record.replace("/commits/", "/data/").removesuffix(".json")
        name = unit.split("/")[1]
        order = [
            f"computed {name} {Path(unit).stem}",
            f"within {data}",
            f"after sync {data}",
            f"within {Path(record).parent}/temporary {Path(record).name}",
            f"before link {record}",
            f"after link {record}",
        ]
        places = [steps.index(step) for step in order]
        assert places == sorted(places)
    assert len(kinds_of(steps)) > 60


def test_killed_while_masks_of_losses_are_made(tmp_path, configure, every):
    """They are made after their teacher, and before those that see them."""
    chosen = [every[0] | {"name": "reference", "view": "clean"}, every[0]]
    hard = {"mask": {"policy": "hard", "teacher": "reference"}}
    config = configure(tmp_path / "whole", chosen, CORPUS, hard)
    journal = Journal(tmp_path / "journal", tmp_path / "whole")
    assert (child := forked(config, journal)).wait() == 0, child.errors
    lines = journal.lines()
    steps = [step for step in kinds_of(lines).values() if "/views/masked-" in step]
    assert len(steps) > 10
    places = [lines.index(step) for step in steps]
    assert lines.index("computed reference 00001") < min(places)
    assert max(places) < lines.index("begun lm 00000-r000")
    for number, step in enumerate(steps):
        cache = tmp_path / str(number)
        config = configure(cache, chosen, CORPUS, hard)
        killed_at(step, cache, config, tmp_path)
        assert_finished(cache, config, tmp_path / "whole")


@pytest.mark.parametrize("part", range(10))
def test_killed_at_some_steps(tmp_path, configure, few, whole, steps, part):
    """Ten steps of all, always those around a commit; the slow test below takes each kind."""
    chosen = list(kinds_of(steps).values())
    commits = [s for s in chosen if re.match(r"(before|after) link /targets/\w+/commits", s)]
    step = (commits + chosen[part :: len(chosen) // 8])[part]
    config = configure(tmp_path / "cache", few, CORPUS)
    journal = killed_at(step, tmp_path / "cache", config, tmp_path)
    assert_little_lost(journal, tmp_path / "cache")
    assert_finished(tmp_path / "cache", config, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_each_kind_of_step(tmp_path, configure, few, whole, steps, seed):
    for number, step in enumerate(list(kinds_of(steps).values())[seed::6]):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = configure(folder / "cache", few, CORPUS)
        journal = killed_at(step, folder / "cache", config, folder)
        assert_little_lost(journal, folder / "cache")
        assert_finished(folder / "cache", config, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_steps_with_a_teacher_of_each_kind(
    tmp_path, configure, every, whole_of_every, seed
):
    """Sixty kills in all, each on a cache of its own, and then several in a row on one."""
    rng = random.Random(seed)
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = configure(folder / "cache", every, CORPUS)
        journal = killed_at(rng.randrange(700), folder / "cache", config, folder)
        assert_little_lost(journal, folder / "cache")
        assert_finished(folder / "cache", config, whole_of_every)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]
)
def test_killed_several_times_in_a_row(tmp_path, configure, few, whole, seed):
    """Wherever it is killed, what was committed stays, to the byte, the inode and the time."""
    rng, cache = random.Random(seed), tmp_path / "cache"
    config = configure(cache, few, CORPUS)
    kept: dict[str, tuple[int, int]] = {}
    for number in range(6):
        journal = Journal(tmp_path / f"journal-{number}", cache, rng.randrange(5, 60), die)
        assert forked(config, journal).wait() in (0, -signal.SIGKILL)
        now = {n: (s.st_ino, s.st_mtime_ns) for n in units(cache) if (s := (cache / n).stat())}
        assert now | kept == now
        kept = now
    assert_finished(cache, config, whole)


# --- several processes ----------------------------------------------------------------------------


def slow(journal: Journal, seconds: float) -> None:
    """Computing a unit takes so long, so that others come in between."""
    original = stage_one.run_unit

    def run(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments, **named)

    stage_one.run_unit = run
    journal.follow()


def fork_workers() -> None:
    """Worker processes as forks of this one: a new interpreter needs seconds for its imports."""
    context = multiprocessing.get_context("fork")
    ours = vars(multiprocessing) | {"get_context": lambda method: context}
    stage_one.multiprocessing = SimpleNamespace(**ours)


def with_workers(config: Any, journal: Journal, seconds: float = 0.05) -> Child:
    def work() -> None:
        fork_workers()
        slow(journal, seconds)
        cache_teachers(config, workers=2)

    return Child(work)


@pytest.mark.parametrize("victim", ["worker", "group", "parent"])
def test_one_of_several_processes_is_killed(tmp_path, configure, few, whole, victim):
    cache = tmp_path / "cache"
    config = configure(cache, few, CORPUS)
    journal = Journal(tmp_path / "journal", cache)
    child = with_workers(config, journal)
    assert until(lambda: units(cache) or child.ended(), 20), child.errors
    workers = descendants(child.pid)
    assert len(workers) == 2, child.errors
    if victim == "group":
        os.killpg(child.pid, signal.SIGKILL)
    else:
        os.kill(child.pid if victim == "parent" else min(workers), signal.SIGKILL)
    code = child.wait()
    if victim == "worker":
        assert "a worker process of teacher" in child.errors
        assert "run the same command again" in child.errors
    else:
        assert code == -signal.SIGKILL
    try:
        assert until(lambda: not alive(workers), 3), "workers outlive the process they work for"
    finally:
        for pid in alive(workers):
            os.kill(pid, signal.SIGKILL)
    assert_little_lost(journal, cache, 2)
    assert_finished(cache, config, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_two_processes_share_the_work(tmp_path, configure, every, workers):
    """Started at once on one cache, both end well, and hardly any unit is computed twice."""
    teachers = [every[0], every[3]]
    settings = {"limit_sequences": 12, "sequence_length": 16}, {"sequences_per_shard": 1}
    alone = configure(tmp_path / "alone", teachers, *settings)
    planned = cache_teachers(alone).units_done
    cache = tmp_path / "cache"
    config = configure(cache, teachers, *settings)
    journals = [Journal(tmp_path / f"journal-{number}", cache) for number in range(2)]

    def work(journal: Journal) -> None:
        fork_workers()
        slow(journal, 0.01)
        cache_teachers(config, workers=workers)

    children = [Child(lambda journal=j: work(journal)) for j in journals]
    for child in children:
        assert child.wait() == 0, child.errors
    assert_finished(cache, config, tmp_path / "alone")
    computed = sum(line.startswith("computed") for j in journals for line in j.lines())
    assert planned <= computed <= 1.5 * planned
    assert all(any("computed" in line for line in j.lines()) for j in journals)


@pytest.mark.parametrize("seed", range(2))
def test_two_processes_are_at_one_cache(tmp_path, configure, every, whole_of_every, seed):
    """A later one comes at any moment, and checks what the first is just making."""
    cache = tmp_path / "cache"
    config = configure(cache, every, CORPUS)
    rng = random.Random(seed)
    journals = [Journal(tmp_path / f"journal-{number}", cache) for number in range(2)]
    children = []
    for journal in journals:
        children.append(forked(config, journal))
        time.sleep(rng.random() * 0.8)
    for child in children:
        assert child.wait() == 0, child.errors
    assert_finished(cache, config, whole_of_every)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))]
)
def test_two_processes_mend_one_cache(tmp_path, configure, every, whole_of_every, seed):
    """What one has made again must not be taken out again by the other."""
    cache = Path(shutil.copytree(whole_of_every, tmp_path / "cache"))
    config = configure(cache, every, CORPUS)
    rng = random.Random(seed)
    kinds = ("targets/*/data/*", "views/*/data/*", "targets/*/commits/*", "targets/*/teacher.json")
    for pattern in kinds:
        for path in rng.sample(sorted(cache.glob(pattern)), 4):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    journals = [Journal(tmp_path / f"journal-{number}", cache) for number in range(2)]
    children = []
    for journal in journals:
        children.append(forked(config, journal))
        time.sleep(rng.random() * 0.3 * (seed % 3))
    for child in children:
        assert child.wait() == 0, child.errors
    assert cache_teachers(config).units_done == 0
    command("gc", cache, "--older-than", 0)
    assert contents(cache) == contents(whole_of_every)
    assert roles(cache) == roles(whole_of_every)
    assert verify_cache(str(cache)).problems == []


def test_a_process_comes_while_another_stores_a_matrix(tmp_path, configure, few, whole):
    """What is half-written by one that lives must not be taken for damage."""
    cache = tmp_path / "cache"
    config = configure(cache, few, CORPUS)
    at = "after link /targets/hidden/head.safetensors"
    go_on = tmp_path / "go on"
    first = Journal(tmp_path / "first", cache, at, lambda: until(go_on.exists) and None)
    child = forked(config, first)
    assert until(lambda: at in first.lines())
    other = forked(config, Journal(tmp_path / "second", cache))
    assert other.wait() == 0, other.errors
    go_on.touch()
    assert child.wait() == 0, child.errors
    assert_finished(cache, config, whole)


def test_a_process_checks_while_another_stores_a_matrix(tmp_path, configure, few, whole):
    """The other one has other teachers to make: the half-stored matrix is none of its business."""
    cache = tmp_path / "cache"
    config = configure(cache, few, CORPUS)
    at = "after link /targets/hidden/head.safetensors"
    go_on = tmp_path / "go on"
    first = Journal(tmp_path / "first", cache, at, lambda: until(go_on.exists) and None)
    child = forked(config, first, only=["hidden"])
    assert until(lambda: at in first.lines())
    second = Journal(tmp_path / "second", cache)
    other = forked(config, second, only=["lm"])
    assert other.wait() == 0, other.errors
    go_on.touch()
    assert child.wait() == 0, child.errors
    assert_finished(cache, config, whole)


# --- the command itself, interrupted and killed ---------------------------------------------------


@pytest.fixture
def long(tmp_path, configure, every) -> Any:
    """A configuration that keeps any machine busy: a teacher with many passes per unit."""
    slow = every[3] | {"monte_carlo": {"passes": 30}}
    corpus = {"limit_sequences": 60, "sequence_length": 16}
    cache = {"sequences_per_shard": 3}
    config = configure(tmp_path / "cache", [slow], corpus, cache)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    return config


def assert_left_at_once(
    process: Any, interrupt: Callable[[], None], run: Path, seconds: float
) -> None:
    children = descendants(process.pid)
    began = time.monotonic()
    interrupt()
    assert process.wait(30) == 130
    assert time.monotonic() - began < seconds
    assert until(lambda: not alive(children), 2), "a child outlives it"


def assert_line_to_resume(errors: str, run: Path) -> None:
    assert "Traceback" not in errors
    assert "Error" not in errors
    (line,) = [line for line in errors.splitlines() if "interrupted" in line]
    assert line.endswith(f"To go on: pipeline cache-teachers {run}")


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_at_once_with_the_line_to_go_on(tmp_path, long, workers):
    run, cache = tmp_path / "run.yaml", tmp_path / "cache"

    def work() -> None:
        fork_workers()
        run_command("cache-teachers", run, "--workers", workers)

    child = Child(work)
    assert until(lambda: units(cache) or child.ended()), child.errors
    assert_left_at_once(child, lambda: os.kill(child.pid, signal.SIGINT), run, 2)
    assert_line_to_resume(child.errors, run)
    there = units(cache)
    again = cache_teachers(long)
    assert again.units_present == len(there)
    assert again.units_done > 0
    assert verify_cache(str(cache)).problems == []


def start(run: Path, workers: int) -> subprocess.Popen[str]:
    """The command as a user starts it, in a process group of its own."""
    return subprocess.Popen(
        [*CLI, "cache-teachers", str(run), "--workers", str(workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_of_the_real_command(tmp_path, long, workers):
    run, cache = tmp_path / "run.yaml", tmp_path / "cache"
    process = start(run, workers)
    assert until(lambda: units(cache) or process.poll() is not None)
    assert_left_at_once(process, lambda: process.send_signal(signal.SIGINT), run, 2)
    assert process.stderr is not None
    assert_line_to_resume(process.stderr.read(), run)
    again = start(run, workers)
    assert again.communicate()[1].count("Traceback") == 0
    assert again.returncode == 0
    assert verify_cache(str(cache)).problems == []
    assert cache_teachers(long).units_done == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "group", "parent"])
def test_a_process_of_the_real_command_is_killed(tmp_path, configure, every, victim):
    """Worker processes of their own interpreters: the quick tests above fork theirs."""
    alone = configure(tmp_path / "alone", every[:1], CORPUS, {"sequences_per_shard": 1})
    cache_teachers(alone)
    cache, run = tmp_path / "cache", tmp_path / "run.yaml"
    config = configure(cache, every[:1], CORPUS, {"sequences_per_shard": 1})
    run.write_text(dump_config(config))
    process = start(run, 2)
    assert until(lambda: units(cache) or process.poll() is not None)
    children = descendants(process.pid)
    spawned = [p for p in children if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]
    assert len(spawned) == 2
    if victim == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid if victim == "parent" else spawned[0], signal.SIGKILL)
    try:
        assert process.wait(30) == (2 if victim == "worker" else -signal.SIGKILL)
        assert until(lambda: not alive(children), 5), "workers outlive the process they work for"
    finally:
        for pid in alive(children):
            os.kill(pid, signal.SIGKILL)
    assert process.stderr is not None
    errors = process.stderr.read()
    assert "Traceback" not in errors
    assert ("a worker process of teacher 'lm' was killed" in errors) == (victim == "worker")
    assert_finished(cache, config, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_real_command_killed_at_random_times(tmp_path, configure, every, workers):
    """Until it is through: no matter how often, and when, even while it starts."""
    teachers, many = every[:3], {"sequences_per_shard": 1}
    alone = configure(tmp_path / "alone", teachers, CORPUS, many)
    cache_teachers(alone)
    config = configure(tmp_path / "cache", teachers, CORPUS, many)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    rng = random.Random(workers)
    for _ in range(6):
        process = start(tmp_path / "run.yaml", workers)
        time.sleep(rng.uniform(2, 12))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if (tmp_path / "cache").exists():
        assert_finished(tmp_path / "cache", config, tmp_path / "alone")


# --- errors ---------------------------------------------------------------------------------------


def full_disk() -> None:
    """No file of this process can grow any more: the kernel itself says so."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def fails(child: Child, *words: str) -> None:
    """Exit code 2 with one message, and no traceback."""
    assert child.wait() == 2, child.errors
    errors = [line for line in child.errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in child.errors
    assert len(errors) == 1, child.errors
    for word in words:
        assert word in errors[0]


FULL_AT = [
    "within /targets/lm/data/00001-r000",
    "before sync /targets/lm/data/00000-r001",
    "before link /targets/hidden/head.safetensors",
    "after link /corpus/commits/00001.json",
    "after link /corpus/corpus.json",
    "after link /targets/hidden/commits/00001.json",
    "after link /cache.json",
]


@pytest.mark.parametrize("step", FULL_AT)
def test_a_full_disk_is_one_message_and_finished_shards_are_kept(
    tmp_path, configure, few, whole, step
):
    cache, run = tmp_path / "cache", tmp_path / "run.yaml"
    config = configure(cache, few, CORPUS)
    run.write_text(dump_config(config))
    journal = Journal(Path(os.devnull), cache, step, full_disk)

    def work() -> None:
        journal.follow()
        run_command("cache-teachers", run)

    fails(Child(work), "File too large")
    before = {n: (cache / n).stat().st_mtime_ns for n in committed(cache)}
    assert_finished(cache, config, whole)
    after = {n: (cache / n).stat().st_mtime_ns for n in committed(cache)}
    assert before.items() <= after.items()


def committed(cache: Path) -> list[str]:
    """The records of all units and the data files that they name."""
    found = []
    for shards in shard_sets(open_store(cache)):
        for unit, commit in shards.committed().items():
            found += [f"{shards.folder}/commits/{unit}.json", f"{shards.folder}/{commit.path}"]
    return found


TAKEN_AWAY = {
    "corpus/data": "after link /corpus/commits/00000.json",
    "corpus/commits": "after link /corpus/commits/00000.json",
    "views": "after link /corpus/complete.json",
    "targets": "after link /corpus/complete.json",
    "targets/lm/data": "computed lm 00000-r001",
    "targets/lm/commits": "computed lm 00000-r001",
}


@pytest.mark.parametrize("folder", TAKEN_AWAY)
def test_a_folder_that_may_not_be_written_is_one_message(tmp_path, configure, few, whole, folder):
    """A file stands in its place: a permission taken away does not hold for root."""
    cache, run = tmp_path / "cache", tmp_path / "run.yaml"
    config = configure(cache, few, CORPUS)
    run.write_text(dump_config(config))
    place, away = cache / folder, tmp_path / "away"

    def take_away() -> None:
        if place.exists():
            place.rename(away)
        place.write_bytes(b"")

    journal = Journal(Path(os.devnull), cache, TAKEN_AWAY[folder], take_away)

    def work() -> None:
        journal.follow()
        run_command("cache-teachers", run)

    fails(Child(work), str(cache))
    place.unlink()
    if away.exists():
        away.rename(place)
    assert_finished(cache, config, whole)


@pytest.mark.parametrize(
    ("workers", "unit"), [(1, "00000-r000"), (1, "00001-r000"), (2, "00001-r001")]
)
def test_a_model_that_fails_on_one_batch_is_one_message(
    tmp_path, configure, few, whole, workers, unit
):
    import transformers

    cache, run = tmp_path / "cache", tmp_path / "run.yaml"
    config = configure(cache, few, CORPUS)
    run.write_text(dump_config(config))

    def work() -> None:
        fork_workers()
        body, original, current = transformers.BertModel.forward, stage_one.run_unit, []

        def run_unit(*arguments: Any, **named: Any) -> Any:
            current[:] = [arguments[3].name]
            return original(*arguments, **named)

        def forward(model: Any, input_ids: Any = None, **named: Any) -> Any:
            if current == [unit] and len(input_ids) > 2:
                raise RuntimeError("the tensors do not fit\ntogether")
            return body(model, input_ids, **named)

        stage_one.run_unit, transformers.BertModel.forward = run_unit, forward
        run_command("cache-teachers", run, "--workers", workers)

    fails(Child(work), "teacher 'lm' failed on a batch", "the tensors do not fit")
    there = {Path(name).stem for name in units(cache)}
    assert unit not in there
    if workers == 1:
        order = ["00000-r000", "00001-r000", "00000-r001", "00001-r001"]
        assert there == set(order[: order.index(unit)])
    assert_finished(cache, config, whole)


# --- a teacher that was never finished ------------------------------------------------------------


def failing_first(config: Any) -> None:
    """Run until the matrix of hidden states is stored; the first forward pass then fails."""

    def work() -> None:
        def fail(*arguments: Any, **named: Any) -> None:
            raise KeyboardInterrupt

        stage_one.run_unit = fail
        cache_teachers(config, only=["hidden"])

    assert Child(work).wait() == 1


def test_a_corrected_model_has_its_own_matrix(tmp_path, configure, few, make_model, wordpiece):
    """The name was free as long as no unit of the teacher was written: so is its matrix's place."""
    other = make_model("llama", "AutoModelForCausalLM", wordpiece, seed=5)
    corrected = [few[1] | {"model": str(other)}]
    fresh = configure(tmp_path / "fresh", corrected, CORPUS)
    cache_teachers(fresh)
    failing_first(configure(tmp_path / "cache", few[1:], CORPUS))
    cache_teachers(configure(tmp_path / "cache", corrected, CORPUS))
    assert contents(tmp_path / "cache") == contents(tmp_path / "fresh")


def test_a_teacher_given_up_before_its_first_unit_harms_nothing(tmp_path, configure, few):
    failing_first(configure(tmp_path / "cache", few, CORPUS))
    cache_teachers(configure(tmp_path / "cache", few[:1], CORPUS))
    assert verify_cache(str(tmp_path / "cache")).problems == []
    assert list(Cache.open(tmp_path / "cache").teachers) == ["lm"]
