"""Runs whose teachers are sentence encoders: to the bit after a kill, the same in two processes,
and what they leave behind.
"""

import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from rekindle.data.cache import Cache
from rekindle.train.embedding.encoder import load_encoder
from rekindle.train.embedding.folder import read_encoder_folder
from rekindle.train.objective.embedding.config import VectorConfig
from rekindle.train.objective.vector_loss import vector_loss
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import Student
from rekindle.train.to_device import to_device
from testlib.loop import refused, run, stop_at, train_config
from testlib.models import NARROW, STILL
from testlib.several.forked import end_well, forked_world
from testlib.students import assert_same_run, metrics, same_weights

SCRIPT = Path(__file__).parents[1] / "torchrun_jobs.py"
SIMILARITY = {"similarity": {"temperature": 0.1}}
BOTH = [
    {"teachers": ["near"], "embedding": {"cosine": 0.5, "mse": 2.0, **SIMILARITY}},
    {"teachers": ["far"], "view": "masked", "weight": 0.3, "embedding": {"mse": 1, **SIMILARITY}},
]


@dataclass(frozen=True)
class World:
    """A cache and a student for it."""

    path: Path
    student: Path

    def open(self):
        return Cache.open(self.path)


@pytest.fixture(scope="module")
def world(tmp_path_factory, wordpiece, make_teacher, make_cache, masked_student, make_model):
    """A masked LM and two encoders: one of the student's size, one of another and for half of the
    sequences.
    """
    plain = {"pooling": "mean", "normalise": True}
    wide = {"hidden_size": 24, "intermediate_size": 24}
    teachers = [
        make_teacher("big", "masked_lm", 1, NARROW, targets={"kind": "dense"}),
        make_teacher("near", "embedding", 2, NARROW, **plain),
        make_teacher("far", "embedding", 3, wide, pooling="cls", normalise=False, domains=["odd"]),
    ]
    path = tmp_path_factory.mktemp("vectors") / "cache"
    make_cache(path, teachers, {"tokenizer": str(wordpiece), "limit_sequences": 120})
    return World(path, masked_student)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run with masked LM, a teacher of words, and two of vectors."""
    distill = [{"teachers": ["big"]}, *BOTH]
    return run(world, tmp_path_factory.mktemp("whole") / "run", train_config(distill, held_out=0.3))


def test_a_killed_run_goes_on_to_the_same_bits(world, whole, tmp_path):
    out, config = tmp_path / "run", train_config([{"teachers": ["big"]}, *BOTH], held_out=0.3)
    with pytest.raises(KeyboardInterrupt):
        run(world, out, config, report=stop_at(6))
    result = run(world, out, config, resume=True)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)
    assert result.evaluation == whole.evaluation


def test_what_is_logged_and_measured(whole):
    steps = [one for one in read_metrics(whole.directory) if one["kind"] == "train"]
    assert {"gradient/kd/near", "gradient_ratio/kd/near"} <= steps[0].keys()
    assert all({"kd/near", "kd/big", "ce"} <= one.keys() for one in steps)
    assert {"cosine/near", "mse/near", "cosine/far", "mse/far"} <= whole.evaluation.keys()
    assert -1 <= whole.evaluation["cosine/near"] <= 1


def test_a_run_leaves_a_folder_of_an_encoder(world, whole, tmp_path):
    """Of two teachers the student's own vectors; of one its head's, with the projection."""
    config = train_config(BOTH[1:], hard=0, held_out=0.3, keep_best="cosine/far", evaluate_every=5)
    result = run(world, tmp_path / "run", config)
    assert result.best["name"] == "cosine/far"
    student = Student.from_pretrained(result.directory).eval()
    encoder = load_encoder(read_encoder_folder(result.directory))
    ids = torch.tensor([[5, 9, 11, 2], [7, 3, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    with torch.no_grad():
        own = student(inputs, sequence_heads=["far"]).logits["far"]
        torch.testing.assert_close(encoder(inputs), own, rtol=0, atol=1e-6)
    assert own.shape == (2, 24)
    assert read_encoder_folder(whole.directory).width(16) == 16
    told = json.loads((whole.directory / "rekindle_student.json").read_text())
    assert told["vectors"] == "own"


@pytest.fixture(scope="module")
def still(make_model, wordpiece):
    """A student without dropout."""
    return make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **NARROW, **STILL)


def test_the_held_out_loss_is_that_of_all_held_out_texts(world, still, tmp_path):
    """However its batches are cut: similarities are between all of them."""
    values = {"evaluate_sequences": 100, "held_out": 0.3, "hard": 0, "steps": 2}
    found = [
        run(
            world,
            tmp_path / f"run-{micro}",
            train_config(BOTH[:1], micro_batch_sequences=micro, **values),
            model=still,
        )
        for micro in (1, 4)
    ]
    losses = [one.evaluation["loss"] for one in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # of weights that differ by rounding
    student = Student.from_pretrained(found[1].directory).eval()
    cache = Cache.open(world.path)
    held = held_out(found[1].directory, cache)
    own, wanted = [], []
    for index in held:
        example = cache.example(int(index))
        ids = torch.as_tensor(example.input_ids).long()[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            own.append(student(inputs, sequence_heads=["near"]).logits["near"][0])
        wanted.append(torch.from_numpy(example.targets["near"][0].vector))
    asked = VectorConfig.model_validate(BOTH[0]["embedding"])
    loss = vector_loss(torch.stack(own), torch.stack(wanted), np.array(held), None, asked)[0]
    assert losses[1] == pytest.approx(float(loss) / len(held), rel=1e-5)


def held_out(directory, cache):
    """The sequences that a run has held out, by the code that chooses them."""
    from rekindle.data.settings import parse_settings
    from rekindle.train.config import TrainConfig
    from rekindle.train.order.sequences import choose_sequences

    about = json.loads((directory / "run.json").read_text())
    return choose_sequences(cache, parse_settings(TrainConfig, about["train"])).held_out


def test_two_processes_train_the_student_of_one(world, still, tmp_path):
    """In micro-batches, on similarities of the whole step; some have no row of a teacher."""
    train = train_config(BOTH, steps=4, checkpoint_every=4, evaluate_every=2)
    run(world, tmp_path / "alone", train, model=still)
    shared = {**train.model_dump(mode="json"), "micro_batch_sequences": 2}
    jobs = [
        {
            "student": {"model": str(still)},
            "train": shared | {"parallel": parallel},
            "out": str(tmp_path / parallel),
        }
        for parallel in ("ddp", "fsdp")
    ]
    given = tmp_path / "jobs.json"
    given.write_text(json.dumps({"cache": str(world.path), "jobs": jobs}))

    def work():
        sys.argv = [str(SCRIPT), str(given)]
        runpy.run_path(str(SCRIPT), run_name="__main__")

    end_well(forked_world(work))
    for parallel in ("ddp", "fsdp"):
        assert_same_run(tmp_path / parallel, tmp_path / "alone")
        assert (tmp_path / parallel / "1_Pooling" / "config.json").is_file()


def test_a_step_of_several_parts_reads_no_vector_from_its_device(world, tmp_path, reads_of_steps):
    config = train_config(BOTH, steps=2, evaluate_every=9, micro_batch_sequences=4)
    run(world, tmp_path / "run", config)
    assert [inside for _, inside in reads_of_steps] == [{}] * 2


def test_a_loop_of_ones_own_has_the_vectors(world):
    cache = Cache.open(world.path)
    batch = cache.gather(np.arange(6), ["far"], masked_view=cache.masked_view().name)
    found = to_device(batch, "cpu", task="masked_lm").targets["far"]
    assert 0 < len(found.select) < 6  # it knows one domain alone
    for row, vector in zip(found.select.tolist(), found.vectors, strict=True):
        assert np.array_equal(vector.numpy(), cache.example(row).targets["far"][0].vector)
    clean = {name: values.tolist() for name, values in found.inputs.items()}
    assert clean["input_ids"] == batch.input_ids.tolist()


def test_a_student_that_grows_has_longer_vectors_of_its_own(world, tmp_path):
    grow = {"grow": {"hidden_size": 32}, "embedding": {"output": "own"}}
    config = train_config(BOTH[:1], hard=0, steps=2, checkpoint_every=2, evaluate_every=2)
    result = run(world, tmp_path / "run", config, student=grow)
    student = Student.from_pretrained(result.directory)
    assert student.heads["near"].projection.weight.shape == (16, 32)
    assert read_encoder_folder(result.directory).width(32) == 32


@pytest.mark.parametrize(
    ("distill", "student", "told"),
    [
        ([{"teachers": ["big"], "embedding": {}}], {}, "'big' is a masked_lm teacher"),
        ([{"teachers": ["near", "big"]}], {}, "gives vectors"),
        ([{"teachers": ["near"], "divergence": "mse"}], {}, "embedding: {cosine"),
        ([{"teachers": ["near"], "temperature": 2}], {}, "embedding.similarity.temperature"),
        ([{"teachers": ["near", "far"], "combine": "mixture"}], {}, "a space of its own"),
        ([{"teachers": ["near"], "positions": "masked"}], {}, "judge whole sequences"),
        (
            [{"teachers": ["far"], "embedding": {"mse": 1, "projection": False}}],
            {},
            "have 24 numbers and those of student .* 16",
        ),
        ([{"teachers": ["near"]}], {"embedding": {"output": "nera"}}, "did you mean 'near'"),
        ([{"teachers": ["big"]}], {"embedding": {"pooling": "cls"}}, "Leave it out, or name one"),
    ],
    ids=range(9),
)
def test_what_cannot_be_learnt_is_said_before(world, tmp_path, distill, student, told):
    refused(world, tmp_path, told, train_config(distill), student=student)
