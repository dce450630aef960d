"""A cycle's experts of another model, their committees, its students of several seeds and draws of
the labels: what is planned, what is refused, and the whole of it.
"""

import json
from pathlib import Path

import pytest
import yaml

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline import job_functions as functions
from rekindle.pipeline.config import load_config
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.inputs import read_tasks
from rekindle.pipeline.cycle.jobs import plan_jobs
from rekindle.pipeline.cycle.run import _log_repeated_experts, run_cycle
from rekindle.pipeline.cycle.run_files import configs
from rekindle.pipeline.cycle.search import read_search
from rekindle.pipeline.processes.jobs import Report
from rekindle.pipeline.processes.worker import Place
from testlib.small_cycle.here import TINY, WORDS, Here, sections, task_files


@pytest.fixture(scope="module")
def here():
    """Jobs are done in this process."""
    with pytest.MonkeyPatch.context() as patch:
        runs = Here()
        patch.setattr("rekindle.pipeline.cycle.run.run_counted", runs)
        patch.setattr("rekindle.pipeline.cycle.run.warm_up", lambda: None)
        yield runs


@pytest.fixture(scope="module")
def values(tmp_path_factory, corpus_file, wordpiece, bytelevel, make_model):
    """A task with few of its labels, and experts of another size and tokenizer."""
    folder = tmp_path_factory.mktemp("experts")
    student = make_model("bert", "AutoModelForMaskedLM", wordpiece, 3, **TINY)
    other = make_model("roberta", "AutoModelForMaskedLM", bytelevel, 4, **TINY)
    task = task_files(folder, "colour") | {"train_examples": 24}
    return sections(corpus_file, student, [task]) | {
        "experts": {"model": str(other), "finetune": {"epochs": 2}},
        "arms": ["committee"],
    }


MANY = {"label_draws": 2, "students": 2, "search": {"learning_rate": [1e-3, 3e-3]}}


def config_of(values, **changes):
    return parse_settings(CycleConfig, values | changes)


def planned(home, config, only=""):
    return {job.name: job for job in plan_jobs(home, config, read_tasks(config), only)}


# --- the plan -------------------------------------------------------------------------------------


def test_each_student_waits_for_what_teaches_it(values, tmp_path):
    jobs = planned(tmp_path, config_of(values, arms=["pseudo", "kd", "committee"]))
    for arm, teachers in (
        ("pseudo", ["colour"]),
        ("kd", ["colour"]),
        ("committee", ["colour.0", "colour.1"]),
    ):
        needed = ("corpus", *(f"cache {name}" for name in teachers))
        assert jobs[f"student {arm}-colour"].after == needed
        assert jobs[f"own head of {arm} on colour"].after == (f"student {arm}-colour",)
    assert jobs["expert on colour"].after == ("start-expert",)
    assert jobs["start on colour"].after == ("start",)
    jobs = planned(tmp_path, config_of(values, arms=["kd"], experts={"teacher": "all"}))
    cached = [name for name in jobs if name.startswith("cache")]
    assert cached == ["cache colour.0", "cache colour.1"]


def test_the_seeds_of_an_expert_are_teachers_of_their_own(values, tmp_path):
    arms, cache = ["pseudo", "committee"], {"path": str(tmp_path / "cache")}
    config = config_of(values, cache=cache, arms=arms, students=2)
    runs = configs(tmp_path, config, read_tasks(config))
    expert = tmp_path / "experts" / "colour"
    assert {one.name: one.model for one in runs["stage1.yaml"].teachers} == {
        "colour": str(expert),
        "colour.0": str(expert / "seeds" / "seed-0"),
        "colour.1": str(expert / "seeds" / "seed-1"),
    }
    each = [runs[f"students/committee-colour{number}.yaml"].train for number in ("", ".1")]
    assert [one.seed for one in each] == [0, 1]
    assert each[0] == each[1].model_copy(update={"seed": 0})
    (term,) = each[0].objective.distill
    assert (term.combine, each[0].objective.hard.weight) == ("mixture", 0)


