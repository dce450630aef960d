"""The experiment on CLINC150: who sees which text, how answers are judged, a toy run of
all of it.
"""

import json
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rekindle.data.cache import Cache
from rekindle.train.answers.score import score_model
from rekindle.train.finetune.config import FinetuneConfig

DOMAINS = [f"domain {letter}" for letter in "jihgfedcba"]  # ten, as CLINC150 has
WORDS = ["alpha", "river", "stone", "the", "of", "history", "music", "is", "a"]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import muki_clinc
    finally:
        del sys.path[0]
    return muki_clinc


@pytest.fixture(scope="module")
def tables(bench: ModuleType) -> ModuleType:
    return sys.modules["muki_clinc_tables"]


def rows_of_intents(texts: int, intents: int = 2) -> list[dict[str, str]]:
    """Return rows of two intents a domain, every text different."""
    draw = random.Random(0)
    return [
        {"text": f"{' '.join(draw.choices(WORDS, k=3))} {d} {i} {n}", "label": f"{d} {i}"}
        | {"domain": domain}
        for d, domain in enumerate(DOMAINS)
        for i in range(intents)
        for n in range(texts)
    ]


def texts_of(rows: list[dict[str, str]]) -> list[str]:
    return [row["text"] for row in rows]


def check_splits(bench: ModuleType, train: list, dev: list, size: object) -> None:
    made = sys.modules["muki_clinc_texts"].splits(train, dev, size.texts)
    assert not set(texts_of(made["experts"])) & set(texts_of(made["seen"]))
    intents = {row["label"] for row in train}
    for name, count in (
        ("experts", size.texts.expert),
        ("seen", size.texts.seen),
        ("dev", size.texts.dev),
    ):
        labels = [row["label"] for row in made[name]]
        assert {label: labels.count(label) for label in intents} == dict.fromkeys(intents, count)
        parts = [made[f"{name}-{group}"] for group in bench.GROUPS]
        # Every text is in exactly one group, and so is every intent.
        assert sorted(text for part in parts for text in texts_of(part)) == sorted(
            texts_of(made[name])
        )
        known = [{row["label"] for row in part} for part in parts]
        assert set.union(*known) == intents
        assert sum(map(len, known)) == len(intents)
        assert [len({row["domain"] for row in part}) for part in parts] == [3, 3, 4]


@pytest.mark.parametrize("name", ["toy", "cpu", "gpu"])
def test_no_text_teaches_an_expert_and_a_student_and_no_intent_has_two_experts(
    bench: ModuleType, name: str
) -> None:
    check_splits(bench, rows_of_intents(100), rows_of_intents(20), bench.SIZES[name])


def test_the_same_of_the_published_files(bench: ModuleType, shared: Path) -> None:
    train, dev = (bench.read_rows(shared / "cls" / f"clinc150_{n}.jsonl") for n in ("train", "val"))
    check_splits(bench, train, dev, bench.SIZES["gpu"])


@given(st.integers(0, 2**32 - 1))
def test_answers_are_judged_among_all_labels_and_within_a_group(
    bench: ModuleType, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    rows = rows_of_intents(3)
    labels = sorted({row["label"] for row in rows})
    draw.shuffle(labels)
    values = draw.normal(size=(len(rows), len(labels)))
    found = bench.judge(values, labels, rows)

    answers = [labels[place] for place in values.argmax(axis=1)]
    right = np.array([a == row["label"] for a, row in zip(answers, rows, strict=True)])
    assert found["accuracy"] == right.mean()
    for group, domains in bench.domains_of(rows).items():
        own = [n for n, row in enumerate(rows) if row["domain"] in domains]
        assert found["by group"][group] == right[own].mean()
        theirs = {rows[n]["label"] for n in own}
        inside = [
            max(theirs, key=lambda label: values[n, labels.index(label)]) == rows[n]["label"]
            for n in own
        ]
        assert found["within group"][group] == np.mean(inside)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9, unique=True))
