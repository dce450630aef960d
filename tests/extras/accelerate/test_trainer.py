"""The mixin with the real Trainer: the losses of our own loop, however the steps are made."""

import re
import shutil
from pathlib import Path

import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.hf.dataset import CacheDataset, IterableCacheDataset
from rekindle.train.hf.trainer import DistillationMixin
from testlib.models import AUTO
from testlib.pages.examples import run_example
from testlib.trainers.runs import (
    BATCH,
    SEED,
    STEPS,
    in_two_processes,
    losses,
    our_losses,
    teaching,
    trained,
    trainer_of,
)


def made(new_student, cache, out, **more):
    from transformers import Trainer, TrainingArguments

    class KDTrainer(DistillationMixin, Trainer):
        pass

    distillation = more.pop("distillation", None) or teaching(cache)
    return trainer_of(KDTrainer, TrainingArguments, new_student(), distillation, out, **more)


@pytest.fixture(scope="session")
def ours(taught, tmp_path_factory):
    task, path, student = taught
    out = tmp_path_factory.mktemp("ours") / "run"
    found = our_losses(Cache.open(path), student, task, out)
    assert len(found) == STEPS
    assert found[-1] < found[0]
    return pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("batch", [BATCH, BATCH // 2])
def test_its_losses_are_those_of_our_loop(taught, ours, cache, new_student, tmp_path, batch):
    """Over epochs, so over replicas of the masks; by half of the batch at a time, too."""
    trainer = made(new_student, cache, tmp_path, batch=batch, each=BATCH // batch)
    assert trainer.args.remove_unused_columns
    trainer.train()
    assert losses(trainer) == ours
    check_parts(trainer.state.log_history[0])


def check_parts(row):
    """What is logged beside a step's loss are its parts."""
    parts = 0.5 * row["ce"] + 0.7 * 4 * row["kd/big"] + 0.4 * row["kd/odd.lm"]
    assert parts == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.parametrize("accepts", [True, False])
def test_an_older_trainer_divides_by_the_micro_batches(
    taught, ours, cache, new_student, tmp_path, monkeypatch, accepts
):
    """As transformers before 5.19 does, unless the model takes the number of items: undone."""
    from transformers import Trainer

    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga")
    trainer = made(new_student, cache, tmp_path, batch=1, each=BATCH)
    trainer.loss_is_scaled_for_ga = None  # what this version's Trainer asks: as those did
    trainer.model_accepts_loss_kwargs = accepts
    trainer.train()
    assert losses(trainer) == ours


def test_counts_are_summed_over_processes_once_a_step(cache, new_student, tmp_path, monkeypatch):
    """And what is logged, where it is; not once a micro-batch."""
    trainer = made(new_student, cache, tmp_path, batch=1, each=4, max_steps=6, logging_steps=3)
    sums, own = [], trainer._sum
    monkeypatch.setattr(trainer, "_sum", lambda values: sums.append(values) or own(values))
    trainer.train()
    assert len(sums) == 6 + 2


def of_two_processes(new_student, path, out, sequences=None, asked=trained, **more):
    def make():
        cache = Cache.open(path)
        data = CacheDataset(cache, seed=SEED, sequences=sequences)
        built = {"eval_dataset": data}
        more["train_dataset"] = data
        return made(new_student, cache, out, built=built, ddp_backend="gloo", **more)

    return in_two_processes(make, out, asked)


def test_two_processes_share_every_step(taught, ours, new_student, tmp_path):
    assert of_two_processes(new_student, taught[1], tmp_path, batch=1, each=2) == ours


def test_processes_that_do_not_divide_the_epoch(taught, cache, new_student, tmp_path):
    """Nine sequences: the second process's last batch holds one that has no loss."""
    nine, more = list(range(9)), {"max_steps": 6}
    found = of_two_processes(new_student, taught[1], tmp_path, batch=2, sequences=nine, **more)
    data = CacheDataset(cache, seed=SEED, sequences=nine)
    one = made(new_student, cache, tmp_path / "one", train_dataset=data, **more)
    one.train()
    assert found == pytest.approx(losses(one), rel=1e-5)


def test_an_evaluation_has_no_batch_of_nothing(taught, cache, new_student, tmp_path):
    """Three sequences, one at a time: the second process's last batch repeats the first one."""
    three, one = [4, 1, 7], {"per_device_eval_batch_size": 1}
    ask = {"asked": lambda trainer: trainer.evaluate()["eval_loss"]}
    found = of_two_processes(new_student, taught[1], tmp_path, sequences=three, **ask, **one)
    data = CacheDataset(cache, seed=SEED, sequences=three)
    alone = made(new_student, cache, tmp_path / "one", **one)
    first = CacheDataset(cache, sequences=[data[0].sequence])
    whole, again = (alone.evaluate(one)["eval_loss"] for one in (data, first))
    assert whole != pytest.approx(again, rel=1e-3)
    assert found == pytest.approx((3 * whole + again) / 4, rel=1e-5)


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_resumed_in_the_midst_of_an_epoch(taught, ours, cache, new_student, tmp_path, kind):
    """Three steps are an epoch; the checkpoint is of the fifth."""
    saved = {"save_strategy": "steps", "save_steps": 5}

    def trainer(**more):
        data = CacheDataset(cache, seed=SEED)
        if kind == "iterable":
            data = IterableCacheDataset(cache, BATCH, seed=SEED)
        return made(new_student, cache, tmp_path, train_dataset=data, **saved, **more)

    first = trainer()
    first.add_callback(stop_at(7))
    first.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert len(losses(first)) == 7
    assert losses(first)[:5] + losses(again)[5:] == ours
    check_parts(again.state.log_history[5])


def stop_at(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            control.should_training_stop = state.global_step == step

    return Stop()


def test_batches_may_be_made_in_workers_and_evaluated(taught, ours, cache, new_student, tmp_path):
    persistent = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    data = CacheDataset(cache, seed=SEED)
    trainer = made(new_student, cache, tmp_path, built={"eval_dataset": data}, **persistent)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert losses(trainer) == ours
    assert trainer.evaluate()["eval_loss"] < before


def test_evaluations_are_all_of_one_epoch(taught, cache, new_student, tmp_path):
    """A stream too, which moves on when it is read: in another replica of the masks."""
    data = IterableCacheDataset(cache, BATCH, seed=SEED)
    built = {"eval_dataset": data}
    trainer = made(new_student, cache, tmp_path, built=built, per_device_eval_batch_size=BATCH)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert data.epoch == 0


def test_the_programs_of_the_pages(taught, tmp_path, monkeypatch):
    """As they stand, but for names and the number of steps."""
    task, path, student = taught
    names = {"runs/cache": str(path), "path/to/student": str(student), "big-lm": "big"}
    names |= {"max_steps=1000": "max_steps=1", "AutoModelForMaskedLM": AUTO[task]}
    monkeypatch.chdir(tmp_path)
    here = {}
    for page in ("from_python.md", "own_trainer.md"):  # the second goes on with the first's names
        text = (Path(__file__).parents[3] / "docs" / page).read_text("utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.S)
        (program,) = (block for block in blocks if "(DistillationMixin, Trainer)" in block)
        for name, ours in names.items():
            assert page == "own_trainer.md" or name in program
            program = program.replace(name, ours)
        shutil.rmtree("runs", ignore_errors=True)
        exec(program, here)
        assert (tmp_path / "runs/hf/checkpoint-1/tokenizer.json").is_file()


def test_arguments_may_stand_in_their_places(cache, new_student, tmp_path):
    """The order of all sequences is that of ``args.seed``, wherever it is given."""
    from transformers import Trainer, TrainingArguments

    class KDTrainer(DistillationMixin, Trainer):
        pass

    arguments = TrainingArguments(str(tmp_path), seed=7, use_cpu=True, report_to="none")
    trainer = KDTrainer(new_student(), arguments, distillation=teaching(cache))
    assert next(iter(trainer.get_train_dataloader()))["distillation"].index.tolist() == [
        CacheDataset(cache, seed=7)[place].sequence for place in range(8)
    ]


def test_what_cannot_teach_is_refused_before_training(taught, cache, new_student, tmp_path):
    def refused(message, **more):
        with pytest.raises(InputError, match=message):
            made(new_student, cache, tmp_path, **more)

    whole = teaching(cache).collator()
    plain = {"data_collator": lambda items: {"input_ids": whole(items)["input_ids"]}}
    refused("a batch has input_ids and no targets", built=plain)
    refused("train_dataset is a list; targets belong", train_dataset=[{"input_ids": [1]}])
    rows = {"test": [{"input_ids": [1]}]}
    refused("eval_dataset is a list; the collator reads sequences", built={"eval_dataset": rows})
    share = CacheDataset(cache, rank=1, world_size=2)
    refused("the share of process 1 of 2", train_dataset=share)
    refused("define another loss", label_smoothing_factor=0.1)
    other = new_student()
    other.resize_token_embeddings(50)
    with pytest.raises(InputError, match="another vocabulary than the targets: it has 50 rows"):
        made(lambda: other, cache, tmp_path)


@pytest.mark.parametrize("taught", ["masked_lm"], indirect=True)
def test_the_example_runs(taught, tmp_path):
    from transformers import AutoModelForMaskedLM

    _, path, student = taught
    run_example("hf_trainer.py", path, "big", student, tmp_path / "out", 4)
    AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
