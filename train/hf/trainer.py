"""A mixin that teaches the student of a Hugging Face Trainer (or TRL's SFTTrainer) from a cache.

It provides the batches and the loss; optimiser, schedule, precision, checkpoints and logs stay the
Trainer's. This module does not import transformers; whoever uses the mixin does.
"""

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rekindle.data.batch import Batch
from rekindle.data.errors import InputError
from rekindle.train.hf.collator import TARGETS, TargetCollator
from rekindle.train.hf.dataset import CacheDataset, IterableCacheDataset, Place, Shares
from rekindle.train.hf.distillation import Distillation
from rekindle.train.model.routers import describe_load_balancing, load_balancing_weight
from rekindle.train.objective.language_loss import IGNORED
from rekindle.train.objective.objective import ROUTER
from rekindle.train.objective.selection import Counts

log = logging.getLogger("rekindle")

# Everything that is used of the Trainer (and TRL's ``_prepare_dataset``, which is overridden). Some
# of it is not documented: if a version lacks any of it, training is refused.
METHODS = (
    *("compute_loss", "get_batch_samples", "get_eval_dataloader", "get_train_dataloader", "log"),
    *("get_cp_size", "get_sp_size", "get_tp_size"),
)
ATTRIBUTES = ("_train_batch_size", "accelerator", "label_smoother", "model_accepts_loss_kwargs")
# columns of a row that stands for a cache's sequences
COLUMNS = ["input_ids", "labels", "distillation"]


