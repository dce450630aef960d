"""The same steps with our loop and with a Hugging Face Trainer: their settings and results."""

import json

import torch

from rekindle.data.settings import parse_settings
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.hf.dataset import CacheDataset
from rekindle.train.hf.distillation import Distillation
from rekindle.train.loop import train_student
from rekindle.train.optimizer import configured_adamw
from rekindle.train.record.run_log import read_metrics
from testlib.several.forked import end_well, forked_world

STEPS, BATCH, SEED = 20, 4, 3
WEIGHTS = {"big": 0.7, "odd.lm": 0.4}
TEMPERATURES = {"big": 2.0, "odd.lm": 1.0}
CE = 0.5


def settings(weights=WEIGHTS, **values):
    terms = [
        {"teachers": [name], "weight": weight, "temperature": TEMPERATURES[name]}
        for name, weight in weights.items()
    ]
    quick = {
        "steps": STEPS,
        "batch_sequences": BATCH,
        "learning_rate": 2e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "max_grad_norm": None,
        "held_out": 0,
        "seed": SEED,
        "evaluate_every": STEPS,
        "checkpoint_every": STEPS,
        "objective": {"hard": {"weight": CE}, "distill": terms},
    }
    return parse_settings(TrainConfig, quick | values)


def our_losses(cache, model, task, out, **values):
    student = StudentConfig(model=str(model), task=task)
    train_student(cache, student, settings(**values), out)
    return [row["loss"] for row in read_metrics(out) if "learning_rate" in row]


def teaching(cache, weights=WEIGHTS, **more):
    temperatures = {name: TEMPERATURES[name] for name in weights}
    given = {"kd_weight": weights, "ce_weight": CE, "temperature": temperatures}
    return Distillation(cache, list(weights), **given | more)


def trainer_of(kind, config, model, distillation, out, *, batch=BATCH, each=1, **more):
    """Return a trainer of that class with our loop's optimiser; ``each``: micro-batches
    per step.
    """
    data = more.pop("train_dataset", None) or CacheDataset(distillation.cache, seed=SEED)
    arguments = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": each,
        "lr_scheduler_type": "constant",
        "learning_rate": 2e-3,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": SEED,
    }
    own = (configured_adamw(model.parameters(), settings()), None)
    built = {"optimizers": own} | more.pop("built", {})
    return kind(
        model=model,
        args=config(**arguments | more),
        train_dataset=data,
        distillation=distillation,
        **built,
    )


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trained(trainer):
    trainer.train()
    return losses(trainer)


def in_two_processes(make, out, asked=trained):
    """Return what the first of two processes ``asked`` of its trainer: the logged losses."""

    def work():
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        torch.set_num_threads(1)
        trainer = make()
        assert trainer.args.world_size == 2
        found = asked(trainer)
        if trainer.args.process_index == 0:
            (out / "found.json").write_text(json.dumps(found))

    end_well(forked_world(work))
    return json.loads((out / "found.json").read_text())
