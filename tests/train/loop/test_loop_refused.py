"""Runs that stop at a bad number, and runs that are refused before they begin."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.storage.seal import SEAL, seal
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.masking import MaskConfig
from rekindle.train.config import StudentConfig
from rekindle.train.loop import train_student
from rekindle.train.objective.objective import MicroBatchLoss, Objective
from rekindle.train.order.held_out import split_corpus
from rekindle.train.order.sequences import Order
from rekindle.train.order.stream import TrainingStream
from rekindle.train.student import Student
from testlib.loop import (
    ALL,
    no_reader_left,
    refused,
    run,
    sequences,
    train_config,
)
from testlib.students import metrics


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_loss_that_is_not_finite_stops_the_run(masked_world, tmp_path, monkeypatch, clip):
    loss = Objective.loss

    def broken(self, student, batch, counts, plan, device):
        result = loss(self, student, batch, counts, plan, device)
        return result._replace(total=result.total * torch.nan) if plan.step == 5 else result

    monkeypatch.setattr(Objective, "loss", broken)
    with pytest.raises(InputError, match=r"the loss is nan at step 6\. Its 6 examples are listed"):
        run(masked_world, tmp_path / "run", train_config(max_grad_norm=clip))
    assert no_reader_left()
    assert len(metrics(tmp_path / "run")) == 6  # five steps and an evaluation
    suspect = json.loads((tmp_path / "run/stopped-at-step-00000006.json").read_text())
    cache = masked_world.open()
    view = cache.masked_view().name
    order = Order(split_corpus(cache, 0.1).train, 6, 0)
    stream = TrainingStream(cache, order, lambda step: [], view)
    assert suspect["sequences"] == stream.batch(5).index.tolist()
    assert suspect["digests"] == [cache.example(i).digest for i in suspect["sequences"]]
    assert suspect["reason"] == "the loss is nan"


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_stops_the_run(masked_world, tmp_path, monkeypatch, clip):
    """A finite loss with an infinite gradient would poison the weights and the next checkpoint."""
    loss = Objective.loss

    def broken(self, student, batch, counts, plan, device):
        result = loss(self, student, batch, counts, plan, device)
        weight = next(student.parameters())
        spike = (weight.sum() * 0).sqrt() if plan.step == 3 else 0.0
        return MicroBatchLoss(result.total + spike, result.terms)

    monkeypatch.setattr(Objective, "loss", broken)
    chosen = train_config(checkpoint_every=1, max_grad_norm=clip)
    with pytest.raises(InputError, match="the grad_norm is nan at step 4"):
        run(masked_world, tmp_path / "run", chosen)
    last = Student.from_pretrained(tmp_path / "run/checkpoints/step-00000003")
    assert all(torch.isfinite(p).all() for p in last.parameters())


def test_an_error_of_the_reader_stops_the_run(masked_world, tmp_path, monkeypatch):
    batch = TrainingStream.batch

    def broken(self, step):
        if step == 3:
            raise OSError("the disk is on fire")
        return batch(self, step)

    monkeypatch.setattr(TrainingStream, "batch", broken)
    with pytest.raises(OSError, match="on fire"):
        run(masked_world, tmp_path / "run")
    assert no_reader_left()
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3]


def test_another_tokenizer_is_refused(masked_world, make_model, tmp_path):
    tokens = sorted(masked_world.open().corpus.tokenizer.hf.get_vocab().items(), key=lambda t: t[1])
    names = [token for token, _ in tokens]
    names[50], names[51] = names[51], names[50]
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "vocab.txt").write_text("\n".join(names) + "\n")
    from transformers import BertTokenizerFast

    BertTokenizerFast(vocab=str(other / "vocab.txt")).save_pretrained(other)
    model = make_model("bert", "AutoModelForMaskedLM", other)
    refused(masked_world, tmp_path, "has another tokenizer than the corpus.*id 50 is", model=model)


def test_a_student_without_tokenizer_files_needs_a_large_enough_vocabulary(
    masked_world, make_model, wordpiece, tmp_path
):
    size = load_tokenizer(str(wordpiece)).size
    for less in (0, 1):
        made = make_model("bert", "AutoModelForMaskedLM", wordpiece, vocab_size=size - less)
        bare = tmp_path / f"bare-{less}"
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(made / name, bare)
    run(masked_world, tmp_path / "run", train_config(steps=1), model=tmp_path / "bare-0")
    message = f"vocabulary of {size - 1}, but the ids of the corpus tokenizer go up to {size - 1}"
    refused(masked_world, tmp_path, message, model=tmp_path / "bare-1")


def test_a_student_that_takes_shorter_sequences_is_refused(
    masked_world, make_model, wordpiece, tmp_path
):
    short = make_model("bert", "AutoModelForMaskedLM", wordpiece, max_position_embeddings=23)
    refused(masked_world, tmp_path, "takes at most 23 tokens, .* up to 24", model=short)


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ([{"teachers": ["bigg"]}], r"no teacher 'bigg' \(it has: big, even.lm,"),
        ([{"teachers": ["big"], "temperature": 3.0}], "stores the temperatures"),
        ([{"teachers": ["big"], "k": 9}], "teacher 'big' keeps 8 candidates; k = 9"),
    ],
)
def test_what_the_cache_does_not_have_is_refused(masked_world, tmp_path, distill, message):
    refused(masked_world, tmp_path, message, train_config(distill))


def test_a_causal_student_cannot_learn_from_a_masked_teacher(
    masked_world, make_model, wordpiece, tmp_path
):
    model = make_model("gpt2", "AutoModelForCausalLM", wordpiece)
    student = StudentConfig(model=str(model), task="causal_lm")
    chosen = train_config([{"teachers": ["big"]}])
    with pytest.raises(InputError, match="a causal_lm student has no loss at its positions"):
        train_student(masked_world.open(), student, chosen, tmp_path / "run")
    # Text experts have no such bounds.
    chosen = train_config([{"teachers": ["sense"]}], steps=1)
    found = train_student(masked_world.open(), student, chosen, tmp_path / "run")
    assert found.coverage["sequences_with_kd"] == 6


def test_a_masked_student_needs_masks(causal_world, make_model, bytelevel, tmp_path):
    student = StudentConfig(model=str(make_model("bert", "AutoModelForMaskedLM", bytelevel)))
    with pytest.raises(InputError, match="has no mask token, but the objective is a masked LM"):
        train_student(causal_world.open(), student, train_config(), tmp_path / "run")


def test_a_best_that_nobody_measures_is_refused(masked_world, tmp_path):
    chosen = train_config([{"teachers": ["big"]}, {"teachers": ["score"]}], keep_best="kl/score")
    refused(
        masked_world,
        tmp_path,
        "'kl/score'; this run measures loss, ce, kl/big, .*, mse/score",
        chosen,
    )


def test_a_teacher_of_other_masks_is_refused(masked_world, tmp_path):
    """The same positions with other tokens in them: nothing but the view's name can tell."""
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    first = masked_world.open().masked_view().name
    corpus = Cache.open(folder).corpus
    other = MaskedView(corpus, MaskConfig(mask_token=1.0, random_token=0.0), seed=0, replicas=2)
    other.build()
    cache = Cache.open(folder)
    a, b = (cache.gather(np.arange(9), [], masked_view=v).masked for v in (first, other.name))
    assert np.array_equal(a.positions, b.positions)
    assert not np.array_equal(a.input_ids, b.input_ids)
    chosen = train_config([{"teachers": ["big"]}], steps=1)
    message = f"'big' saw the masks {first}, but the student would see {other.name}"
    refused(masked_world, tmp_path, message, chosen, cache=cache, masked_view=other.name)
    refused(masked_world, tmp_path, "name one", chosen, cache=cache)
    run(masked_world, tmp_path / "run", chosen, cache=cache, masked_view=first)


