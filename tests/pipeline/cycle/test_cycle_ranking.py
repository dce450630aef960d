"""A cycle whose task ranks documents: its splits are of whole groups, its expert scores the pairs
of a corpus of groups, and students learn their order.
"""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.inputs import _read, read_tasks, write_tasks
from rekindle.pipeline.cycle.page import printed
from rekindle.pipeline.cycle.run import run_cycle
from rekindle.pipeline.cycle.run_files import configs
from rekindle.pipeline.cycle.sections import CycleTask
from rekindle.train.finetune.config import ComparisonFinetuneConfig
from rekindle.train.finetune.task_data import read_task
from testlib.small_cycle.here import TINY, WORDS, Here, sections


def rows_of(split, queries, sizes=(3, 4, 5)):
    draw = random.Random(split)
    for query in range(queries):
        asked = f"{split} {draw.choice(WORDS)} {query}"
        for number in range(sizes[query % len(sizes)]):
            words = " ".join(draw.choices(WORDS, k=5))
            label = min(number, 2)
            yield {"query": asked, "document": words, "label": label, "group": query}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranking")


def task_of(folder, queries=12, **values):
    rows = [*rows_of("train", queries)]
    random.Random(0).shuffle(rows)
    files = {
        "train": write(folder / "train.jsonl", rows),
        "test": write(folder / "test.jsonl", rows_of("test", 5)),
    }
    return parse_settings(CycleTask, {"name": "search"} | files | values)


@given(st.integers(8, 30), st.integers(5, 60), st.one_of(st.none(), st.integers(6, 80)))
def test_a_group_is_in_one_split_and_whole(folder, queries, dev, limit):
    found = _read(task_of(folder, queries, dev_examples=dev, train_examples=limit), 3)
    assert found.metric == "ndcg@10"
    data = found.splits["train"]
    of = {name: {*data.groups[found.rows[name]].tolist()} for name in ("train", "dev")}
    assert not of["train"] & of["dev"]
    for name, groups in of.items():
        whole = np.isin(data.groups, [*groups])
        assert np.flatnonzero(whole).tolist() == found.rows[name].tolist()
        assert groups
    assert len(found.rows["dev"]) <= max(5, min(dev, len(data) // 5))
    if limit is not None:
        assert len(found.rows["train"]) <= max(5, limit)


def test_what_is_written_reads_as_the_same_groups(folder, tmp_path):
    found = _read(task_of(folder, 12), 0)
    write_tasks([found], tmp_path)
    files = {name: str(path) for name, path in found.files_in(tmp_path).items()}
    again = read_task(*files.values(), settings=found.own_settings(ComparisonFinetuneConfig()))
    for name, data in zip(files, again, strict=True):
        there, rows = found.splits[name], found.rows[name]
        assert data.labels.tolist() == there.labels[rows].tolist()
        assert [*data.group_names] == [there.group_names[row] for row in rows]
        assert data.pairs == [there.pairs[row] for row in rows]


@pytest.fixture
def values(folder, make_model, wordpiece):
    student = make_model("bert", "AutoModelForMaskedLM", wordpiece, 3, **TINY)
    texts = write(folder / "corpus.jsonl", rows_of("text", 8))
    made = sections(texts, student, [task_of(folder, 12).model_dump(exclude_unset=True)])
    fields = {"text_field": "query", "pair_field": "document", "group_field": "group"}
    made["corpus"] |= fields | {"limit_sequences": None}
    made["train"] |= {"batching": "groups", "batch_sequences": 12}
    return made | {"arms": ["kd"], "test_texts": "keep"}


def test_students_learn_the_order_within_groups_unless_they_are_told_otherwise(values, tmp_path):
    def terms(**changes):
        config = parse_settings(CycleConfig, values | changes).with_cache_in(tmp_path)
        made = configs(tmp_path, config, read_tasks(config, verbose=False))
        return made["students/kd-search.yaml"].train.objective.distill

    ((term),) = terms()
    assert (term.divergence, term.ranking.group, term.ranking.pairwise) == ("mse", "group", 1)
    ((term),) = terms(distill={"ranking": {"group": "batch", "pairwise": 0}})
    assert (term.ranking.group, term.ranking.pairwise) == ("batch", 0)
    ((term),) = terms(distill={"temperature": 2.0})  # for tasks of classes: no list is compared
    assert (term.temperature, term.ranking.group) == (1.0, "group")
    ((term),) = terms(distill={"temperature": 2.0, "ranking": {"listwise": 1}})
    assert (term.temperature, term.ranking.group) == (2.0, "batch")
    ((term),) = terms(corpus=values["corpus"] | {"group_field": None}, train={"steps": 2})
    assert term.ranking is None


def test_a_point_of_the_search_that_would_do_nothing_is_refused_before_anything_runs(
    values, tmp_path
):
    search = {"loss": ["listwise", "pairwise"], "grade_temperature": [1.0, 3.0]}
    config = parse_settings(CycleConfig, values | {"search": search})
    with pytest.raises(InputError, match="grade_temperature belongs to loss: listwise, but loss"):
        run_cycle(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cycle_of_a_ranker_says_how_well_each_arm_ranks(values, tmp_path, monkeypatch):
    monkeypatch.setattr("rekindle.pipeline.cycle.run.run_counted", Here())
    monkeypatch.setattr("rekindle.pipeline.cycle.run.warm_up", lambda: None)
    results = run_cycle(parse_settings(CycleConfig, values), tmp_path / "out")
    assert {(one.arm, one.metric) for one in results.scores} >= {
        (arm, metric) for arm in ("expert", "kd") for metric in ("ndcg@10", "mrr")
    }
    assert all(0 < one.mean <= 1 for one in results.scores if one.metric == "ndcg@10")
    assert "ndcg@10" in printed(tmp_path / "out", results)
    page = next((tmp_path / "out").glob("*.html")).read_text()
    assert "ndcg@10" in page
