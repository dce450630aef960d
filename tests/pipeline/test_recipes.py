"""Every recipe: known keys, runs as it is, its commented variations are valid; and what the first
ones promise.
"""

import json
import re
import shlex
from itertools import chain, pairwise
from pathlib import Path

import pytest
import yaml

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.builtin.names import FILES, MODELS, PREFIX
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.init import FOLDER, commands, read_recipe
from rekindle.pipeline.overrides import set_value
from rekindle.pipeline.sweep.grid import parse_swept_key
from rekindle.train.schedules import weight_at

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Files of whole cycles, with words that they print.
CYCLES = {
    "rekindle": ("expert", "both", "part accuracy", "next accuracy", "fewer than 5 seeds"),
    "rerank": ("expert", "both (own head)", "section ndcg@10", "section mrr"),
}
every_recipe = pytest.mark.parametrize("name", sorted(set(NAMES) - set(CYCLES)))
# Seconds each: enough to go through every part of both stages once.
SMALL = (
    *("--set", "corpus.limit_sequences=64", "--set", "train.steps=2"),
    *("--set", "train.warmup_steps=1", "--set", "train.evaluate_every=2"),
    *("--set", "train.batch_sequences=8", "--set", "train.evaluate_sequences=8"),
)

# The stages of elle hold documents of every domain out: that takes more than 64 sequences.
OF_ITS_OWN = {"elle": ("--set", "corpus.limit_sequences=null")}


def values_of(name: str) -> dict:
    return yaml.safe_load(read_recipe(name))


def config_of(name: str, *overrides: str) -> RunConfig:
    values = values_of(name)
    for override in overrides:
        set_value(values, override)
    return parse_settings(RunConfig, values, name)


# --- every recipe ---------------------------------------------------------------------------------


@every_recipe
def test_its_keys_are_known_and_its_folders_its_own(name):
    config = config_of(name)
    assert config.student is not None
    assert config.cache.path == f"runs/{name}/cache"
    named = [line for line in commands(read_recipe(name), Path("run.yaml")) if "--out" in line]
    assert named
    assert all(f"--out runs/{name}/" in line for line in named)


@every_recipe
def test_it_names_nothing_that_must_be_downloaded(name):
    config = config_of(name)
    known = {PREFIX + other for other in (*MODELS, *FILES)}
    models = [config.corpus.tokenizer, *(t.model for t in config.teachers)]
    assert known >= {*models, config.student.model}
    named = [shlex.split(line) for line in commands(read_recipe(name), Path("run.yaml"))]
    made = {line[line.index("--out") + 1] for line in named if "--out" in line}
    assert known | {"python-docs"} | made >= {*config.corpus.places}


def variations(text: str) -> list[tuple[list[str], list[str]]]:
    """(--set values, --sweep values) of every comment line that shows some."""
    found = []
    for line in text.splitlines():
        comment = line.partition("#")[2]
        # whose settings are no keys of a run
        if "pipeline generate" in comment or "pipeline compare" in comment:
            continue
        if start := re.search(r"--(set|sweep) ", comment):
            options = list(pairwise(shlex.split(comment[start.start() :])))
            sets, sweeps = (
                [value for option, value in options if option == name]
                for name in ("--set", "--sweep")
            )
            found.append((sets, sweeps))
    return found


@every_recipe
def test_the_variations_it_shows_are_valid_and_change_something(name):
    plain = config_of(name)
    for sets, sweeps in variations(read_recipe(name)):
        assert config_of(name, *sets) != plain or not sets
        for key, values in map(parse_swept_key, sweeps):
            swept = [config_of(name, *sets, f"{key}={value}") for value in values]
            assert len({repr(config) for config in swept}) > 1


@pytest.mark.parametrize("name", CYCLES)
def test_a_cycle_is_read_by_its_command_and_names_nothing_to_download(name):
    config = parse_settings(CycleConfig, values_of(name), name)
    assert commands(read_recipe(name), Path("run.yaml")) == [
        f"pipeline rekindle run.yaml --out runs/{name}"
    ]
    known = {PREFIX + other for other in (*MODELS, *FILES)}
    files = [path for task in config.tasks for path in (task.train, task.dev, task.test)]
    assert known >= {*config.corpus.source, config.corpus.tokenizer, config.student.model, *files}


@pytest.mark.slow  # a whole cycle runs in tests/pipeline/cycle, and the demo is one
@pytest.mark.parametrize("name", CYCLES)
def test_a_cycle_runs(name, tmp_path, monkeypatch, hasty_home, command):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(read_recipe(name))
    small = ("seeds=1", "search={}", "arms=[both]", "finetune.max_steps=2", "cache.replicas=1")
    sets = [part for value in small for part in ("--set", value)]
    code, said, errors = command("rekindle", "run.yaml", "--out", "out", *sets, *SMALL)
    assert code == 0, errors
    for word in CYCLES[name]:
        assert word in said
    assert Path("out/report.html").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_page_with_its_commands(name):
    text = (ROOT / "docs" / "recipes" / f"{name}.md").read_text("utf-8")
    assert text.startswith(f"# {name}: ")
    shown = re.findall(r"^pipeline .*$", text, re.MULTILINE)
    run_file = shown[0].split()[-1]
    assert shown[0] == f"pipeline init {name} --out {run_file}"
    assert set(commands(read_recipe(name), Path(run_file))) <= {*shown}