def test_holes_are_refused_or_trained_without_distillation(masked_world, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    for unit in ("00001-r000", "00001-r001"):
        (folder / f"targets/big/commits/{unit}.json").unlink()
    (folder / "targets/sense/commits/00000.json").unlink()
    cache = Cache.open(folder)
    distill = [{"teachers": ["big"]}, {"teachers": ["sense"]}]
    refused(
        masked_world,
        tmp_path,
        "'big' has targets for .*% of the cache",
        train_config(distill),
        cache=cache,
    )
    message = "'sense' has targets for .*% of the cache"
    some = train_config(distill, allow_missing=["big"])
    refused(masked_world, tmp_path, message, some, cache=cache)
    for holes, names in ((["big"], ["big"]), (["big", "sense"], ["big", "sense"])):
        chosen = train_config([{"teachers": [n]} for n in names], allow_missing=holes, steps=12)
        found = run(masked_world, tmp_path / "-".join(names), chosen, cache=Cache.open(folder))
        total = sum(sequences(found).values())
        assert total == 72
        if names == ["big"]:
            assert 20 < found.coverage["sequences_with_kd"] < 60
            assert found.coverage["sequences_ce_only"] == 72 - found.coverage["sequences_with_kd"]
        else:  # where one has a hole, the other has none
            assert found.coverage["sequences_with_kd"] == 72
        assert found.evaluation["kl/big"] > 0


def test_a_directory_in_use_is_refused(masked_world, whole, tmp_path):
    with pytest.raises(InputError, match="or --resume to continue the run in it"):
        run(masked_world, whole.directory, train_config(ALL))
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no run"):
            run(masked_world, tmp_path, train_config(ALL), resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"learning_rate": 2e-3}, "train.learning_rate: 0.001 there, 0.002 here"),
        ({"steps": 11}, "train.steps"),
        ({"hard": 0.5}, "train.objective"),
    ],
)
def test_a_run_is_not_resumed_as_another(masked_world, whole, values, key):
    with pytest.raises(CheckpointError, match=key):
        run(masked_world, whole.directory, train_config(ALL, **values), resume=True)