def test_tasks_with_texts_of_their_own_share_nothing_but_experts(values, tmp_path, corpus_file):
    own = {"corpus": {"source": [str(corpus_file)], "sequence_length": 32}}
    tasks = [task_files(tmp_path, name) | own for name in ("colour", "size")]
    common = {key: one for key, one in values["corpus"].items() if key != "source"}
    given = values | {"corpus": common, "tasks": tasks, "cache": {"path": str(tmp_path / "cache")}}
    config = config_of(given, arms=["mlm", "kd", "mixture"])
    runs = configs(tmp_path, config, read_tasks(config))
    for task in ("colour", "size"):
        stage = runs[f"stage1-{task}.yaml"]
        assert stage.cache.path == str(tmp_path / "cache" / task)
        assert [one.name for one in stage.teachers] == ["colour", "size"]
        for arm in ("mlm", "kd", "mixture"):
            student = runs[f"students/{arm}-{task}.yaml"]
            assert (student.corpus, student.cache) == (stage.corpus, stage.cache)
    jobs = planned(tmp_path, config)
    assert len({job.output for job in jobs.values()}) == len(jobs)
    one = planned(tmp_path, config, "size")
    assert one.keys() < jobs.keys()
    assert {job.output: job.arguments for job in one.values()}.items() <= {
        job.output: job.arguments for job in jobs.values()
    }.items()
    left = jobs.keys() - one.keys()
    assert "student kd-colour" in left
    assert "expert on colour" in one  # which teaches mixture
    less = planned(tmp_path, config_of(given, arms=["kd"]), "size")
    assert not [name for name in less if "colour" in name]
    with pytest.raises(InputError, match=r"no task 'sise'.*did you mean 'size'"):
        run_cycle(config, tmp_path / "out", task="sise")


# --- the whole of it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory, here):
    """Draw by draw, and interrupted in the second one."""
    out = tmp_path_factory.mktemp("experts") / "whole"
    config = config_of(values, **MANY)
    run_cycle(config, out, draw=0)
    here.ends = len(here.done) + 5
    with pytest.raises(KeyboardInterrupt):
        run_cycle(config, out)
    here.ends = None
    return out, run_cycle(config, out)


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_no_job_is_done_twice(whole, here, values):
    out, results = whole
    assert results.draws == [0, 1]
    assert len(set(here.done)) == len(here.done)
    count = len(here.done)
    assert run_cycle(config_of(values, **MANY), out).scores == results.scores
    assert len(here.done) == count


def test_every_arm_is_fine_tuned_from_its_own_model(whole):
    for draw in (whole[0] / "draws" / "0", whole[0] / "draws" / "1"):
        expert = metrics_of(draw / "experts" / "colour")
        assert (expert["model"], expert["config"]["epochs"]) == (str(draw / "start-expert"), 2)
        start = metrics_of(draw / "fine-tuned" / "start" / "colour")
        assert (start["model"], start["config"]["epochs"]) == (str(draw / "start"), 1)
        for number, name in enumerate(("committee-colour", "committee-colour.1")):
            for kind in ("fine-tuned", "distilled"):
                one = metrics_of(draw / kind / "committee" / "colour" / f"student-{number}")
                assert one["model"] == str(draw / "students" / name)
                assert [seed["seed"] for seed in one["per_seed"]] == [number]
        shapes = [
            json.loads((draw / name / "config.json").read_text())["model_type"]
            for name in ("start", "start-expert", "experts/colour/seeds/seed-1")
        ]
        assert shapes == ["bert", "roberta", "roberta"]
    scored = {one.arm: one.seeds for one in whole[1].scores}
    assert {"expert", "start", "committee", "committee (own head)"} <= scored.keys()
    assert set(map(tuple, scored.values())) == {(0, 1)}  # draws


def test_the_first_draw_searches_for_all(whole):
    out = whole[0] / "draws"
    assert not (out / "1" / "search").exists()
    for arm, folder in (("expert", "experts"), ("start", "fine-tuned/start")):
        tried = [metrics_of(path) for path in sorted((out / "0/search" / arm / "colour").iterdir())]
        best = max(tried, key=lambda one: one["mean"])["config"]["learning_rate"]
        rates = [metrics_of(out / n / folder / "colour")["config"] for n in "01"]
        assert [one["learning_rate"] for one in rates] == [best, best]