class DistillationMixin:
    """``class KDTrainer(DistillationMixin, Trainer)`` takes one more argument, ``distillation``.

    The training data set is a CacheDataset (None: one of all sequences, in the order of
    ``args.seed``) or an IterableCacheDataset, of the whole cache: the mixin divides it among the
    processes. The collator is the distillation's; another one must pass on its targets. The loss is
    the mean over the rows of the whole step, however it is split into micro-batches and processes.
    ``ce`` and ``kd/TEACHER`` are logged with it.
    """

    # Tells transformers from 5.19 not to divide the loss by the number of micro-batches.
    loss_is_scaled_for_ga = True

    def __init_subclass__(cls, **kwargs: Any):
        """Raise TypeError if the mixin comes after the Trainer, whose loss would then be used."""
        super().__init_subclass__(**kwargs)
        bases_before = cls.__mro__[1 : cls.__mro__.index(DistillationMixin)]
        if other := next(
            (kind for kind in bases_before if not issubclass(kind, DistillationMixin)), None
        ):
            raise TypeError(
                f"{cls.__name__}: DistillationMixin must come before {other.__name__}, whose own "
                f"loss would be trained on otherwise: class {cls.__name__}(DistillationMixin, …)"
            )

    def __init__(self, *args: Any, distillation: Distillation, **kwargs: Any):
        """Take the Trainer's own arguments, and the distillation.

        Raises InputError for a student of another vocabulary or task, another data set, a collator
        that gives no targets, and an optimizer without trained parameters.
        """
        self.distillation = distillation
        self._counts: Counts | None = None  # of the current step
        self._micro_batches = 1  # of the current step, in this process
        self._balance = 0.0  # weight of the student's load-balancing loss
        self._logged: dict[str, Tensor] = {}  # sums since the last log
        self._steps_logged = 0  # the number of steps in those sums
        parameters = signature(super().__init__).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][: len(args)]
        if len(positional) < len(args) or kwargs.keys() & set(positional):
            raise TypeError(
                f"give the arguments of {type(self).__name__} once each, by their names"
            )
        kwargs |= dict(zip(positional, args, strict=True))
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = distillation.collator()
        is_default_data = kwargs.get("train_dataset") is None
        data = CacheDataset(distillation.cache) if is_default_data else kwargs["train_dataset"]
        kwargs["train_dataset"] = data
        _check_data(data, kwargs["data_collator"])
        _check_eval_data(kwargs.get("eval_dataset"), kwargs["data_collator"])
        if hasattr(super(), "_prepare_dataset"):  # TRL accepts only data sets of `datasets`
            kwargs["train_dataset"] = _placeholder_dataset()
        super().__init__(**kwargs)
        trainer: Any = self
        trainer.train_dataset = data
        if is_default_data:  # the Trainer's own arguments, if none are given
            data.seed = trainer.args.seed
        base = super()
        missing = [name for name in METHODS if not hasattr(base, name)]
        if missing := missing + [name for name in ATTRIBUTES if not hasattr(trainer, name)]:
            raise InputError(
                f"the Trainer of this version of transformers lacks {', '.join(missing)}, which "
                "the distillation needs. Use transformers 5.17 or newer, below 6"
            )
        self._divides = not hasattr(base, "loss_is_scaled_for_ga")  # transformers before 5.19
        if kwargs.get("compute_loss_func") is not None or trainer.label_smoother is not None:
            raise InputError(
                "compute_loss_func and label_smoothing_factor define another loss than the "
                "distillation's. Leave them out"
            )
        parts = (trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size())
        if parts != (1, 1, 1):
            raise InputError(
                "tensor, context and sequence parallelism split a sequence or repeat a batch, "
                f"but a cache's targets are for whole sequences, once each (sizes {parts}). Use "
                "DDP or FSDP"
            )
        distillation.check_student(trainer.model, trainer.processing_class)
        _check_optimizer(getattr(trainer, "optimizer", None))
        if distillation.task == "causal_lm":
            self._balance = load_balancing_weight(trainer.model)
            if routers := describe_load_balancing(trainer.model):
                log.info("student: %s", routers)
        trainer.add_callback(_epoch_callback(trainer.train_dataset))

    # --- batches ---

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's share of the data set, in its order."""
        trainer: Any = self
        return self._loader(trainer.train_dataset, trainer._train_batch_size, True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the loader of an evaluation on a cache's sequences; for other data the Trainer's
        own.
        """
        trainer: Any = self
        data = trainer.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str) and isinstance(trainer.eval_dataset, Mapping):
            data = trainer.eval_dataset[data]
        if not isinstance(data, Shares):
            loader: DataLoader = super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
            return loader
        return self._loader(data, trainer.args.eval_batch_size, False)

    def _loader(self, data: Shares, batch: int, training: bool) -> DataLoader:
        """Make a plain DataLoader: accelerate's would divide again what is divided already."""
        trainer: Any = self
        args = trainer.args
        if isinstance(data, IterableCacheDataset) and data.batch_sequences != batch:
            raise InputError(
                f"the data set has batch_sequences {data.batch_sequences}, but the Trainer reads "
                f"batches of {batch} (per_device_train_batch_size): make them equal"
            )
        if training and data.batch_sequences not in (None, batch):
            raise InputError(
                f"the data set has batch_sequences {data.batch_sequences}, but the Trainer reads "
                f"batches of {batch} (per_device_train_batch_size): leave batch_sequences out"
            )
        if not training and isinstance(data, IterableCacheDataset):
            data = deepcopy(data)  # reading moves it on, and evaluations must stay in one epoch
        return DataLoader(
            data.share(args.process_index, args.world_size, not training, batch),
            batch_size=batch,
            collate_fn=trainer.data_collator,
            drop_last=training and args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Take a step's micro-batches, and count the rows of its means over all processes."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        labelled = [(_targets(batch), batch["labels"]) for batch in batches]
        counts = self.distillation.counts(labelled)
        if self._balance:  # each micro-batch has a share of it by its tokens
            rows = dict(counts.rows) | {ROUTER: sum(_tokens(*one) for one in labelled)}
            counts = replace(counts, rows=rows)
        self._counts = counts.over(self._sum)
        self._micro_batches = len(batches)
        self._steps_logged += 1
        return batches, items

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes."""
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        total = torch.tensor(values, dtype=torch.float64, device="cpu")
        if accelerator.num_processes > 1:
            if accelerator.device.type != "cpu":
                total = total.to(accelerator.device)
            total = accelerator.reduce(total, reduction="sum")
        sums: list[float] = total.tolist()
        return sums

    # --- the loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss, or the loss of an evaluation batch.

        A batch without targets is evaluated by the Trainer.
        """
        if TARGETS not in inputs and not model.training:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        batch = _targets(inputs)
        model_inputs = {
            name: value for name, value in inputs.items() if name not in (TARGETS, "labels")
        }
        outputs = model(**model_inputs)
        counts = self._counts if model.training else None
        step_share = self.distillation.loss(outputs.logits, batch, inputs["labels"], counts)
        loss = step_share.loss
        if model.training:
            logged = {"ce": step_share.ce}
            logged |= {f"kd/{name}": value for name, value in step_share.kd.items()}
            if self._balance and counts is not None:
                share = _balance_of(outputs) * _tokens(batch, inputs["labels"])
                logged[ROUTER] = share / max(counts.rows[ROUTER], 1)
                loss = loss + self._balance * logged[ROUTER]
            self._add_logged(logged)
            # Gradients are averaged over the processes, but each has its share of a common mean.
            loss = loss * self.accelerator.num_processes  # type: ignore[attr-defined]
            if self._divides:
                loss = loss * self._undo_scale(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _undo_scale(self, num_items_in_batch: Any) -> int:
        """Return the number by which transformers before 5.19 will divide the loss."""
        scaled = self.model_accepts_loss_kwargs  # type: ignore[attr-defined]
        return 1 if scaled and num_items_in_batch is not None else self._micro_batches

    def _add_logged(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._logged[name] = self._logged.get(name, 0.0) + value.detach().float()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean cross-entropy and divergences over the steps since the last log."""
        if "loss" in logs and self._logged:
            steps = max(self._steps_logged, 1)
            names = sorted(self._logged)
            sums = self._sum([float(self._logged[name]) for name in names])
            logs |= {name: value / steps for name, value in zip(names, sums, strict=True)}
            self._logged, self._steps_logged = {}, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave a cache's sequences as they are; TRL's SFTTrainer would tokenize them."""
        if isinstance(dataset, Shares) or getattr(dataset, "column_names", None) == COLUMNS:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)  # type: ignore[misc]


def _targets(inputs: Mapping[str, Any]) -> Batch:
    batch = inputs.get(TARGETS)
    if isinstance(batch, Batch) and "labels" in inputs:
        return batch
    raise InputError(
        f"a batch has {', '.join(sorted(inputs))} and no targets ({TARGETS!r}, beside labels). "
        "Leave data_collator out, or let yours pass on everything that Distillation.collator() "
        "gives"
    )


def _tokens(batch: Batch, labels: Tensor) -> int:
    """Return how many of a micro-batch's tokens count; none if it only fills up a share."""
    return int(batch.lengths.sum()) if bool((labels != IGNORED).any()) else 0


def _balance_of(outputs: Any) -> Tensor:
    """Return the load-balancing loss of a pass, without its weight."""
    loss = getattr(outputs, "aux_loss", None)
    if not isinstance(loss, Tensor):
        raise InputError(
            "the student's configuration has output_router_logits: true, but its output has no "
            "aux_loss, the load-balancing loss. Set it to false"
        )
    return loss


def _check_data(data: object, collator: Any) -> None:
    """Check, with one sequence, that a data set and a collator give targets."""
    if not isinstance(data, Shares):
        raise InputError(
            f"train_dataset is a {type(data).__name__}; targets belong to their cache's "
            "sequences. Give a CacheDataset or an IterableCacheDataset "
            "(rekindle.train.hf.dataset), or leave it out for all sequences"
        )
    if (data.rank, data.world_size) != (0, 1):
        raise InputError(
            f"train_dataset is the share of process {data.rank} of {data.world_size}, but the "
            "Trainer divides it itself. Leave rank and world_size out"
        )
    first: Place = data.share(0, 1, batch_sequences=1).place(0, data.epoch)
    _targets(collator([first]))


def _check_optimizer(optimizer: Any) -> None:
    """Raise InputError for an optimizer of only frozen parameters: nothing would be trained."""
    groups = () if optimizer is None else optimizer.param_groups
    if optimizer is None or any(p.requires_grad for group in groups for p in group["params"]):
        return
    raise InputError(
        "the optimizer that was given holds no trained parameter: it was made before peft_config "
        "put an adapter on the model. Leave `optimizers` out, or first put the adapter on the "
        "model (peft.get_peft_model) and then make the optimizer"
    )


def _check_eval_data(datasets: Any, collator: Any) -> None:
    """Raise InputError for data sets that our collator cannot read."""
    if not isinstance(collator, TargetCollator) or datasets is None:
        return
    for data in datasets.values() if isinstance(datasets, Mapping) else [datasets]:
        if not isinstance(data, Shares):
            raise InputError(
                f"eval_dataset is a {type(data).__name__}; the collator reads sequences of the "
                "cache. Give a CacheDataset, or a data_collator of your own that takes both"
            )


def _placeholder_dataset() -> Any:
    """Return the data set shown to TRL's SFTTrainer at construction: a row that looks tokenized."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    row = InMemoryTable.from_pydict({name: [[0]] for name in COLUMNS})
    return Dataset(row, fingerprint="rekindle")  # otherwise its content would be pickled for one


def _epoch_callback(data: Shares) -> Any:
    """Return a callback that sets the data set's epoch, also after a resume."""
    from transformers import TrainerCallback

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            data.set_epoch(int((state.epoch or 0.0) + 1e-6))

    return Epochs()
