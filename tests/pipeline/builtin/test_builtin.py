"""The built-in models: which names there are, where they lie, that they are made once and whole."""

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rekindle.data.errors import InputError, RekindleError
from rekindle.data.source.python_docs import PARTS, PythonDoc
from rekindle.pipeline import make_builtin
from rekindle.pipeline.builtin import missing as launcher
from rekindle.pipeline.builtin import names as names_module
from rekindle.pipeline.builtin.missing import make_missing, missing
from rekindle.pipeline.builtin.names import (
    DOMAINS,
    FILES,
    LABELLED_TASKS,
    MODELS,
    PREFIX,
    documents_file,
    folder,
    home,
    places,
    resolve_name,
    resolve_values,
)
from rekindle.pipeline.builtin.sections import SectionSizes, write_sections
from rekindle.pipeline.builtin.settings import SETTINGS
from rekindle.pipeline.builtin.tasks import (
    HALVES,
    PLACE,
    TaskSizes,
    labelled_examples,
    record_of,
    split_of,
    write_documents,
)
from rekindle.pipeline.config import load_config
from rekindle.pipeline.make_builtin import job_of, prerequisites, with_prerequisites
from rekindle.train.record.run_folder import locked_folder
from testlib.command import run_main
from testlib.processes import Child, until


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A home in which every built-in is there, as an empty folder or file."""
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    for name in MODELS:
        (folder() / name).mkdir(parents=True)
    for name in FILES:
        path = documents_file(folder(), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder()


# --- names ----------------------------------------------------------------------------------------


def test_every_agreed_name_is_there():
    agreed = {"bert", "bert-larger", "gpt2", "gpt2-larger"}
    agreed |= {f"expert-{task}" for task in (*LABELLED_TASKS,)}
    agreed |= {f"bert-{name}" for name in DOMAINS}
    assert set(MODELS) == agreed | {"tokenizer", "encoder"}
    assert set(DOMAINS.values()) <= set(PARTS)


@pytest.mark.parametrize("name", [*MODELS, *FILES])
def test_every_name_is_a_path_of_its_own(made, name):
    path = Path(resolve_name(PREFIX + name))
    assert path.exists()
    assert made in path.parents
    assert list(places().values()).count(path) == 1


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("python-docs/brt", "python-docs/bert"),
        ("python-docs/expert-parts", "python-docs/expert-part"),
        ("python-docs/part/trian", "python-docs/part/train"),
        ("python-docs/", "python-docs/"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(made, given, nearest):
    with pytest.raises(InputError, match=f"no built-in '{given}'; did you mean '{nearest}"):
        resolve_name(given)


def test_names_are_replaced_wherever_they_stand_and_nothing_else_is(made):
    values = {
        "corpus": {"source": ["python-docs", "python-docs/corpus", "a.jsonl"], "limit": 3},
        "cache": {"path": "python-docs/cache"},
        "stages": [{"set": {"student.model": "python-docs/bert"}}],
        "student": {"model": "./python-docs/bert", "from_scratch": False, "grow": None},
    }
    before = json.dumps(values)
    resolved = resolve_values(values)
    assert resolved["corpus"]["source"] == [
        "python-docs",
        str(made / "documents" / "corpus.jsonl"),
        "a.jsonl",
    ]
    assert resolved["stages"][0]["set"] == {"student.model": str(made / "bert")}
    for key in ("cache", "student"):
        assert resolved[key] == values[key]
    assert json.dumps(values) == before


def test_a_configuration_is_loaded_with_directories(made, tmp_path):
    values = {
        "corpus": {"source": ["python-docs"], "tokenizer": "python-docs/bert"},
        "cache": {"path": "c"},
        "teachers": [
            {
                "name": "part",
                "model": "python-docs/expert-part",
                "task": "sequence_classification",
            }
        ],
        "student": {"model": "python-docs/bert-larger"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "run.yaml", ["student.model=python-docs/bert-text"])
    assert config.corpus.tokenizer == str(made / "bert")
    assert config.corpus.source == ("python-docs",)
    assert config.teachers[0].model == str(made / "expert-part")
    assert config.student.model == str(made / "bert-text")
    with pytest.raises(InputError, match="did you mean 'python-docs/bert'"):
        load_config(tmp_path / "run.yaml", ["student.model=python-docs/berd"])


def test_reading_a_configuration_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    config = load_config(run_file(tmp_path))
    assert config.student.model == resolve_name("python-docs/bert")
    assert set(missing(config)) == {f"python-docs/{n}" for n in ("corpus", "bert-larger", "bert")}
    assert set(missing(config.student, config.corpus.tokenizer)) == {
        *("python-docs/bert-larger", "python-docs/bert")
    }
    assert not (tmp_path / "home").exists()


NAMED = "python-docs/bert --train python-docs/part/train --dev python-docs/part/dev"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("cache-teachers run.yaml --teacher nobody", "nobody"),
        ("cache-teachers run.yaml --set train.step=3", r"train\.step"),
        ("train-student run.yaml", "not a Rekindle cache"),
        ("train-student run.yaml --sweep train.seed=1,2", "not a Rekindle cache"),
        ("train-student run.yaml --set 'stages=[{name: a, set: {student: null}}]'", "no `student`"),
        (f"finetune {NAMED} --out out --set epoch=3", "epoch"),
    ],
)
def test_nothing_is_made_for_a_run_that_is_wrong(line, told, tmp_path, monkeypatch, command):
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run_file(tmp_path)
    code, _, errors = command(*shlex.split(line))
    assert code in (2, 3), errors
    assert re.search(told, errors)
    assert not (tmp_path / "home").exists()


def test_finding_a_model_imports_no_torch(made):
    code = (
        "import sys; from rekindle.pipeline.builtin.missing import make_missing; "
        "from rekindle.pipeline.builtin.names import resolve_name; "
        "make_missing(resolve_name('python-docs/bert')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"REKINDLE_HOME": "/r", "XDG_CACHE_HOME": "/x"}, "/r"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/rekindle"),
        ({"REKINDLE_HOME": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/rekindle"),
    ],
)
def test_home_follows_the_environment(environment, expected, monkeypatch):
    for name in ("REKINDLE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert home() == Path(expected)


def test_the_folder_says_all_that_decides_what_is_in_it(monkeypatch):
    names = {folder()}
    with monkeypatch.context() as patch:
        patch.setattr(names_module, "ALGORITHM", names_module.ALGORITHM + 1)
        names.add(folder())
    with monkeypatch.context() as patch:
        patch.setattr("platform.python_version", lambda: "3.99.0")
        names.add(folder())
    with monkeypatch.context() as patch:
        changed = SETTINGS.model_copy(update={"vocabulary": SETTINGS.vocabulary + 1})
        patch.setattr("rekindle.pipeline.builtin.settings.SETTINGS", changed)
        names.add(folder())
    assert len(names) == 4
    assert folder() in names


# --- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_after_what_it_starts_from_and_nothing_else_is_made(name, tmp_path):
    order = with_prerequisites([name])
    assert order[-1] == name
    assert len(set(order)) == len(order)
    for number, one in enumerate(order):
        assert set(prerequisites(one)) <= set(order[:number])
    job = job_of(name, tmp_path / "there", tmp_path / "begun")
    assert job.output == tmp_path / "there" / name
    assert {PREFIX + needed for needed in prerequisites(name)} == set(job.after)


def test_what_several_models_start_from_is_made_once():
    order = with_prerequisites(list(MODELS))
    assert sorted(order) == sorted(MODELS)


# --- the tasks ------------------------------------------------------------------------------------


def pages() -> list[PythonDoc]:
    """Documents of 1 to 6 sentences, each a passage by itself."""
    sentence = "The {} of {} {} is described here, in a sentence long enough to be alone, {}."
    return [
        PythonDoc(
            f"m{page}:{part}",
            " ".join(sentence.format(n, part, page, "and goes on " * 3) for n in range(length)),
            "function",
            f"m{page}",
            part,
        )
        for page, length in enumerate([1, 2, 3, 4, 5, 6] * 10)
        for part in PARTS
    ]


SIZES = TaskSizes(train=24, dev=12, test=24)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_files_are_those_that_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("rekindle.pipeline.builtin.tasks.python_docs", pages)
    write_documents(tmp_path / "documents", SIZES, 100, DOMAINS)
    body = "What is done by it is described here, at some length, for number"
    titled = [
        PythonDoc(f"s{n}:f", f"Do number {n}.\n\n{body} {n}.", "function", f"s{n}", "text")
        for n in range(60)
    ]
    write_sections(titled, SectionSizes(2, 2, 2, 2), tmp_path / "documents")
    for name in FILES:
        assert lines(documents_file(tmp_path, name)), name
    for name, part in DOMAINS.items():
        own = {line["id"] for line in lines(tmp_path / "documents" / f"domain-{name}.jsonl")}
        expected = {p.id for p in pages() if p.part == part and split_of(p.id) == "corpus"}
        assert own == expected
    found = lines(documents_file(tmp_path, "corpus"))
    corpus = {line["id"] for line in found}
    assert len(corpus) == 100
    assert {line["domain"] for line in found[:50]} == set(PARTS)  # a sample, not the beginning
    for task in LABELLED_TASKS:
        for split in ("train", "dev", "test"):
            found = lines(documents_file(tmp_path, f"{task}/{split}"))
            assert corpus.isdisjoint(line["document"] for line in found)
            assert {split_of(line["document"]) for line in found} == {split}


def test_the_halves_share_no_label_and_miss_none(tmp_path, monkeypatch):
    monkeypatch.setattr("rekindle.pipeline.builtin.tasks.python_docs", pages)
    write_documents(tmp_path / "documents", SIZES, 100, DOMAINS)
    for split in ("train", "dev", "test"):
        first, second = (
            {line["label"] for line in lines(documents_file(tmp_path, f"{half}/{split}"))}
            for half in HALVES
        )
        assert first.isdisjoint(second)
        assert first | second == set(PARTS)


def test_a_place_is_how_far_into_its_document_a_passage_stands():
    texts = {page.id: page.text for page in pages()}
    seen = set()
    for examples in labelled_examples(PLACE, pages(), SIZES).values():
        for record in map(record_of, examples):
            text = texts[record["document"]]
            passage, label = record["text"], record["label"]
            assert isinstance(label, float)
            assert (label == 0.0) == text.startswith(passage)
            assert (label == 1.0) == text.endswith(passage)
            before = text.index(passage) / len(text)
            assert before <= label <= before + 1 / 3
            seen.add(round(label, 2))
    assert {0.0, 0.5, 1.0} <= seen


# --- making ---------------------------------------------------------------------------------------


def leave(out: Path, report) -> None:
    out.mkdir()
    (out / "whole").write_text(str(os.getpid()))


def test_what_another_process_made_first_stays(tmp_path):
    for number in range(2):
        begun = tmp_path / f"begun-{number}"
        make_builtin._make_and_show(leave, begun, tmp_path / "out", lambda steps: None)
        (tmp_path / "out" / "mark").touch()
        if not number:
            first = (tmp_path / "out" / "whole").stat().st_ino
    assert (tmp_path / "out" / "whole").stat().st_ino == first


def test_one_process_at_a_time_makes_models_and_clears_what_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path))
    where = names_module.folder()
    left = where / ".begun-old"
    left.mkdir(parents=True)
    (where / "documents").mkdir()
    code = (
        "from rekindle.pipeline.make_builtin import make\n"
        "from rekindle.pipeline.progress import Progress\n"
        "print('ready', flush=True)\n"
        "make([], Progress.silent())\n"
        "print('made', flush=True)"
    )
    with locked_folder(where):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "ready\n"
        assert not select.select([other.stdout], [], [], 0.5)[0]
        assert left.exists()
    assert other.communicate(timeout=300)[0] == "made\n"
    assert not left.exists()


def test_a_home_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="REKINDLE_HOME"):
        make_missing(resolve_name("python-docs/corpus"))


def test_models_are_made_by_a_process_that_torchrun_does_not_know(tmp_path, monkeypatch):
    """It would wait for the others to join it, and they for its lock."""
    launched = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path))
    started, popen = [], subprocess.Popen

    def start(command, env, **arguments):
        started.append(env)
        return popen([sys.executable, "-c", ""], env=env, **arguments)

    monkeypatch.setattr(launcher.subprocess, "Popen", start)
    with pytest.raises(RekindleError, match="was not made"):  # by a process that does nothing
        make_missing(resolve_name(PREFIX + "bert"))
    (env,) = started
    assert not launched.keys() & env.keys()
    assert env["REKINDLE_HOME"] == str(tmp_path)


def test_a_process_that_dies_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RekindleError, match=r"corpus could not be made.*exit code 1"):
        make_missing(resolve_name("python-docs/corpus"))


def test_a_folder_that_lacks_a_file_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path))
    (folder() / "documents").mkdir(parents=True)
    with pytest.raises(RekindleError, match=r"corpus\.jsonl was not made; remove"):
        make_missing(resolve_name("python-docs/corpus"))


def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "corpus: {source: [python-docs/corpus], tokenizer: python-docs/bert-larger}\n"
        f"cache: {{path: {tmp_path / 'cache'}}}\n"
        "student: {model: python-docs/bert}\n"
    )
    return path


def test_ctrl_c_while_models_are_made_leaves_nothing_half(tmp_path, monkeypatch):
    """The command's process is forked, the one that makes models and its helpers are real."""
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    made = folder()
    documents_file(made, "corpus").parent.mkdir(parents=True)
    documents_file(made, "corpus").write_text('{"id": "a", "text": "A few words of a text."}\n')

    def work():
        os.dup2(sys.stderr.fileno(), 2)  # that of what is started, too
        run_main("cache-teachers", run_file(tmp_path))

    child = Child(work)
    assert until(lambda: [*made.glob(".begun-*/*")] or child.ended(), 300), child.errors
    assert not child.ended(), child.errors
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130, child.errors
    assert until(child.closed), "somebody is left who holds its stderr"
    assert "Traceback" not in child.errors
    last = {
        "bert": "model.safetensors",
        "bert-larger": "tokenizer.json",
    }  # the latter has no weights
    there = {path.name for path in made.iterdir()}
    assert there <= {"documents", "tokenizer", "log", *last}
    # What stands there is whole, also where the signal came late.
    assert all((made / name / last[name]).is_file() for name in there & last.keys())


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_and_the_same_command_goes_on(tmp_path, monkeypatch, hasty_home):
    """In a home where the command writes the documents first."""
    made = tmp_path / "home" / folder().name
    corpus = made / "documents" / "corpus.jsonl"
    environment = os.environ | {"REKINDLE_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        [sys.executable, "-m", "rekindle.pipeline.cli", "cache-teachers", str(run_file(tmp_path))],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    began = time.monotonic()
    while not list((tmp_path / "home").glob("python-docs-*/.begun-*/bert-run")):
        time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - began < 300
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)  # also that nobody is left who holds its stderr
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert list((tmp_path / "home").iterdir()) == [made]
    there = {path.name for path in made.iterdir()}
    assert there <= {"documents", "tokenizer", "bert-larger", "log"}
    kept = corpus.stat().st_mtime_ns

    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    make_missing(resolve_name("python-docs/bert-larger"))  # in this process
    assert (made / "bert-larger" / "config.json").is_file()
    assert corpus.stat().st_mtime_ns == kept
    assert not list(made.glob(".begun-*"))