@pytest.mark.slow
def test_another_folder_takes_the_search_over(whole, values, tmp_path, here):
    """As on a machine that has the file alone: its draw is that of the folder that has searched."""
    file, count = whole[0] / "search.json", len(here.done)
    results = run_cycle(config_of(values, **MANY), tmp_path, draw=1, searched=file)
    new = [path.relative_to(tmp_path).parts for path in here.done[count:]]
    assert {parts[:2] for parts in new} == {("draws", "1")}
    assert not any("search" in parts for parts in new)
    assert results.draws == [1]
    for one in results.scores:
        (known,) = [s for s in whole[1].scores if (s.arm, s.metric) == (one.arm, one.metric)]
        assert one.scores == known.scores[1:]
    assert [one.tried for one in results.searched] == [one.tried for one in whole[1].searched]
    told = f"taken over for colour (from {file}): its scores and its seconds come from there"
    assert any(told in note for note in results.notes)
    # Its own first draw goes by it as well, and then has it for others.
    count = len(here.done)
    both = run_cycle(config_of(values, **MANY), tmp_path)
    assert not any("search" in path.parts for path in here.done[count:])
    assert {(one.arm, one.metric): one.scores for one in both.scores} == {
        (one.arm, one.metric): one.scores for one in whole[1].scores
    }
    own, given = (json.loads(one.read_text()) for one in (tmp_path / "search.json", file))
    assert own["search"] == given["search"]


def test_each_draw_has_labels_of_its_own_and_the_same_again(whole, values, tmp_path, monkeypatch):
    monkeypatch.setattr("rekindle.pipeline.cycle.run.run_counted", lambda *_: None)
    again = config_of(values, **MANY | {"search": {}})
    run_cycle(again, tmp_path)
    rows = {}
    for draw in ("0", "1"):
        task = Path("draws", draw, "tasks", "colour")
        files = [task / "train.jsonl", task / "test.jsonl"]
        for file in files:
            assert (tmp_path / file).read_bytes() == (whole[0] / file).read_bytes()
        rows[draw], test = (set((tmp_path / file).read_text().splitlines()) for file in files)
        assert len(test) == 10
    assert rows["0"] != rows["1"]
    alone = yaml.safe_load((tmp_path / "draws" / "1" / "run.yaml").read_text())
    assert (alone["seed"], alone["label_draws"]) == (1, 1)