def test_a_run_is_not_resumed_with_another_student_or_cache(
    masked_world, whole, tmp_path, make_model, wordpiece
):
    other = make_model("bert", "AutoModelForMaskedLM", wordpiece, seed=77)
    with pytest.raises(CheckpointError, match=r"student\.model"):
        run(masked_world, whole.directory, train_config(ALL), model=other, resume=True)
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    about = folder / "targets/big/teacher.json"
    values = json.loads(about.read_text())
    values["fingerprints"]["weights"] = "0" * 64
    about.write_bytes(seal({k: v for k, v in values.items() if k != SEAL}))
    (folder / "cache.json").write_bytes(seal({}))
    with pytest.raises(CheckpointError, match=r"cache\.teachers"):
        run(masked_world, whole.directory, train_config(ALL), cache=Cache.open(folder), resume=True)


def test_a_mistake_leaves_the_directory_free(masked_world, tmp_path):
    """An impossible teacher, then the same --out again without it."""
    out = tmp_path / "run"
    with pytest.raises(InputError):
        run(masked_world, out, train_config([{"teachers": ["nobody"]}]))
    with pytest.raises(InputError):
        run(masked_world, out, train_config(), model=Path("/nowhere"))
    run(masked_world, out, train_config(steps=1))


def test_seeds_are_those_that_generators_take(masked_world, tmp_path):
    run(masked_world, tmp_path / "run", train_config(steps=2, seed=2**63 - 1))
    for seed in (-1, 2**63):
        with pytest.raises(InputError, match=rf"^seed: .*given: {seed}"):
            train_config(seed=seed)