def test_the_interval_is_the_one_of_the_t_test(tables: ModuleType, values: list[float]) -> None:
    found = tables.spread(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([low, high], abs=1e-12)
    assert found["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)


def test_differences_are_of_the_same_seed(bench: ModuleType, tables: ModuleType) -> None:
    runs = {
        bench.MUKI: {0: {"accuracy": 0.9}, 1: {"accuracy": 0.6}, 2: {"accuracy": 0.1}},
        bench.UNIFORM: {1: {"accuracy": 0.5}, 0: {"accuracy": 0.7}},
        bench.ORACLE: {2: {"accuracy": 0.4}},
    }
    found = {(d["of"], d["minus"]): d for d in tables.differences(runs, bench.COMPARED)}
    one = found[bench.MUKI, bench.UNIFORM]
    assert one["seeds"] == 2
    assert one["accuracy"] == pytest.approx(0.15)
    assert one["p"] == pytest.approx(stats.ttest_rel([0.9, 0.6], [0.7, 0.5]).pvalue)
    other = found[bench.MUKI, bench.ORACLE]
    assert other["accuracy"] == pytest.approx(-0.3)
    assert other["p"] is None  # a single pair shows no spread
    assert len(found) == 2  # nothing is said about what was not run


@pytest.fixture(scope="module")
def toy(bench, make_model, wordpiece, tmp_path_factory):
    """(work, model) of a finished toy run with two kinds of students."""
    folder = tmp_path_factory.mktemp("clinc")
    data, work = folder / "published", folder / "work"
    data.mkdir()
    for name, texts in (("train", 8), ("val", 2), ("test", 2)):
        rows = rows_of_intents(texts)
        (data / f"clinc150_{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    small = {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.1}
    model = str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 0, **small))
    kept = bench.OTHERS
    bench.OTHERS = kept[:1] + kept[4:5]  # one more student, and the oracle without a pooler
    size = bench.SIZES["toy"]._replace(seeds=1, oracles=1)
    bench.run(work, data, model, size)
    yield work, data, model, size
    bench.OTHERS = kept


@pytest.mark.slow
def test_students_see_every_text_by_itself_and_no_label(bench, toy) -> None:
    work = toy[0]
    seen, corpus = (bench.read_rows(work / "data" / f"{n}.jsonl") for n in ("seen", "corpus"))
    assert corpus == [{"text": row["text"]} for row in seen]
    cache = Cache.open(str(work / "cache"))
    batch = cache.gather(np.arange(len(cache)), [])
    assert len(cache) == len(seen)
    assert all(len(starts) == 1 for starts in cache.corpus.shard(0).batch(0)["document_starts"])
    assert set(batch.lengths) <= set(range(3, 41))


@pytest.mark.slow
def test_a_student_is_judged_as_the_command_scores_it(bench, tables, toy, tmp_path) -> None:
    work, test = toy[0], str(toy[0] / "data" / "test.jsonl")
    runs = tables.judged_runs(work, [bench.MUKI, bench.UNIFORM, bench.ORACLE])
    for name in (bench.MUKI, bench.UNIFORM):
        made = next((work / "students").glob(f"{name[:4]}*-0"))
        scored = score_model(
            str(made), test, test, str(tmp_path / name), config=FinetuneConfig(epochs=0)
        )
        assert runs[name][0]["accuracy"] == pytest.approx(scored.mean)
    steps = json.loads((work / "students" / "uniform-mixture-0" / "summary.json").read_text())
    for name in ("", "-fresh-pooler"):
        made = work / "oracles" / f"oracle-the-same-texts{name}-0"
        supervised = json.loads((made / "metrics.json").read_text())
        assert steps["steps"] == supervised["per_seed"][0]["epochs"][-1]["steps"] == 10


@pytest.mark.slow
def test_a_finished_run_is_not_done_again(bench, toy, monkeypatch) -> None:
    work, data, model, size = toy
    before = {file: file.stat().st_mtime_ns for file in work.glob("[ds]*/**/*") if file.is_file()}
    for name in ("finetune", "train_from_config", "expert_output"):
        monkeypatch.setattr(bench, name, None)
    bench.run(work, data, model, size)
    after = {file: file.stat().st_mtime_ns for file in work.glob("[ds]*/**/*") if file.is_file()}
    changed = {file.name for file in before if after[file] != before[file]}
    assert before.keys() == after.keys()
    assert changed <= {"targets.json"}  # made from the cache each time


@pytest.mark.slow
def test_tables_of_what_is_there(bench, tables, toy, tmp_path, monkeypatch) -> None:
    found = bench.results(toy[0], toy[2], "toy")
    text = tables.markdown(found)
    for name in ("group-1 alone", "MUKI, hard", f"student: {bench.MUKI}", bench.ORACLE):
        assert f"| {name} |" in text
    by_name = {(row["kind"], row["name"]): row for row in found["rows"]}
    one = by_name["student", bench.UNIFORM]
    assert f"| student: {bench.UNIFORM} | 1 | {100 * one['accuracy']:.2f} |" in text
    assert json.loads((toy[0] / "results.json").read_text())["rows"] == found["rows"]