def test_what_a_cycle_was_begun_with_is_held_to(whole, values, make_model, bytelevel):
    other = make_model("roberta", "AutoModelForMaskedLM", bytelevel, 9, **TINY)
    experts = values["experts"]
    for changed, words in (
        ({"experts": experts | {"model": str(other)}}, "other weights of .*its experts"),
        ({"experts": experts | {"finetune": {"epochs": 3}}}, r"finetune\.epochs: 2 there"),
        ({"experts": experts | {"teacher": "all"}}, r"experts\.teacher: 'best' there"),
        ({"students": 1}, "students: 2 there, 1 here"),
        ({"label_draws": 1}, "label_draws: 2, and now 1 are asked for.*Give another --out"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run_cycle(config_of(values, **MANY | changed), whole[0])


def test_no_text_of_a_test_is_read_and_that_is_said(whole, values, tmp_path):
    out, results = whole
    (text,) = results.texts
    assert (text.task, text.removed) == ("", True)
    assert any("test text" in note for note in results.notes)
    for draw in (out / "draws" / "0", out / "draws" / "1"):
        tests = draw / "tasks" / "colour" / "test.jsonl"
        assert load_config(draw / "stage1.yaml").corpus.without == (str(tests),)
        assert json.loads((draw / "costs" / "corpus" / "held.json").read_text())["removed"]


def test_test_texts_that_are_kept_are_counted(values, tmp_path):
    """In the text that is cached, of which there may be more."""
    documents = [f"the {word} is old and the {word} is far away" for word in WORDS]
    corpus = tmp_path / "text.jsonl"
    lines = [documents[0], f"they say that {documents[1]}, or so", *documents[2:]]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    tests = tmp_path / "test.jsonl"
    rows = [{"text": text, "label": 0} for text in (documents[1].upper(), documents[5], "x")]
    tests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "corpus": values["corpus"] | {"source": [str(corpus)], "limit_sequences": 3},
        "cache": {"path": str(tmp_path / "cache")},
    }
    file, out = tmp_path / "run.yaml", tmp_path / "held.json"
    file.write_text(yaml.safe_dump(run))
    functions.cache(file, (), tmp_path / "done.json", Report())
    functions.count_held_texts(file, [tests], out, Report())
    assert json.loads(out.read_text()) == {"exact": 1, "near": 0, "removed": False}
    corpus.unlink()
    functions.count_held_texts(file, [tests], out, Report())
    assert json.loads(out.read_text()) == {"exact": None, "near": None, "removed": False}


def test_experts_that_are_made_again_for_a_committee_are_named(values, tmp_path, caplog):
    caplog.set_level("INFO")
    made = tmp_path / "experts" / "colour" / "metrics.json"
    made.parent.mkdir(parents=True)
    words = "the experts on colour are fine-tuned again"
    for arms, finished, told in (
        (["committee"], False, False),
        (["kd"], True, False),
        (["committee"], True, True),
    ):
        if finished:
            made.touch()
        config = config_of(values, arms=arms)
        _log_repeated_experts(tmp_path, config, list(planned(tmp_path, config).values()))
        assert (words in caplog.text) == told


def test_all_draws_have_the_text_of_the_one_that_has_cached_it(values, tmp_path, nothing_runs):
    source, out = tmp_path / "text.txt", tmp_path / "out"
    source.write_text("".join(f"the {word} is far away\n" for word in WORDS))
    text = values["corpus"] | {"source": [str(source)]}
    config = config_of(values, corpus=text, label_draws=2)
    run_cycle(config, out, draw=0)  # plans alone
    run = {"corpus": text, "cache": {"path": str(out / "draws" / "0" / "cache")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    functions.cache(tmp_path / "run.yaml", (), tmp_path / "done.json", Report())
    run_cycle(config, out)
    source.write_text("it is shorter now\n")
    run_cycle(config, out, draw=0)
    with pytest.raises(CheckpointError, match=r"draw 1 .* another text than draw 0.*text\.txt"):
        run_cycle(config, out)
    begun = {"path": str(out / "draws" / "1" / "cache")}  # as an older version let it begin
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run | {"cache": begun}))
    functions.cache(tmp_path / "run.yaml", (), tmp_path / "done.json", Report())
    with pytest.raises(CheckpointError, match=r"draws 0 and 1 of the labels in .* different texts"):
        run_cycle(config, out, draw=1)


@pytest.mark.slow
def test_tasks_with_texts_of_their_own_one_after_the_other(values, tmp_path, here):
    """One of them of pairs, whose text is of pairs."""
    single, pairs = task_files(tmp_path, "colour"), task_files(tmp_path, "alike")
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in Path(pairs[split]).read_text().splitlines()]
        rows = [{"sentence1": r["text"], "sentence2": WORDS[0], "label": r["label"]} for r in rows]
        Path(pairs[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tmp_path / "pairs.jsonl"
    rows = [{"sentence1": f"{a} and {b}", "sentence2": b} for a in WORDS for b in WORDS]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"text_field": "sentence1", "pair_field": "sentence2"}
    pairs["corpus"] = {"source": [str(text)], **fields}
    single["corpus"] = {"source": values["corpus"]["source"]}
    common = {key: one for key, one in values["corpus"].items() if key != "source"}
    given = values | {"corpus": common, "tasks": [single, pairs], "test_texts": "keep"}
    config, out = config_of(given, arms=["mlm", "pseudo", "kd"]), tmp_path / "out"
    first = run_cycle(config, out, task="alike")
    assert {one.task for one in first.scores} == {"alike"}
    assert {one.arm for one in first.scores} >= {"expert", "start", "mlm", "pseudo", "kd"}
    whole = run_cycle(config, out)
    assert {one.task for one in whole.scores} == {"colour", "alike", "mean"}
    assert [one.task for one in whole.texts] == ["alike", "colour"]
    page = (out / "report.html").read_text()
    assert "on the text of alike" in page
    wrong = config_of(given, arms=["mixture"])
    with pytest.raises(InputError, match="expert on colour is on single texts"):
        run_cycle(wrong, tmp_path / "other")


# --- what is refused before anything runs ---------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch):
    for name in ("run_counted", "warm_up"):
        monkeypatch.setattr(f"rekindle.pipeline.cycle.run.{name}", lambda *_: None)


def test_a_slow_precision_is_said_before_any_job(values, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr("rekindle.pipeline.cycle.run.warm_up", lambda: None)
    ran = []

    def run_counted(*_):
        (line,) = [one for one in caplog.messages if "this CPU has no instructions" in one]
        ran.append(line.partition("for speed set ")[2])
        raise KeyboardInterrupt

    monkeypatch.setattr("rekindle.pipeline.cycle.run.run_counted", run_counted)
    slow = {"precision": "bf16"}
    task = values["tasks"][0] | {"finetune": slow}
    for name, changes in (
        ("tuned", {"tasks": [task], "train": values["train"] | slow}),
        ("searched", {"search": {"precision": ["fp32", "bf16"]}}),
    ):
        caplog.clear()
        with pytest.raises(KeyboardInterrupt):
            run_cycle(config_of(values, **changes), tmp_path / name, places=[Place(None, 1)])
    assert ran == [
        "train.precision: fp32, tasks.colour.finetune.precision: fp32",
        "search.precision: [fp32]",
    ]


def test_draws_are_added_and_not_taken_away(values, tmp_path, nothing_runs):
    many = {number: config_of(values, label_draws=number) for number in (1, 2, 3)}
    run_cycle(many[2], tmp_path)
    run_cycle(many[3], tmp_path, draw=2)
    run_cycle(many[3], tmp_path, draw=2)
    assert json.loads((tmp_path / "cycle.json").read_text())["draws_at_first"] == 2
    assert sorted(path.name for path in (tmp_path / "draws").iterdir()) == ["0", "1", "2"]
    with pytest.raises(CheckpointError, match="has 3 draws of the labels, and now 2 are asked for"):
        run_cycle(many[2], tmp_path)
    with pytest.raises(InputError, match="there is no draw 3: label_draws is 3, which are 0 to 2"):
        run_cycle(many[3], tmp_path, draw=3)
    with pytest.raises(InputError, match="--draw is for a cycle of several draws"):
        run_cycle(many[1], tmp_path / "other", draw=0)
    with pytest.raises(InputError, match="--task is for tasks that have texts of their own"):
        run_cycle(many[3], tmp_path, task="colour")


def test_a_search_that_is_not_finished_is_not_taken_over(values, tmp_path, nothing_runs):
    with pytest.raises(InputError, match="search for expert on colour is not finished: run --draw"):
        run_cycle(config_of(values, **MANY), tmp_path, draw=1)


def test_a_folder_that_takes_a_search_over_has_all_of_it(whole, values, tmp_path, nothing_runs):
    task = values["tasks"][0] | {"finetune": {"evaluate_every": 2}}  # as nothing depends on it
    file = whole[0] / "search.json"
    finetuning = values["finetune"] | {"evaluate_every": 3}
    config = config_of(values, **MANY, finetune=finetuning, tasks=[task])
    results = run_cycle(config, tmp_path, draw=1, searched=file)
    own, known = (home / "draws" / "0" for home in (tmp_path, whole[0]))
    for arm in ("expert", "start", "committee"):
        found, there = (read_search(one, arm, "colour", config.search) for one in (own, known))
        assert [(one.config, one.dev, one.seeds) for one in found] == [
            (one.config, one.dev, one.seeds) for one in there
        ]
    assert json.loads((own / "search/taken.json").read_text()) == {"colour": str(file)}
    told = f"taken over for colour (from {file}): its scores and its seconds come from there"
    assert any(told in note for note in results.notes)
    run_cycle(config, tmp_path, draw=0)  # which goes by it as well
    assert (own / "cycle.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": {"learning_rate": [1e-3, 4e-3]}}, r"settings\.search\.learning_rate.*0\.003"),
        ({"finetune": {"epochs": 2}}, r"settings\.finetune\.\w+ is"),
        ({"arms": ["committee", "mlm"]}, "lacks learning_rate 0.001 of mlm on colour.*Leave the"),
        ({"seed": 7}, r"settings\.seed is 0 there, but 7 here"),
        ({"search": {}}, "nothing is searched here"),
        ({"label_draws": 1}, "is for a cycle of several draws"),
    ],
)
def test_a_search_of_another_cycle_is_refused(
    whole, values, tmp_path, nothing_runs, changes, words
):
    with pytest.raises(InputError, match=words):
        run_cycle(
            config_of(values, **MANY | changes),
            tmp_path / "out",
            searched=whole[0] / "search.json",
        )
    assert not (tmp_path / "out").exists()


