"""Rows of several documents, in both stages: all is as it is of each document alone."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.targets.codec import STEP
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.inspect import inspect_cache
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.text import format_plan
from rekindle.train.config import StudentConfig
from rekindle.train.hf.dataset import CacheDataset
from rekindle.train.loop import train_student
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import build_student
from rekindle.train.to_device import to_device
from testlib.loop import train_config
from testlib.vocabularies.dialogues import write_rows

LENGTH = 64
MASKED, CAUSAL = "masked_lm", "causal_lm"
WINDOW = {"local_attention": 8, "global_attn_every_n_layers": 2}
# name: family, task, tokenizer, more of its configuration
FAMILIES = {
    "bert": ("bert", MASKED, "wordpiece", {}),
    "roberta": ("roberta", MASKED, "wordpiece", {}),
    "modernbert": ("modernbert", MASKED, "wordpiece", WINDOW),
    "gpt2": ("gpt2", CAUSAL, "bytelevel", {}),
    "llama": ("llama", CAUSAL, "wordpiece", {}),
}
# What is masked follows from the teacher alone; other masks are drawn by what a row holds.
HARD = {"replicas": 1, "mask": {"policy": "hard", "teacher": "t"}}


@pytest.fixture(scope="module")
def model_of(make_model, request):
    def make(name, seed=0):
        family, task, tokenizer, more = FAMILIES[name]
        auto = "AutoModelForMaskedLM" if task == MASKED else "AutoModelForCausalLM"
        folder = request.getfixturevalue(tokenizer)
        # dropout draws another way in other shapes
        still = {} if family == "gpt2" else {"attention_dropout": 0.0}
        still |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        still |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return folder, make_model(family, auto, folder, seed, **more, **still)

    return make


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Short texts, and one that is longer than a row."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = "the old river runs under a new city and light falls over".split()  # noqa: SIM905
    counts = [5, 11, 3, 8, 90, 4, 14, 6, 2, 9, 12, 7]
    texts = [" ".join(words[(n * k) % 12] for k in range(n)) for n in counts]
    return str(write_rows(path, [{"text": text} for text in texts]))


@pytest.fixture(scope="module")
def caches(tmp_path_factory, make_cache, model_of, source):
    """caches(name) -> the same texts one by one, and packed."""
    made = {}

    def make(name):
        if name not in made:
            folder, model = model_of(name)
            task = FAMILIES[name][1]
            view = {"view": "clean"} if task == MASKED else {}
            kept = {"kind": "dense"}
            teacher = {"name": "t", "model": str(model), "task": task, "targets": kept, **view}
            found = []
            for packing in ("document", "packed"):
                corpus = {"tokenizer": str(folder), "packing": packing}
                corpus |= {"sequence_length": LENGTH, "limit_sequences": None}
                corpus |= {"domain_field": None, "source": source}
                path = tmp_path_factory.mktemp(f"{name}-{packing}") / "cache"
                make_cache(path, [teacher], corpus, HARD if task == MASKED else None)
                found.append(Cache.open(path))
            made[name] = found
        return made[name]

    return make


def documents_in(cache, number):
    """From where to where each document's tokens lie in a row."""
    shard, row = (int(part[0]) for part in cache.corpus.locate(np.array([number])))
    starts = cache.corpus.rows(shard, row, 1)["document_starts"][0].as_py()
    return zip(starts, [*starts[1:], len(cache.example(number).input_ids)], strict=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_says_of_each_document_what_it_says_of_it_alone(name, caches):
    alone, packed = caches(name)
    assert len(packed) < len(alone)
    whole = map(alone.example, range(len(alone)))
    for number in range(len(packed)):
        row = packed.example(number)
        (target,) = row.targets["t"]
        count = 0
        for start, stop in documents_in(packed, number):
            one = next(whole)
            assert row.input_ids[start:stop].tolist() == one.input_ids.tolist()
            (expected,) = one.targets["t"]
            here = (target.positions >= start) & (target.positions < stop)
            count += int(here.sum())
            assert (target.positions[here] - start).tolist() == expected.positions.tolist()
            assert target.gold_ids[here].tolist() == expected.gold_ids.tolist()
            # stored in steps, of values that differ by rounding
            found, wanted = (t.gold_log_prob for t in (target, expected))
            np.testing.assert_allclose(found[here], wanted, atol=1.01 / STEP)
        assert count == len(target.positions)
    assert next(whole, None) is None
    assert not verify_cache(str(packed.store.location)).problems


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_step_on_packed_documents_is_the_step_on_the_documents(name, caches, model_of, tmp_path):
    _, model = model_of(name, seed=1)
    found = []
    for cache in caches(name):
        more = {"steps": 1, "batch_sequences": len(cache), "held_out": 0, "warmup_steps": 0}
        config = train_config([{"teachers": ["t"]}], **more, micro_batch_sequences=7)
        about = StudentConfig(model=str(model), task=FAMILIES[name][1])
        result = train_student(cache, about, config, tmp_path / str(len(found)))
        (step,) = [
            one for one in read_metrics(tmp_path / str(len(found))) if one["kind"] == "train"
        ]
        found.append((step, result.coverage))
    (alone, covered), (packed, packed_covered) = found
    for key in ("loss", "ce", "kd/t", "grad_norm", "tokens"):
        assert packed[key] == pytest.approx(alone[key], rel=1e-4)
    positions = [key for key in covered if "positions" in key]
    assert [packed_covered[key] for key in positions] == [covered[key] for key in positions]


def test_the_last_token_of_a_document_predicts_nothing(caches):
    _, cache = caches("gpt2")
    batch = cache.gather(np.arange(len(cache)), [])
    rows, positions = batch.next_places
    expected = [
        (number, place)
        for number in range(len(cache))
        for start, stop in documents_in(cache, number)
        for place in range(start, stop - 1)
    ]
    assert [*zip(rows.tolist(), positions.tolist(), strict=True)] == expected
    part = batch.take(slice(1, 3))
    assert part.next_places[0].tolist() == [row - 1 for row in rows.tolist() if row in (1, 2)]


def test_a_plan_says_how_full_rows_will_be(tmp_path, configure, source, caches):
    full = caches("bert")[1].corpus.full
    corpus = {"packing": "packed", "sequence_length": LENGTH, "limit_sequences": None}
    config = configure(tmp_path / "c", [], corpus | {"domain_field": None, "source": source})
    told = " ".join(format_plan(plan_run(config, probe=False)).split())
    assert f"rows of several documents {full:.1%} full" in told


def test_what_packed_rows_are_is_said_and_older_versions_do_not_read_them(caches):
    alone, packed = caches("bert")
    assert "several documents in each, attention within each" in inspect_cache(
        packed.store.location
    )
    assert [cache.manifest["format_version"] for cache in (alone, packed)] == [3, 8]


def test_what_reads_texts_is_refused(tmp_path, configure, make_teacher, source):
    corpus = {"packing": "packed", "domain_field": None, "source": source}
    expert = make_teacher("sense", "sequence_classification")
    with pytest.raises(InputError, match="which have no common label"):
        cache_teachers(configure(tmp_path, [expert], corpus))


def test_domain_prompts_are_refused(model_of):
    config = StudentConfig(model=str(model_of("bert")[1]), domain_prompts=True)
    student = build_student(config, {}, 0, 0, domains=("a",))
    with pytest.raises(InputError, match="a sequence has one prompt"):
        student.check_packed(LENGTH)


def test_targets_made_elsewhere_are_refused(caches):
    with pytest.raises(InputError, match="saw a sequence as one text"):
        caches("gpt2")[1].import_targets("other", [], {"model": "m"})


def test_a_trainer_is_refused(caches):
    with pytest.raises(InputError, match="and a Trainer does not pass that on to its model"):
        CacheDataset(caches("gpt2")[1])


def test_contiguous_rows_may_be_read_so_too(tmp_path, make_cache, model_of, source):
    """Of a row each document's part, as it stands, is read alone."""
    folder, model = model_of("gpt2")
    teacher = {"name": "t", "model": str(model), "task": CAUSAL, "targets": {"kind": "dense"}}
    corpus = {"tokenizer": str(folder), "packing": "contiguous", "attention": "document"}
    corpus |= {"sequence_length": 32, "limit_sequences": 4, "domain_field": None, "source": source}
    cache = Cache.open(make_cache(tmp_path / "cache", [teacher], corpus).cache.path)
    read = AutoModelForCausalLM.from_pretrained(model).eval()
    several = 0
    for number in range(len(cache)):
        row = cache.example(number)
        positions, gold = [], []
        for start, stop in documents_in(cache, number):
            ids = torch.from_numpy(row.input_ids[start:stop].astype(np.int64))
            with torch.no_grad():
                log_probs = torch.log_softmax(read(ids[None]).logits[0], dim=-1)[:-1]
            positions += range(start, stop - 1)
            gold += log_probs.gather(1, ids[1:, None])[:, 0].tolist()
            several += start > 0
        (target,) = row.targets["t"]
        assert target.positions.tolist() == positions
        np.testing.assert_allclose(target.gold_log_prob, gold, atol=1.01 / STEP)
    assert several
    assert cache.manifest["format_version"] == 8


def test_attention_is_said_of_contiguous_rows_alone(tmp_path, configure):
    with pytest.raises(InputError, match="attention is for packing: contiguous"):
        configure(tmp_path, [], {"attention": "document"})


def test_a_loop_of_one_s_own_is_refused(caches):
    cache = caches("gpt2")[1]
    with pytest.raises(InputError, match="ignore which token belongs to which document"):
        to_device(cache.gather([0, 1], []), "cpu")
