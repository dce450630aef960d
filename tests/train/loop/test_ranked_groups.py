"""A student learns the order of a corpus's groups: the loss by hand, however a step is drawn, cut
and shared out; what cannot rank is refused before the first step.
"""

import json
import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train.answers.evaluate import evaluate_file
from rekindle.train.config import TrainConfig
from rekindle.train.export.folder import export_head
from rekindle.train.order.held_out import group_numbers, split_corpus
from rekindle.train.order.sequences import choose_sequences
from rekindle.train.ranking.scores import ranking_scores
from testlib.loop import run, stop_at, train_config
from testlib.models import NARROW, STILL
from testlib.objective.cases import alone, term
from testlib.objective.setting import Setting, same_step
from testlib.several.forked import end_well, forked_world
from testlib.students import assert_same_run, metrics, same_weights

SIZES = [3, 2, 4, 1, 3, 5, 2, 4, 3, 3, 2, 4]  # of the groups
RANK = {"group": "group", "pairs": "best", "pointwise": 0.3, "listwise": 2.0}
ORDERED = {"batching": "groups", "batch_sequences": 8, "held_out": 0.2, "evaluate_every": 3}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world_of(tmp_path_factory, wordpiece, make_teacher, make_cache, make_model):
    """world_of(records): a cache of pairs in groups, with a regression expert that read them."""

    def make(records, **corpus):
        folder = tmp_path_factory.mktemp("ranked")
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
        given = {"source": [str(folder / "pairs.jsonl")], "tokenizer": str(wordpiece)}
        given |= {"text_field": "query", "pair_field": "passage", "domain_field": None}
        given |= {"sequence_length": 24, "limit_sequences": None} | corpus
        score = make_teacher("score", "regression", 7, NARROW)
        sense = make_teacher("sense", "sequence_classification", 6, NARROW | {"num_labels": 3})
        big = make_teacher("big", "masked_lm", 1, NARROW, targets={"kind": "topk", "k": 4})
        where = {"sequences_per_shard": 7, "mask": {}}
        make_cache(folder / "cache", [score, sense, big], given, where)
        student = make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **NARROW, **STILL)
        return SimpleNamespace(
            path=folder / "cache", student=student, open=lambda: Cache.open(folder / "cache")
        )

    from rekindle.data.cache import Cache

    return make


def records(sizes, scattered=False):
    words = ["old", "city", "river", "walls", "stone", "market", "bridge"]
    found = []
    for g, size in enumerate(sizes):
        query = {"group": f"q{g}", "query": f"the {words[g % 7]} of the"}
        found += [query | {"passage": f"{w} {words[g % 5]}"} for w in (words * 2)[g : g + size]]
    order = np.random.default_rng(4).permutation(len(found))
    return [found[i] for i in order] if scattered else found


@pytest.fixture(scope="module")
def world(world_of):
    return world_of(records(SIZES), group_field="group")


@pytest.fixture(scope="module")
def scattered(world_of):
    """Of a source in which other groups' records stand between those of one."""
    return world_of(records(SIZES, scattered=True), group_field="group")


@pytest.mark.parametrize("values", [RANK, RANK | {"pairs": "all", "listwise": 0.5}])
def test_a_step_is_the_losses_of_its_groups_by_hand(scattered, values):
    """A shuffled one: of some groups it has all sequences, of others some, of others one. In
    micro-batches and in processes with groups torn apart it is the same.
    """
    objective = alone(term("score", ranking=values, temperature=2.0, weight=0.4))
    setting = Setting(scattered, objective, batch=range(3, 20))
    setting.check()
    whole = setting.run()
    for micro in (5, 1):
        same_step(setting.run(micro=micro), whole)
    same_step(setting.run_apart(2), whole)


# --- whole runs ---


def ranked(**values):
    distill = [term("score", ranking=RANK, temperature=0.5)]
    return train_config(distill, **ORDERED | {"steps": 6} | values)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return run(world, out, ranked())


def test_micro_batches_that_tear_groups_train_the_same_student(world, whole, tmp_path):
    run(world, tmp_path / "run", ranked(micro_batch_sequences=3))
    assert_same_run(tmp_path / "run", whole.directory)


def test_a_run_of_groups_goes_on_to_the_same_bits(world, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "run", ranked(), report=stop_at(4))
    run(world, tmp_path / "run", ranked(), resume=True)
    assert same_weights(tmp_path / "run", whole.directory)
    assert metrics(tmp_path / "run") == metrics(whole.directory)


def test_two_processes_train_the_student_of_one(world, whole, tmp_path):
    """Their shares of a step are not always equally large."""
    train = ranked(micro_batch_sequences=2).model_dump(mode="json", by_alias=True)
    job = {"student": {"model": str(world.student)}, "train": train, "out": str(tmp_path / "run")}
    given = tmp_path / "jobs.json"
    given.write_text(json.dumps({"cache": str(world.path), "jobs": [job]}))

    def work():
        sys.argv = [str(ROOT / "torchrun_jobs.py"), str(given)]
        runpy.run_path(sys.argv[0], run_name="__main__")

    end_well(forked_world(work))
    assert_same_run(tmp_path / "run", whole.directory)


