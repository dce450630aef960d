"""The runs' task heads on a labelled file: `pipeline compare A B --test HEAD=FILE`."""

import json
import shutil
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from rekindle.data.errors import InputError
from rekindle.pipeline.builtin.names import resolve_name
from rekindle.pipeline.commands import asking
from rekindle.pipeline.compare import heads
from rekindle.pipeline.compare.heads import _score, with_heads
from rekindle.pipeline.compare.runs import compare_runs
from rekindle.pipeline.compare.standing import draw
from rekindle.pipeline.compare.tables import as_text
from rekindle.pipeline.progress import SILENT
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.evaluate import evaluate_file
from rekindle.train.answers.judge import judge_texts, open_judge
from rekindle.train.answers.labelled import read_labelled
from rekindle.train.embedding.texts import TextEncoder, describe_encoder
from rekindle.train.export.sentence_folder import write_beside
from rekindle.train.finetune.metrics import scores_of
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.network import HeadConfig
from testlib.answers.judges import classifier, saved_student
from testlib.command import pipeline
from testlib.encoders import encoder_folder

NAMES = ("desc", "enty", "num")
WORDS = ["river", "city", "engine", "light", "paper", "the", "old", "water"]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Of the test rows: how many there are, and that intervals are right, is test_standing.py's."""
    monkeypatch.setattr(heads, "draw", partial(draw, draws=200))


@pytest.fixture(scope="module")
def saved(make_model, wordpiece, tmp_path_factory):
    """saved(seed, **head) -> a student whose head says by its seed what texts are; 0: no head."""

    @cache
    def make(seed, **about):
        head = HeadConfig(kind="sequence", num_labels=3, label_names=NAMES, **about)
        model = make_model("bert", "AutoModelForMaskedLM", wordpiece, 5, hidden_size=16)
        folder = tmp_path_factory.mktemp("saved")
        saved_student(folder, model, {"trec": head} if seed else {}, seed)
        return folder

    return make


@pytest.fixture
def student(write, saved):
    """student(name, seed, **head): the run of a student as ``saved`` has it."""

    def make(name, seed, **about):
        run = write(name, seed=seed)
        shutil.copytree(saved(seed, **about), run, dirs_exist_ok=True)
        return run

    return make


@pytest.fixture
def students(student):
    """Runs a and b, whose heads say different things of texts, and c, which has none."""
    return [student(name, seed) for name, seed in (("a", 1), ("b", 2), ("c", 0))]


@pytest.fixture(scope="module")
def labelled(saved, tmp_path_factory):
    """What the first student says of 60 texts, but for every tenth."""
    path = tmp_path_factory.mktemp("labelled") / "test.jsonl"
    write_labelled(path, [NAMES[n % 3] for n in range(60)])
    judge = open_judge(str(saved(1)), "trec")
    logits, _ = judge_texts(judge, read_labelled(str(path), judge, AskConfig()), AskConfig())
    said = [judge.labels[n] for n in logits.argmax(axis=1)]
    labels = [NAMES[NAMES.index(n) - 1] if row % 10 == 0 else n for row, n in enumerate(said)]
    write_labelled(path, labels)
    return path


@pytest.fixture
def test_file(labelled, tmp_path):
    """A copy of the ``labelled`` file."""
    return Path(shutil.copy(labelled, tmp_path))