def test_a_search_of_other_content_is_refused(whole, values, tmp_path, nothing_runs, corpus_file):
    """Rows, text and start model are known by what they are, not by where they lie."""
    given = json.loads((whole[0] / "search.json").read_text())
    file = tmp_path / "search.json"

    def refused(change, words, out="out"):
        found = json.loads(json.dumps(given))
        change(found)
        file.write_text(json.dumps(found))
        with pytest.raises(InputError, match=words):
            run_cycle(config_of(values, **MANY), tmp_path / out, draw=1, searched=file)

    def scored(found):
        found["search"]["colour"]["start"][0]["per_seed"][0]["scores"]["accuracy"] = 2.0

    about = given["about"]
    rows = about["tasks"]["colour"]["files"]
    for change, words in (
        (lambda f: f["about"]["start"].update(weights="other"), "start.weights is 'other' there"),
        (lambda f: f["texts"].update({"": [[1, "other"]]}), r"text\..* is"),
        (lambda f: f["about"]["tasks"]["colour"].update(files={**rows, "more": "x"}), "files"),
        (lambda f: f["search"]["colour"].update(start=[{}]), "damaged: start on colour"),
        (lambda f: f["search"]["colour"]["start"].pop(), "lacks learning_rate"),
        (lambda f: f.update(search={}), "has no search of a task here"),
        (lambda f: f.update(written_by="nobody"), "is not the search of a cycle"),
        (lambda f: f.pop("about"), "is not the search of a cycle"),
    ):
        refused(change, words)
    assert not (tmp_path / "out").exists()
    moved = json.loads(json.dumps(given).replace(str(corpus_file.parent), "/elsewhere"))
    file.write_text(json.dumps(moved))
    run_cycle(config_of(values, **MANY), tmp_path / "here", draw=1, searched=file)
    refused(scored, "exists and differs from ", "here")


def test_draws_that_would_be_equal_are_refused(values, tmp_path):
    for task in (
        task_files(tmp_path, "colour"),
        task_files(tmp_path, "colour") | {"train_examples": 40},
    ):
        with pytest.raises(InputError, match=r"all would be the same rows.*Give train_examples"):
            run_cycle(config_of(values, label_draws=2, tasks=[task]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_have_no_class_to_teach(values, tmp_path):
    task = task_files(tmp_path, "score", (0.5, 1.5))
    together = values["experts"] | {"teacher": "all"}
    for changes, words in (
        ({"arms": ["pseudo"]}, "has no most likely class"),
        ({"arms": ["committee"]}, "only classifiers of one label.*leave it out of arms"),
        ({"arms": ["kd"], "experts": together}, r"the arm kd.*give experts\.teacher: best"),
    ):
        with pytest.raises(InputError, match=words):
            run_cycle(config_of(values, tasks=[task], **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_expert_can_be_of_is_refused(values, tmp_path):
    with pytest.raises(InputError, match=r"experts\.model: .*no such directory"):
        run_cycle(config_of(values, experts={"model": "/nowhere"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