def test_no_page_is_without_a_recipe_and_the_book_lists_all():
    pages = sorted(path.stem for path in (ROOT / "docs" / "recipes").glob("*.md"))
    assert pages == NAMES
    listed = re.findall(r"\(docs/recipes/([\w-]+)\.md\)", (ROOT / "RECIPES.md").read_text("utf-8"))
    assert sorted(listed) == NAMES


@pytest.fixture
def run_stages(tmp_path, monkeypatch, command):
    """run_stages(name, *options): the recipe's own stages, in an empty folder; returns their
    stdout.
    """
    monkeypatch.chdir(tmp_path)

    def both(name: str, *options: str) -> str:
        Path("run.yaml").write_text(read_recipe(name))
        said = ""
        for line in commands(read_recipe(name), Path("run.yaml")):
            which = line.split()[1]
            if which in ("cache-teachers", "train-student", "generate"):
                more = options
                if which == "generate":
                    more = ("--set", "limit=60", "--set", "max_new_tokens=6") if options else ()
                code, out, errors = command(*shlex.split(line)[1:], *more)
                assert code == 0, errors
                said += out
        assert "sequences trained" in said
        assert list(Path("runs", name).glob("**/model.safetensors"))
        return said

    return both


@pytest.fixture
def run(run_stages, hasty_home):
    """run(name, *overrides): as ``run_stages``, in seconds."""

    def small(name: str, *overrides: str) -> str:
        return run_stages(name, *SMALL, *OF_ITS_OWN.get(name, ()), *overrides)

    return small


# Those that the tests of what single recipes promise run anyway.
RUN_BELOW = {"uegp", "ki-domain", "muki", "embed"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {*CYCLES} - RUN_BELOW))
def test_it_runs(name, run):
    run(name)


@pytest.mark.slow
@every_recipe
def test_it_runs_as_it_is(name, run_stages, built_in_home):
    run_stages(name)


# --- what single recipes promise ------------------------------------------------------------------


def test_a_student_of_vectors_stands_beside_its_teacher_and_an_untaught_one(run, command):
    run("embed")
    (line,) = [one for one in commands(read_recipe("embed"), Path("run.yaml")) if "compare" in one]
    code, said, errors = command(*shlex.split(line)[1:])
    assert code == 0, errors
    rows = [one.split() for one in said.splitlines() if "0." in one]
    assert {"student", "expert"} <= {row[0] for row in rows}
    assert "ndcg@10" in said
    assert "expert bert is no sentence encoder: its states are pooled by mean" in errors


@pytest.mark.parametrize("name", ["ki-mlm", "ki-clm", "ki-domain"])
def test_the_two_weights_of_knowledge_inheritance_add_up_to_one(name):
    train = config_of(name).train
    (term,) = train.objective.distill
    alphas = []
    for step in range(train.steps):
        alpha = weight_at(term.weight, step, train.steps)
        hard = weight_at(train.objective.hard.weight, step, train.steps)
        assert alpha + hard == pytest.approx(1.0)
        assert alpha == pytest.approx(max(1 - step / (0.6 * train.steps), 0.0), abs=1e-9)
        alphas.append(alpha)
    assert alphas[0] == 1.0
    assert alphas[-1] == 0.0
    assert term.temperature == 2.0


def test_each_domain_has_its_own_teacher_and_all_text_has_one(run):
    run("ki-domain")
    cache = Cache.open("runs/ki-domain/cache")
    teachers = {t.name: t.domains for t in config_of("ki-domain").teachers}
    assert teachers.pop("general") is None
    for index in range(len(cache.corpus)):
        example = cache.example(index)
        own = {name for name, domains in teachers.items() if example.domain in domains}
        taught = {
            teacher
            for teacher, replicas in example.targets.items()
            if any(len(target.positions) for target in replicas)
        }
        assert taught == own | {"general"}
        assert len(own) <= 1


@pytest.mark.parametrize(
    ("override", "with_kd", "with_ce"),
    [
        ("train.objective.hard.weight=0", True, False),
        ("train.objective.distill=[]", False, True),
        ("train.seed=0", True, True),
    ],
    ids=["KD only", "MLM only", "both"],
)
def test_each_ablation_trains_exactly_what_it_names(run, override, with_kd, with_ce):
    run("uegp", "--set", override)
    coverage = json.loads(Path("runs/uegp/student/summary.json").read_text())["coverage"]
    assert (coverage["sequences_with_kd"] > 0) == with_kd
    assert (coverage["positions_ce_only"] > 0) == with_ce


def test_the_union_student_has_the_labels_of_both_experts(run):
    run("muki")
    heads = json.loads(Path("runs/muki/student/rekindle_student.json").read_text())["heads"]
    ((name, head),) = heads.items()
    assert name == "first+second"
    cache = Cache.open("runs/muki/cache")
    both = [cache.teacher(t).info.label_names for t in ("first", "second")]
    assert list(head["label_names"]) == list(chain(*both))
    assert len(set(head["label_names"])) == 8
