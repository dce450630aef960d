"""Checkpoints: whole or not there, exact, and never of another run."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import CheckpointError
from rekindle.data.storage.seal import seal, unseal
from rekindle.train.config import StudentConfig
from rekindle.train.distributed import ParallelStudent, World
from rekindle.train.model.network import HeadConfig
from rekindle.train.optimizer import adamw
from rekindle.train.record import checkpoint as module
from rekindle.train.record.checkpoint import latest_checkpoint, load_checkpoint
from rekindle.train.student import Student, build_student

CPU = torch.device("cpu")
HEADS = {"v1.sense": HeadConfig(kind="sequence", num_labels=3)}
MASKED = ("bert", "roberta", "electra", "deberta", "modernbert")


@pytest.fixture(scope="module")
def make_student(make_model, wordpiece, bytelevel):
    def make(family="bert", seed=0, heads=HEADS):
        masked = family in MASKED
        tokenizer = wordpiece if masked else bytelevel
        auto = "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"
        config = StudentConfig(
            model=str(make_model(family, auto, tokenizer)),
            task="masked_lm" if masked else "causal_lm",
        )
        size = load_tokenizer(str(tokenizer)).size
        student = build_student(config, heads, size, seed).train()
        return student, adamw(student.parameters(), 1e-2, 0.01)

    return make


def train(student, optimizer, first, steps):
    """Steps on random tokens whose draws depend on the step alone, dropout on."""
    for step in range(first, first + steps):
        torch.manual_seed(step)
        ids = torch.randint(5, 90, (2, 8))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output = student(inputs, torch.arange(8), ["v1.sense"])
        logits = student.output_head.logits(output.hidden)
        loss = logits.logsumexp(1).mean() + output.logits["v1.sense"].square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save_checkpoint(run, step, student, *rest, **options):
    return module.save_checkpoint(run, step, alone(student), *rest, **options)


def restore(run, student, optimizer):
    return module.restore(run, alone(student), optimizer, keep=9)


def alone(student):
    return ParallelStudent(student, World.alone())


def state(student, optimizer):
    tensors = dict(student.state_dict())
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name} {key}"] = value
    return {name: value.clone() for name, value in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("family", [*MASKED, "gpt2", "llama"])
def test_training_goes_on_bit_for_bit_after_a_restore(tmp_path, make_student, family):
    student, optimizer = make_student(family)
    train(student, optimizer, 0, 2)
    save_checkpoint(tmp_path, 2, student, optimizer, {}, keep=2)
    saved = state(student, optimizer)
    train(student, optimizer, 2, 2)
    other, fresh = make_student(family, seed=9)
    assert restore(tmp_path, other, fresh)["step"] == 2
    assert same(state(other, fresh), saved)
    assert any("exp_avg_sq" in name for name in saved)
    train(other, fresh, 2, 2)
    assert same(state(other, fresh), state(student, optimizer))


def test_a_checkpoint_is_a_student_directory(tmp_path, make_student):
    student, optimizer = make_student()
    path = save_checkpoint(tmp_path, 3, student, optimizer, {"a": [1]}, keep=1)
    assert path == tmp_path / "checkpoints/step-00000003"
    again = Student.from_pretrained(path)
    assert same(dict(again.state_dict()), dict(student.state_dict()))
    found, about = latest_checkpoint(tmp_path)
    assert (found, about["step"], about["a"]) == (path, 3, [1])
    assert not [f for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_one_takes_no_place(tmp_path, make_student, keep):
    """The run went on from before it: what is written then must be there to go on with."""
    student, optimizer = make_student()
    newest = save_checkpoint(tmp_path, 40, student, optimizer, {}, keep)
    (newest / "model.safetensors").write_bytes(b"damaged")
    for step in (10, 20, 30):
        path = save_checkpoint(tmp_path, step, student, optimizer, {}, keep)
        assert latest_checkpoint(tmp_path)[0] == path
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{s:08d}" for s in (10, 20, 30)[-keep:]] + [newest.name]


def test_a_student_that_has_not_stepped_yet_has_no_moments(tmp_path, make_student):
    student, optimizer = make_student()
    save_checkpoint(tmp_path, 0, student, optimizer, {}, keep=1)
    other, fresh = make_student(seed=9)
    restore(tmp_path, other, fresh)
    assert same(state(other, fresh), state(student, optimizer))
    assert not fresh.state


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_last_ones_are_kept(tmp_path, make_student, keep):
    student, optimizer = make_student()
    for step in (5, 10, 15, 200):
        save_checkpoint(tmp_path, step, student, optimizer, {}, keep)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{s:08d}" for s in (5, 10, 15, 200)[-keep:]]


def test_the_best_is_kept_beside_the_last_ones(tmp_path, make_student):
    student, optimizer = make_student()
    for step, best in ((5, 5), (10, 10), (15, 10), (20, 10), (25, 10)):
        state = {"best": {"step": best, "value": 0.5}}
        save_checkpoint(tmp_path, step, student, optimizer, state, 2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{s:08d}" for s in (10, 20, 25)]
    save_checkpoint(tmp_path, 30, student, optimizer, {"best": {"step": 30, "value": 0.1}}, 2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{s:08d}" for s in (25, 30)]


@pytest.mark.parametrize("byte", range(0, 400, 37))
def test_a_flipped_byte_of_the_position_is_found(tmp_path, make_student, byte):
    """A digit of a step or of a coverage is as good as any other: only a checksum tells."""
    student, optimizer = make_student()
    save_checkpoint(tmp_path, 1, student, optimizer, {"seconds": 12.5}, keep=3)
    path = save_checkpoint(tmp_path, 2, student, optimizer, {"seconds": 34.5}, keep=3)
    content = bytearray((path / "trainer.json").read_bytes())
    content[byte] ^= 1
    (path / "trainer.json").write_bytes(content)
    found, about = latest_checkpoint(tmp_path)
    assert found.name == "step-00000001"
    assert about["seconds"] == 12.5


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path, make_student):
    student, optimizer = make_student()
    save_checkpoint(tmp_path, 5, student, optimizer, {"try": 1}, keep=2)
    train(student, optimizer, 0, 1)
    save_checkpoint(tmp_path, 5, student, optimizer, {"try": 2}, keep=2)
    path, about = latest_checkpoint(tmp_path)
    assert about["try"] == 2
    weights = dict(Student.from_pretrained(path).state_dict())
    assert same(weights, dict(student.state_dict()))


@pytest.mark.covering
@pytest.mark.parametrize("file", ["model", "heads", "optimizer", "config.json", "trainer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, make_student, caplog, file, damage):
    student, optimizer = make_student()
    train(student, optimizer, 0, 1)
    save_checkpoint(tmp_path, 1, student, optimizer, {}, keep=3)
    good = state(student, optimizer)
    train(student, optimizer, 1, 1)
    path = save_checkpoint(tmp_path, 2, student, optimizer, {}, keep=3)
    broken = path / (file if file.endswith(".json") else f"{file}.safetensors")
    content = bytearray(broken.read_bytes())
    if damage == "gone":
        broken.unlink()
    else:
        # A digit of the trainer's file may be of no consequence; half of it is.
        content[len(content) // 2] ^= 255
        broken.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    other, fresh = make_student(seed=9)
    with caplog.at_level(logging.WARNING, logger="rekindle"):
        assert restore(tmp_path, other, fresh)["step"] == 1
    assert "step-00000002 is damaged" in caplog.text
    assert same(state(other, fresh), good)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step": None}, "step: Input should be a valid integer"),
        ({"step": 1}, "is of step 1"),
        ({"best": "None"}, "best: "),
        ({"coverage": {"positions_neither": [1]}}, "coverage: "),
        ({"files": {"config.json": 3}}, "files: "),
    ],
)
def test_what_a_signed_checkpoint_says_is_of_its_types(
    tmp_path, make_student, caplog, change, told
):
    student, optimizer = make_student()
    save_checkpoint(tmp_path, 1, student, optimizer, {}, keep=3)
    path = save_checkpoint(tmp_path, 2, student, optimizer, {}, keep=3) / "trainer.json"
    body = unseal(json.loads(path.read_bytes()), "trainer.json") | change
    path.write_bytes(seal({k: v for k, v in body.items() if k != "format_version"}))
    found, _ = latest_checkpoint(tmp_path)
    assert found.name == "step-00000001"
    assert f"step-00000002 is damaged (trainer.json{': ' * (':' in told)}" in caplog.text
    assert told in caplog.text


def test_without_a_sound_checkpoint_nothing_is_trained_again(tmp_path, make_student):
    """Damaged, or deleted after the steps that metrics.jsonl tells of; before the first there is
    none to be had.
    """
    student, optimizer = make_student()
    before = state(student, optimizer)
    assert restore(tmp_path, student, optimizer) == {}
    path = save_checkpoint(tmp_path, 1, student, optimizer, {}, keep=1)
    (path / "trainer.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot continue: .*sound \(step-00000001\)"):
        restore(tmp_path, student, optimizer)
    shutil.rmtree(path)
    begun = {"train": {"checkpoint_every": 100}}  # by a version that recorded no checkpoints
    (tmp_path / "run.json").write_text(json.dumps(begun))
    for steps in (99, 100, 101):
        record = {"kind": "train", "step": steps}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        if steps == 101:
            with pytest.raises(CheckpointError, match=r"are gone; metrics.* records 101 steps"):
                restore(tmp_path, student, optimizer)
        else:
            assert restore(tmp_path, student, optimizer) == {}
    assert same(state(student, optimizer), before)


def test_files_of_ones_own_beside_checkpoints_are_left_alone(tmp_path, make_student):
    """A copy, an archive, a link: neither gone on with nor deleted; of a link what it leads to."""
    student, optimizer = make_student()
    folder, far = tmp_path / "checkpoints", tmp_path / "far"
    first = save_checkpoint(tmp_path, 4, student, optimizer, {}, keep=1)
    shutil.copytree(first, folder / "step-00000004-keep")
    shutil.move(first, far)
    first.symlink_to(far)
    assert latest_checkpoint(tmp_path)[1]["step"] == 4
    (folder / "step-00000009.tar.gz").write_bytes(b"mine")
    (folder / "step-00000099").write_bytes(b"mine")
    (folder / "step-latest").symlink_to(far)
    (folder / ".step-00000006.01234567.new").symlink_to(far)
    for step in (5, 6, 7):
        save_checkpoint(tmp_path, step, student, optimizer, {}, keep=1)
    own = ["step-00000004-keep", "step-00000009.tar.gz", "step-00000099", "step-latest"]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*own, "step-00000007"])
    assert latest_checkpoint(tmp_path)[1]["step"] == 7
    assert (far / "trainer.json").is_file()
    (folder / "step-00000008").symlink_to(far)
    save_checkpoint(tmp_path, 8, student, optimizer, {}, keep=1)
    assert (far / "trainer.json").is_file()
    assert latest_checkpoint(tmp_path)[1]["step"] == 8
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("moment", ["save_file", "fsync", "rename"])
def test_a_save_that_is_interrupted_leaves_the_last_one(
    tmp_path, make_student, monkeypatch, moment
):
    student, optimizer = make_student()
    save_checkpoint(tmp_path, 1, student, optimizer, {}, keep=1)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        owner = module if moment == "save_file" else os
        patched.setattr(owner, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, student, optimizer, {}, keep=1)
    assert latest_checkpoint(tmp_path)[1]["step"] == 1
    save_checkpoint(tmp_path, 2, student, optimizer, {}, keep=1)  # over what was left lying about
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert latest_checkpoint(tmp_path)[1]["step"] == 2


def test_a_checkpoint_of_another_student_is_refused(tmp_path, make_student):
    student, optimizer = make_student()
    path = save_checkpoint(tmp_path, 1, student, optimizer, {}, keep=1)
    for family, heads in (("electra", HEADS), ("bert", {})):
        with pytest.raises(CheckpointError, match="does not fit this student"):
            load_checkpoint(path, *make_student(family, heads=heads))
    tensors = load_file(path / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.bias"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder.layer.0.output.dense.bias"):
        load_checkpoint(path, *make_student())


def test_checkpoints_may_be_copied_elsewhere(tmp_path, make_student):
    student, optimizer = make_student()
    save_checkpoint(tmp_path / "a", 4, student, optimizer, {}, keep=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert restore(tmp_path / "b", student, optimizer)["step"] == 4


def test_a_student_whose_weights_are_in_shards_goes_on(tmp_path, make_student, monkeypatch):
    """As transformers saves one that is too large for a file."""
    student, optimizer = make_student()
    train(student, optimizer, 0, 1)
    save = type(student.model).save_pretrained

    def in_shards(model, *arguments, **options):
        save(model, *arguments, **options, max_shard_size="20KB")

    monkeypatch.setattr(type(student.model), "save_pretrained", in_shards)
    path = save_checkpoint(tmp_path, 1, student, optimizer, {}, keep=1)
    assert len([*path.glob("model-*-of-*.safetensors")]) > 1
    other, fresh = make_student(seed=9)
    assert restore(tmp_path, other, fresh)["step"] == 1
    assert same(state(other, fresh), state(student, optimizer))
