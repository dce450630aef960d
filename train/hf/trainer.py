"""A mixin that teaches the student of a Hugging Face Trainer (or of TRL's SFTTrainer) from a cache.

It makes the batches and the loss; optimiser, schedule, precision, checkpoints and logs stay the
Trainer's. transformers is imported by whoever mixes it in.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rekindle.data.batch import Batch
from rekindle.data.errors import InputError
from rekindle.train.hf.collator import TARGETS
from rekindle.train.hf.dataset import CacheDataset, IterableCacheDataset, Place, Shares
from rekindle.train.hf.distillation import Distillation
from rekindle.train.objective.selection import Counts

COLUMNS = ["input_ids", "labels", "distillation"]  # of a row that stands for a cache's sequences


class DistillationMixin:
    """``class KDTrainer(DistillationMixin, Trainer)``: takes one argument more, ``distillation``.

    The training data set is a CacheDataset (None: one of all sequences, in the order of
    ``args.seed``) or an IterableCacheDataset, of the whole cache: the processes share it here. The
    collator is the distillation's; another one must give its targets, too. The loss is the mean
    over the rows of the whole step, whatever the micro-batches and processes; ``ce`` and
    ``kd/TEACHER`` are logged beside it.
    """

    # To transformers: do not divide the loss by the number of micro-batches.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, distillation: Distillation, **kwargs: Any):
        """Take the Trainer's own arguments, and what the student is taught.

        Raises InputError for a student of another vocabulary or task, another data set, and a
        collator that gives no targets.
        """
        self.distillation = distillation
        self._counts: Counts | None = None  # of the step in hand
        self._shown: dict[str, Tensor] = {}  # sums since the last log
        self._steps_shown = 0  # how many steps that is
        known = signature(super().__init__).parameters.values()
        named = [p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD][: len(args)]
        if len(named) < len(args) or kwargs.keys() & set(named):
            raise TypeError(
                f"give the arguments of {type(self).__name__} once each, by their names"
            )
        kwargs |= dict(zip(named, args, strict=True))
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = distillation.collator()
        everything = kwargs.get("train_dataset") is None
        data = CacheDataset(distillation.cache) if everything else kwargs["train_dataset"]
        kwargs["train_dataset"] = data
        _check_data(data, kwargs["data_collator"])
        if hasattr(super(), "_prepare_dataset"):  # TRL's takes none but those of `datasets`
            kwargs["train_dataset"] = _stand_in()
        super().__init__(**kwargs)
        trainer: Any = self
        trainer.train_dataset = data
        if everything:  # the Trainer's own, where no arguments are given
            data.seed = trainer.args.seed
        if not hasattr(super(), "loss_is_scaled_for_ga"):
            raise InputError(
                "this version of transformers would divide the loss by the number of micro-batches "
                "once more: it has no Trainer.loss_is_scaled_for_ga. Use transformers 5.19 or newer"
            )
        if kwargs.get("compute_loss_func") is not None or trainer.label_smoother is not None:
            raise InputError(
                "compute_loss_func and label_smoothing_factor say another loss than the "
                "distillation does. Leave them out"
            )
        parts = (trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size())
        if parts != (1, 1, 1):
            raise InputError(
                "tensor, context and sequence parallelism split a sequence or repeat a batch, and "
                f"a cache's targets are of whole sequences, once (sizes {parts}). Use DDP or FSDP"
            )
        distillation.check_student(trainer.model, trainer.processing_class)
        trainer.add_callback(_epochs(trainer.train_dataset))

    # --- batches ---

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's share of the data set, in its order."""
        trainer: Any = self
        return self._loader(trainer.train_dataset, trainer._train_batch_size, True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the same of an evaluation on a cache's sequences; the Trainer's own of others."""
        trainer: Any = self
        data = trainer.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str) and isinstance(trainer.eval_dataset, Mapping):
            data = trainer.eval_dataset[data]
        if not isinstance(data, Shares):
            found: DataLoader = super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
            return found
        return self._loader(data, trainer.args.eval_batch_size, False)

    def _loader(self, data: Shares, batch: int, training: bool) -> DataLoader:
        """Not accelerate's: it would share what is shared already."""
        trainer: Any = self
        args = trainer.args
        if isinstance(data, IterableCacheDataset) and data.batch_sequences != batch:
            raise InputError(
                f"the data set has batch_sequences {data.batch_sequences}, the Trainer reads "
                f"batches of {batch} (per_device_train_batch_size): give it the same"
            )
        return DataLoader(
            data.share(args.process_index, args.world_size),
            batch_size=batch,
            collate_fn=trainer.data_collator,
            drop_last=training and args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Take a step's micro-batches, and count what its means are over, on all processes."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        taken = [(_targets(batch), batch["labels"]) for batch in batches]
        self._counts = self.distillation.counts(taken).over(self._sum)
        self._steps_shown += 1
        return batches, items

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes."""
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        total = torch.tensor(values, dtype=torch.float64, device="cpu")
        if accelerator.num_processes > 1:
            if accelerator.device.type != "cpu":
                total = total.to(accelerator.device)
            total = accelerator.reduce(total, reduction="sum")
        found: list[float] = total.tolist()
        return found

    # --- the loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss, or the loss of an evaluation's batch.

        A batch without targets is evaluated as the Trainer does it.
        """
        if TARGETS not in inputs and not model.training:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        batch = _targets(inputs)
        shown = {name: value for name, value in inputs.items() if name not in (TARGETS, "labels")}
        outputs = model(**shown)
        counts = self._counts if model.training else None
        found = self.distillation.loss(outputs.logits, batch, inputs["labels"], counts)
        loss = found.loss
        if model.training:
            self._note(found.ce, found.kd)
            # Gradients are averaged over the processes, and each has its share of one mean.
            loss = loss * self.accelerator.num_processes  # type: ignore[attr-defined]
        return (loss, outputs) if return_outputs else loss

    def _note(self, ce: Tensor, kd: Mapping[str, Tensor]) -> None:
        for name, value in {"ce": ce, **{f"kd/{name}": kd[name] for name in kd}}.items():
            self._shown[name] = self._shown.get(name, 0.0) + value.detach().float()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means of the cross-entropy and the divergences over the steps since the last."""
        if "loss" in logs and self._shown:
            steps = max(self._steps_shown, 1)
            names = sorted(self._shown)
            sums = self._sum([float(self._shown[name]) for name in names])
            logs |= {name: value / steps for name, value in zip(names, sums, strict=True)}
            self._shown, self._steps_shown = {}, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave a cache's sequences as they are; TRL's SFTTrainer would tokenize them."""
        if isinstance(dataset, Shares) or getattr(dataset, "column_names", None) == COLUMNS:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)  # type: ignore[misc]


def _targets(inputs: Mapping[str, Any]) -> Batch:
    found = inputs.get(TARGETS)
    if isinstance(found, Batch) and "labels" in inputs:
        return found
    raise InputError(
        f"a batch has {', '.join(sorted(inputs))} and no targets ({TARGETS!r}, beside labels). "
        "Leave data_collator out, or let yours hand on all that Distillation.collator() gives"
    )


def _check_data(data: object, collator: Any) -> None:
    """Check, with one sequence, that a data set and a collator give targets."""
    if not isinstance(data, Shares):
        raise InputError(
            f"train_dataset is a {type(data).__name__}; targets belong to the sequences of their "
            "cache. Give a CacheDataset or an IterableCacheDataset (rekindle.train.hf.dataset), or "
            "none for all sequences"
        )
    if (data.rank, data.world_size) != (0, 1):
        raise InputError(
            f"train_dataset is the share of process {data.rank} of {data.world_size}; the "
            "Trainer's processes share it by themselves. Leave rank and world_size out"
        )
    first: Place = data.place(0, data.epoch)
    _targets(collator([first]))


def _stand_in() -> Any:
    """Return what TRL's SFTTrainer is shown while it is made: a row as if it were tokenized."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    row = InMemoryTable.from_pydict({name: [[0]] for name in COLUMNS})
    return Dataset(row, fingerprint="rekindle")  # a fingerprint of its content would be pickled


def _epochs(data: Shares) -> Any:
    """Return a callback that tells the data set of each epoch, also after a resume."""
    from transformers import TrainerCallback

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            data.set_epoch(int((state.epoch or 0.0) + 1e-6))

    return Epochs()
