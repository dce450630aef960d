"""What a loop of one's own gives: a cache, names of its teachers, outputs that fit a batch."""

from collections.abc import Collection, Sequence

from torch import Tensor

from rekindle.data.batch import Batch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.to_device import DeviceBatch, DeviceTargets


def check_cache(cache: object) -> None:
    """InputError for what is no open cache."""
    if not isinstance(cache, Cache):
        raise InputError(
            f"cache is {cache!r}; give an open one: Cache.open(…) of rekindle.data.cache"
        )


def check_names(cache: Cache, teachers: Sequence[str]) -> None:
    """InputError for what is no list of teachers, each once."""
    if isinstance(teachers, str) or not teachers:
        raise InputError(
            f"teachers is {teachers!r}; give a list of the cache's language models, "
            f"{sorted(cache.teachers)}"
        )
    if twice := sorted({name for name in teachers if [*teachers].count(name) > 1}):
        raise InputError(f"teachers names {', '.join(map(repr, twice))} twice; name each once")


def check_allowed(allowed: Collection[str], teachers: Collection[str]) -> None:
    """InputError for ``allow_missing`` that is no list of names, or names who does not teach."""
    unknown = [] if isinstance(allowed, str) else sorted({*allowed} - {*teachers})
    if isinstance(allowed, str) or unknown:
        raise InputError(
            f"allow_missing is {allowed!r}; give a list of teachers. They are {list(teachers)}"
        )


def check_rows(output: Tensor, ids: int, size: int, batch: object, labels: Tensor | None) -> None:
    """InputError for what is no batch, for outputs [B,S,…] or labels [B,S] of other sequences than
    the batch's (another token's row would be taught in silence), and of fewer than ``size`` ids.
    """
    if not isinstance(batch, Batch | DeviceBatch):
        raise InputError(
            f"batch is a {type(batch).__name__}; give what the collator has under 'distillation'"
        )
    shape = tuple(
        batch.input_ids.shape if isinstance(batch, Batch) else batch.inputs["input_ids"].shape
    )
    if output.dim() != 3 or output.shape[:2] != shape:
        raise InputError(
            f"the student's output is {tuple(output.shape)}, and the batch has {shape[0]} sequences"
            f" of {shape[1]} tokens: give [{shape[0]}, {shape[1]}, …]. (Cut away what a model puts "
            "before the text by itself, as one of prompt tuning does)"
        )
    if labels is not None and labels.shape != shape:
        raise InputError(f"labels are {tuple(labels.shape)}; they must be {shape}, as the batch is")
    if ids < size:
        raise InputError(f"the student's output is of {ids:,} ids; the cache has {size:,}")


def check_moved(name: str, found: DeviceTargets, temperature: float) -> None:
    """InputError for targets that were sent to the device at another temperature."""
    if found.temperature != temperature:
        raise InputError(
            f"the batch was sent with {name!r} at temperature {found.temperature:g}, which is "
            f"taught at {temperature:g}: send it by Distillation.to_device"
        )