def test_the_students_head_ranks_a_labelled_file_also_when_it_is_exported(whole, tmp_path):
    """NDCG@10, MRR and MAP by its own scores, asked of transformers alone."""
    grades = [n % 3 for n in range(len(records(SIZES)))]
    rows = [
        {"group": one["group"], "query": one["query"], "document": one["passage"], "label": grade}
        for one, grade in zip(records(SIZES), grades, strict=True)
    ]
    test, out = tmp_path / "test.jsonl", tmp_path / "exported"
    test.write_text("\n".join(map(json.dumps, rows)))
    export_head(str(whole.directory), str(out), "score")
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.num_labels == 1
    pairs = [(row["query"], row["document"]) for row in rows]
    with torch.no_grad():
        logits = model(**tokenizer(pairs, padding=True, return_tensors="pt")).logits
    assert logits.shape == (len(rows), 1)
    groups = np.unique([row["group"] for row in rows], return_inverse=True)[1]
    expected = ranking_scores(logits[:, 0].numpy(), np.array(grades, float), groups)
    for found in (
        evaluate_file(str(whole.directory), str(test), head="score"),
        evaluate_file(str(out), str(test)),
    ):
        assert found.metric == "ndcg@10"
        assert found.scores == pytest.approx(expected, abs=1e-6)


# --- what is held out ---


@pytest.mark.parametrize("which", ["world", "scattered"])
def test_no_group_is_on_both_sides(which, request):
    cache = request.getfixturevalue(which).open()
    numbers = group_numbers(cache.corpus)
    names = [*cache.gather(np.arange(len(cache)), []).groups]
    known = [*dict.fromkeys(names)]
    assert numbers.tolist() == [known.index(name) for name in names]
    split = split_corpus(cache, 0.3)
    train, held_out = (
        numbers[side.select(np.arange(len(side)))] for side in (split.train, split.held_out)
    )
    assert len(train) > 0 < len(held_out)
    assert not {*train.tolist()} & {*held_out.tolist()}
    if which == "world":  # where groups stand together none is torn
        assert len(train) + len(held_out) == len(cache)
        config = ranked(held_out=0.3, evaluate_sequences=5)
        chosen = choose_sequences(cache, config).held_out
        for group in {*numbers[chosen].tolist()}:
            assert (numbers[chosen] == group).sum() == (numbers == group).sum()
        assert len(chosen) < len(held_out)


# --- refused before the first step ---

REFUSED = [
    ({"batch_sequences": 4}, "'q5' has 5 sequences, more than train.batch_sequences 4"),
    (
        {"objective": {"distill": [term("sense", ranking={"group": "group"})]}},
        "whose score is an order, but 'sense' is a single_label_classification",
    ),
]


@pytest.mark.parametrize(("values", "told"), REFUSED)
def test_what_cannot_rank_is_refused(world, tmp_path, values, told):
    with pytest.raises(InputError) as error:
        run(world, tmp_path / "run", ranked(held_out=0.0, **values))
    assert told in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_corpus_without_groups_or_with_one_sequence_in_each_is_refused(world_of, tmp_path):
    plain = world_of(records([1] * 9))
    for values, key in (({}, "train.objective.distill.0.ranking.group"),
                        ({"objective": {}}, "train.batching")):  # fmt: skip
        with pytest.raises(InputError, match=f"{key} needs groups, .* set corpus.group_field"):
            run(plain, tmp_path / "run", ranked(**values))
    lone = world_of(records([1] * 9), group_field="group")
    for batching in ("groups", "shuffled"):
        with pytest.raises(InputError, match=r"each of the 7 groups .* has one sequence"):
            run(lone, tmp_path / "run", ranked(batching=batching))


@pytest.mark.parametrize(
    "more", [{"replay": {"domains": ["a"]}}, {"curriculum": {"teacher": "score"}}]
)
def test_what_chooses_single_sequences_is_refused_beside_whole_groups(more):
    with pytest.raises(InputError, match=f"whole groups, and {next(iter(more))} chooses single"):
        parse_settings(TrainConfig, {"steps": 9, "batching": "groups"} | more)


def test_shuffled_steps_that_tear_groups_are_told_of(world, caplog):
    caplog.set_level(logging.INFO, "rekindle")
    choose_sequences(world.open(), ranked(batching="shuffled", held_out=0.0))
    choose_sequences(world.open(), ranked(held_out=0.0))
    told = caplog.text
    assert "train.batching: shuffled a sequence shares its step with about 0.47 of the 2.29" in told
    assert "12 groups of 1 to 5 sequences; a step reads whole ones, about 8" in told
