"""Check what a user's own loop passes in: a cache, teachers' names, outputs that fit a batch."""

from collections.abc import Collection, Sequence

from torch import Tensor

from rekindle.data.batch import Batch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.to_device import DeviceBatch, DeviceTargets


def check_cache(cache: object) -> None:
    """Raise InputError unless it is an open cache."""
    if not isinstance(cache, Cache):
        raise InputError(
            f"cache is {cache!r}; give an open one: Cache.open(…) of rekindle.data.cache"
        )


def check_names(cache: Cache, teachers: Sequence[str]) -> None:
    """Raise InputError unless it is a list of teachers without repetition."""
    if isinstance(teachers, str) or not teachers:
        raise InputError(
            f"teachers is {teachers!r}; give a list of the cache's language models, "
            f"{sorted(cache.teachers)}"
        )
    if repeated := sorted({name for name in teachers if [*teachers].count(name) > 1}):
        raise InputError(f"teachers names {', '.join(map(repr, repeated))} twice; name each once")


def check_allowed(allowed: Collection[str], teachers: Collection[str]) -> None:
    """Raise InputError if ``allow_missing`` is not a list of names, or names other than
    teachers.
    """
    unknown = [] if isinstance(allowed, str) else sorted({*allowed} - {*teachers})
    if isinstance(allowed, str) or unknown:
        raise InputError(
            f"allow_missing is {allowed!r}; give a list of teachers. They are {list(teachers)}"
        )


def check_rows(output: Tensor, ids: int, size: int, batch: object, labels: Tensor | None) -> None:
    """Raise InputError for what is not a batch, for outputs [B,S,…] or labels [B,S] of other
    sequences than the batch's (which would silently teach another token's row), and for fewer than
    ``size`` ids.
    """
    if not isinstance(batch, Batch | DeviceBatch):
        raise InputError(
            f"batch is a {type(batch).__name__}; give the collator's entry 'distillation'"
        )
    shape = tuple(
        batch.input_ids.shape if isinstance(batch, Batch) else batch.inputs["input_ids"].shape
    )
    if output.dim() != 3 or output.shape[:2] != shape:
        raise InputError(
            f"the student's output is {tuple(output.shape)}, but the batch has {shape[0]} "
            f"sequences of {shape[1]} tokens: give [{shape[0]}, {shape[1]}, …]. (Remove positions "
            "that the model itself puts before the text, as with prompt tuning)"
        )
    if labels is not None and labels.shape != shape:
        raise InputError(f"labels are {tuple(labels.shape)}; they must be {shape}, like the batch")
    if ids < size:
        raise InputError(f"the student's output has {ids:,} ids; the cache has {size:,}")


def check_moved(name: str, target: DeviceTargets, temperature: float) -> None:
    """Raise InputError for targets that were sent to the device at another temperature."""
    if target.temperature != temperature:
        raise InputError(
            f"the batch was sent with {name!r} at temperature {target.temperature:g}, but it is "
            f"taught at {temperature:g}: send it by Distillation.to_device"
        )