def write_labelled(path, labels):
    draw = np.random.default_rng(3)
    texts = [" ".join(draw.choice(WORDS, 1 + n % 9)) for n in range(len(labels))]
    rows = [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_heads_stand_first_with_intervals_over_the_rows(students, test_file, caplog):
    found = compare_runs(students)
    with caplog.at_level("INFO"):
        scored = with_heads(found, [f"trec={test_file}"], None, SILENT)
    (standing,) = scored.standings
    assert standing.best == "a"
    assert standing.scores.scores["a"] == [pytest.approx(0.9)]
    for name in "ab":
        own = evaluate_file(str(students["ab".index(name)]), str(test_file), head="trec")
        assert standing.scores.scores[name] == [own.value]
    (one,) = standing.differences
    assert one.low < one.mean < one.high
    assert standing.verdict.startswith("a is best on trec by 0.")
    assert standing.verdict.endswith("over b (accuracy 0.9000 on test.jsonl)")
    assert any("c has no head trec, and is not scored" in line for line in caplog.messages)
    assert as_text(scored, 200).splitlines()[0].strip() == f"{standing.verdict}."
    again = with_heads(found, [str(test_file)], "f1", SILENT).standings[0]  # the only head
    assert (again.scores.metric, again.as_dict()["metric"]) == ("f1", "f1")
    assert "(macro f1 0." in again.verdict  # of more than two classes


def test_an_expert_stands_among_the_runs_with_its_score_and_intervals(
    students, test_file, make_model, wordpiece
):
    expert = classifier(make_model, wordpiece, 7, *reversed(NAMES))
    name = f"expert {expert.rpartition('/')[2]}"
    own = evaluate_file(expert, str(test_file))
    for given in (expert, f"trec={expert}"):
        done = pipeline("compare", *students, "--test", test_file, "--expert", given, "--json")
        (task,) = json.loads(done.stdout)["tasks"]
        assert [*task["scores"]] == ["a", "b", name]
        assert task["scores"][name] == [own.value]
        (one,) = [one for one in task["differences"] if one["against"] == name]
        assert one["low"] < one["difference"] < one["high"]
    shown = as_text(
        with_heads(compare_runs(students), [str(test_file)], None, SILENT, None, [expert])
    )
    assert name in [line.strip()[: len(name)] for line in shown.splitlines()]


def test_places_of_compare_are_filled_in_behind_a_heads_name_too(monkeypatch):
    made = []
    monkeypatch.setattr(asking, "make_missing", lambda *places: made.extend(places))
    monkeypatch.setenv("WHERE", "/x")
    given = ["trec=$WHERE/t.jsonl", "a=b.jsonl", "python-docs/expert-part"]
    part = resolve_name("python-docs/expert-part")
    assert asking._resolve_experts(given) == ["trec=/x/t.jsonl", "a=b.jsonl", part]
    assert asking._resolve_experts(["part=python-docs/expert-part"]) == [f"part={part}"]
    assert made == ["/x/t.jsonl", "b.jsonl", part, part]


def test_a_place_may_have_an_equals_sign_with_a_heads_name_and_without(
    students, test_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lr=1").mkdir()
    own = test_file.rename(tmp_path / "lr=1" / "t.jsonl")
    found = compare_runs(students)
    for given in ("trec=~/lr=1/t.jsonl", "~/lr=1/t.jsonl", "trec=$HOME/lr=1/t.jsonl", str(own)):
        (place,) = asking._resolve_experts([given])
        assert place == ("trec=" if given.startswith("trec") else "") + str(own)
        assert heads._asked(place, found.runs) == ("trec", str(own))
    monkeypatch.chdir(tmp_path)
    assert asking._resolve_experts(["lr=1/t.jsonl"]) == ["lr=1/t.jsonl"]
    assert heads._asked("lr=1/t.jsonl", found.runs) == ("trec", "lr=1/t.jsonl")
    with pytest.raises(InputError, match="there is no file /no/lr=1"):
        heads._asked("/no/lr=1", found.runs)


def test_an_expert_that_is_given_twice_is_scored_once(
    students, test_file, make_model, wordpiece, caplog
):
    expert = classifier(make_model, wordpiece, 7, *NAMES)
    given = [compare_runs(students), [f"trec={test_file}"], None, SILENT, None]
    with caplog.at_level("INFO", "rekindle"):
        (standing,) = with_heads(*given, [expert, f"trec={expert}/."]).standings
    assert [*standing.scores.scores] == ["a", "b", f"expert {expert.rpartition('/')[2]}"]
    assert f"--expert trec={expert}/. is given twice, and scored once" in caplog.messages


def test_an_expert_is_asked_with_the_length_it_was_fine_tuned_with(
    students, test_file, make_model, wordpiece, tmp_path
):
    expert = tmp_path / "expert"
    shutil.copytree(classifier(make_model, wordpiece, 7, *NAMES), expert)
    record = {"written_by": "rekindle finetune", "metric": "accuracy", "config": {"max_length": 4}}
    (expert / "metrics.json").write_text(json.dumps(record))
    asked = [compare_runs(students), [str(test_file)], None, SILENT, None, [str(expert)]]
    (standing,) = with_heads(*asked).standings
    short = evaluate_file(str(expert), str(test_file), config=AskConfig(max_length=4))
    assert standing.scores.scores["expert expert"] == [short.value]
    assert short.cut > 0


def test_an_experts_labels_hold_from_the_probability_it_was_fine_tuned_with(
    student, make_model, wordpiece, tmp_path, caplog
):
    """Unless --set gives another."""
    several = {"problem_type": "multi_label_classification"}
    expert, path = tmp_path / "expert", tmp_path / "test.jsonl"
    shutil.copytree(classifier(make_model, wordpiece, 7, *NAMES, **several), expert)
    record = {"written_by": "rekindle finetune", "metric": "f1_micro", "config": {"threshold": 0.6}}
    (expert / "metrics.json").write_text(json.dumps(record))
    write_labelled(path, [[NAMES[n % 3], *NAMES[n % 2 : n % 3]] for n in range(60)])
    found = compare_runs([student("a", 1, problem="multi_label_classification")])
    scores = []
    for given in (AskConfig(), AskConfig(threshold=0.5)):
        with caplog.at_level("INFO", "rekindle"):
            (standing,) = with_heads(
                found, [str(path)], None, SILENT, given, [str(expert)]
            ).standings
        own = evaluate_file(str(expert), str(path), config=given)
        scores += standing.scores.scores["expert expert"]
        assert scores[-1] == own.value
    assert scores[0] != scores[1]
    told = [line for line in caplog.messages if line.startswith("expert expert, ")]
    assert told == ["expert expert, as it was fine-tuned: threshold=0.6"]


def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(
    students, test_file, monkeypatch
):
    monkeypatch.setattr("rekindle.pipeline.compare.heads.open_judge", None)
    found = compare_runs(students)
    for asked, words in (
        (f"mood={test_file}", "the runs have the heads trec, none is called 'mood'"),
        ("trec=no.jsonl", "there is no file no.jsonl"),
    ):
        with pytest.raises(InputError, match=words):
            with_heads(found, [asked], None, SILENT)
    with pytest.raises(InputError, match=r"has no column 'txt' .*--text-field"):
        with_heads(found, [str(test_file)], None, SILENT, AskConfig(text_field=("txt",)))
    for expert, words in (
        (f"mood={students[0]}", "a file for trec, and none for 'mood'"),
        (str(students[0]), "it is a student; name its directory among the runs"),
        ("no/such/place", "model 'no/such/place'"),
    ):
        with pytest.raises(InputError, match=words):
            with_heads(found, [str(test_file)], None, SILENT, None, [expert])
    with pytest.raises(InputError, match="no run has a task head"):
        with_heads(compare_runs(students[2:]), [str(test_file)], None, SILENT)
    (students[2] / "summary.json").unlink()
    checkpoint = students[2] / "checkpoints" / "step-00000003"
    with pytest.raises(InputError, match=r"c is not finished \(no checkpoint yet\): go on with"):
        with_heads(compare_runs(students[2:]), [str(test_file)], None, SILENT)
    shutil.copytree(students[0], checkpoint)
    line = f"pipeline evaluate {checkpoint} --test {test_file} --head trec"
    with pytest.raises(InputError, match=rf"c is not finished \(step 3 of .* by `{line}`"):
        with_heads(compare_runs(students[2:]), [f"trec={test_file}"], None, SILENT)


def test_one_command_says_which_run_is_best(students, test_file):
    done = pipeline("compare", *students, "--test", f"trec={test_file}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.lstrip().startswith("a is best on trec by 0.")
    wrong = pipeline("compare", *students, "--metric", "f1")
    assert (wrong.returncode, "--metric belongs to --test" in wrong.stderr) == (2, True)


def test_a_file_with_other_columns_is_read_as_the_advice_says(students, test_file):
    rows = [json.loads(line) for line in test_file.read_text().splitlines()]
    named = [{"question": row["text"], "kind": row["label"]} for row in rows]
    test_file.write_text("".join(json.dumps(row) + "\n" for row in named))
    typed = ["compare", *students[:2], "--test", test_file]
    lost = pipeline(*typed)
    assert (lost.returncode, "--text-field" in lost.stderr) == (2, True)
    done = pipeline(*typed, "--text-field", "question", "--label-field", "kind")
    assert done.returncode == 0, done.stderr
    assert done.stdout.lstrip().startswith("a is best on trec by 0.")


DRAW = np.random.default_rng(5)
TEXTS = [f"text {n}" for n in range(12)]
TAGS = ("O", "B-x", "I-x")
TASKS = {
    "classes": TaskData(TEXTS, None, DRAW.integers(0, 3, 12), NAMES),
    "two": TaskData(TEXTS, None, DRAW.integers(0, 2, 12), ("no", "yes"), "yes"),
    "several": TaskData(TEXTS, None, DRAW.random((12, 3)) > 0.5, NAMES, threshold=0.4),
    "tags": TaskData(TEXTS, None, DRAW.integers(0, 3, 24), TAGS, words=[["a", "b"]] * 12),
    "scores": TaskData(TEXTS, None, DRAW.random(12).astype(np.float32), ()),
}


@pytest.mark.parametrize("kind", TASKS)
def test_all_rows_together_score_what_the_model_scores(kind):
    """Also twice as many: every row counts as often as it is drawn."""
    data, names = TASKS[kind], TASKS[kind].label_names
    logits = DRAW.normal(size=(len(data.labels), len(names) or 1)).astype(np.float32)
    whole = scores_of(data, logits)
    for metric, value in whole.items():
        of, by_row = _score(data, logits, names, metric)
        assert of(np.arange(12)) == pytest.approx(value)
        assert of(np.tile(np.arange(12), 2)) == pytest.approx(value)
        if metric == "accuracy" and kind != "tags":
            right = logits.argmax(axis=1) == data.labels
            assert of(np.array([3, 3, 7])) == pytest.approx(right[[3, 3, 7]].mean())
        assert (by_row is None) == ("accuracy" not in metric or kind == "tags")
        if by_row is not None:
            assert by_row.mean() == pytest.approx(value)


def test_rankers_stand_with_intervals_over_the_groups(write, make_model, wordpiece, tmp_path):
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, 5, hidden_size=16)
    score = HeadConfig(kind="sequence", num_labels=1, problem="regression")
    runs = [write(name, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    for seed, run in enumerate(runs, start=1):
        saved_student(run, model, {"search": score}, seed)
    random = np.random.default_rng(4)
    rows = [
        {"query": f"river {n % 40}", "document": " ".join(random.choice(WORDS, 4)), "group": n % 40}
        | {"label": n // 40 if n % 40 else 1}
        for n in range(160)
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (one,) = with_heads(compare_runs(runs), [f"search={path}"], None, SILENT).standings
    assert (one.scores.metric, one.rows, one.unit) == ("ndcg@10", 39, "group")
    for name, run in zip("ab", runs, strict=True):
        own = evaluate_file(str(run), str(path), head="search")
        assert one.scores.scores[name] == [pytest.approx(own.value)]
    assert one.differences[0].low < one.differences[0].mean < one.differences[0].high


def test_encoders_stand_by_the_rank_correlation_of_their_cosines(
    write, make_model, wordpiece, tmp_path
):
    """Without any setting, on a file whose columns have the usual names."""
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, 5, hidden_size=16)
    body = make_model("bert", "AutoModel", wordpiece, 6, hidden_size=16)
    teacher = encoder_folder(tmp_path / "teacher", body, {"pooling_mode": "mean"})
    run = write("a")
    vectors = HeadConfig(kind="embedding", num_labels=16, pooling="mean", normalise=True)
    student = saved_student(run, model, {"teacher": vectors})
    write_beside(student, 32, run)
    random = np.random.default_rng(4)
    first, second = ([" ".join(random.choice(WORDS, 4)) for _ in range(20)] for _ in range(2))
    rows = [
        {"sentence1": a, "sentence2": b, "label": n / 4}
        for n, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    typed = ("compare", run, "--expert", teacher, "--test", path)
    alone = pipeline(*typed, "--text-field", "sentence1")
    told = " ".join(alone.stderr.split())
    assert (alone.returncode, "name the two columns with --text-field" in told) == (2, True)
    done = pipeline(*typed, "--json")
    assert done.returncode == 0, done.stderr
    (task,) = json.loads(done.stdout)["tasks"]
    assert task["metric"] == "spearman"
    for name, place in (("a", run), ("expert teacher", teacher)):
        encoder = TextEncoder.of(describe_encoder(str(place)))
        a, b = (encoder.vectors(texts).astype(np.float64) for texts in (first, second))
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        wanted = spearmanr(cosines, np.arange(20)).statistic
        assert task["scores"][name] == [pytest.approx(wanted)]


def test_of_a_cycle_of_several_corpora_it_is_said_what_to_type(write, tmp_path, monkeypatch):
    """Its draws, or the texts of its tasks."""
    monkeypatch.chdir(tmp_path)

    def run(name, head, corpus):
        place = write(name, corpus=corpus)
        (place / "rekindle_student.json").write_text(json.dumps({"heads": {head: {}}}))

    for place in ("a", "a/draws/0", "a/draws/1", "b"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "cycle.json").write_text('{"written_by": "rekindle cycle"}')
    for number in (0, 1):
        run(f"a/draws/{number}/students/kd-size", "size", f"c{number}")
    for task in ("size", "hue"):
        run(f"b/students/kd-{task}", task, task)
        run(f"b/students/both-{task}", task, task)
    options = ["--test", "size=s.jsonl", "--metric", "f1", "--set", "batch_size=8"]
    done = pipeline("compare", "a", *options)
    assert (done.returncode, done.stdout) == (2, "")
    told = " ".join(done.stderr.split())
    assert "a cycle of several draws of the labels" in told
    for number in (0, 1):
        line = f"pipeline compare a/draws/{number} {' '.join(options)}"
        assert f"`{line}`" in told
    told = " ".join(pipeline("compare", "b", *options, "--test", "hue=h.jsonl").stderr.split())
    assert "a cycle whose tasks have texts of their own" in told
    for task, file in (("size", "s"), ("hue", "h")):
        runs = f"b/students/both-{task} b/students/kd-{task}"
        assert f"`pipeline compare {runs} --test {task}={file}.jsonl --metric f1 --set b" in told
    told = pipeline("compare", "b/students/kd-hue", "--test", "hue=h.jsonl").stderr
    assert "there is no file" in told  # and no more of cycles
