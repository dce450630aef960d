"""Teachers too large for one device: spread over the devices of this machine (``device_map:
auto``), or split among the processes of torchrun (``tp_plan: auto``).

For the latter, the main process does all the unshared work and tells the others which passes to
make with it: tensor parallelism needs all of them in each pass. Both methods are transformers' own.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rekindle.data.errors import InputError, RekindleError
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.distributed import (
    PATIENCE,
    ElsewhereError,
    World,
    join_world,
    reporting_lost_processes,
)
from rekindle.train.launch import current_launch
from rekindle.train.model.files import load_config
from rekindle.train.model.folder import is_adapter
from rekindle.train.model.meta import shape_only

log = logging.getLogger("rekindle")

ERROR_KEY = "rekindle/said"  # where the processes meet: the error that the main one ends with
ERROR_WAIT = timedelta(seconds=10)  # one of them may reach the same point later
HEARD_WAIT = timedelta(
    seconds=2
)  # for the main one, which may hold the meeting place, before it ends

_control: list[dist.ProcessGroup] = []  # where the main process tells the others what to do


def check_processes(teachers: Sequence[TeacherConfig], in_this_process: bool = True) -> None:
    """Raise InputError if a teacher is to be split among processes, and there is only one process,
    or (not ``in_this_process``) the processes belong to an executor.
    """
    split = next((teacher for teacher in teachers if teacher.tp_plan), None)
    if split is None:
        return
    if not in_this_process:
        raise InputError(
            f"teacher {split.name!r}: tp_plan auto splits it among the processes of torchrun, "
            "each of which makes a part of every pass. Leave --workers and --executor out"
        )
    if current_launch().world_size == 1:
        raise InputError(
            f"teacher {split.name!r}: tp_plan auto splits it among the processes of torchrun, "
            "and this is the only one. Start as many as it needs: torchrun --nproc-per-node 2 "
            "--no-python pipeline cache-teachers …; or let one process use several devices, with "
            "device_map: auto"
        )


@contextmanager
def in_step(teachers: Sequence[TeacherConfig]) -> Iterator[bool]:
    """Join the processes of torchrun if a teacher is to be split among them; give whether this one
    only follows (``follow``). At the end the main process releases the others.
    """
    if not any(teacher.tp_plan for teacher in teachers):
        yield False
        return
    with join_world() as world:
        # The others wait as long as the main process works alone.
        _control.append(dist.new_group(backend="gloo", timeout=PATIENCE))
        try:
            yield not world.main
        except RekindleError as error:
            raise _without_repeat(error, world) from None
        finally:
            if world.main:
                # one that has ended hears nothing; it gave the reason
                with suppress(RekindleError):
                    send_message(None)
            _control.clear()


def _without_repeat(error: RekindleError, world: World) -> RekindleError:
    """Return the error to raise: ``error``, or one without a message if the main process gives
    the same one.
    """
    store, main_error = dist.distributed_c10d._get_default_store(), None
    with suppress(RuntimeError):  # another process has ended, or fails otherwise
        if world.main:
            store.set(ERROR_KEY, str(error))
            store.wait([f"{ERROR_KEY}/{rank}" for rank in range(1, world.size)], HEARD_WAIT)
        else:
            store.wait([ERROR_KEY], ERROR_WAIT)
            main_error = store.get(ERROR_KEY).decode()
            store.set(f"{ERROR_KEY}/{world.rank}", "heard")
    return ElsewhereError(error.exit_code) if main_error == str(error) else error


def send_message(message: object) -> None:
    """Tell the other processes what to do, from the main one. Raises RekindleError if one has
    ended.
    """
    _broadcast([message])


def receive_message() -> Any:
    """Return what the main process tells next. Raises RekindleError if it has ended."""
    box: list[Any] = [None]
    _broadcast(box)
    return box[0]


def _broadcast(box: list[Any]) -> None:
    with reporting_lost_processes():
        dist.broadcast_object_list(box, src=0, group=_control[0], device=torch.device("cpu"))


def from_pretrained_kwargs(
    config: TeacherConfig, directory: Path, auto_class: str
) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that spread or split a teacher, if it is to be.

    Raises InputError for an adapter, for a family that transformers cannot split, and without
    accelerate.
    """
    if config.device_map is None and config.tp_plan is None:
        return {}
    subject = f"teacher {config.name!r}"
    if is_adapter(directory):
        raise InputError(
            f"{subject} is an adapter, which is merged into its base in the memory of one device: "
            "device_map and tp_plan need a whole model. Merge it first"
        )
    if find_spec("accelerate") is None:
        key = "device_map" if config.device_map else "tp_plan"
        raise InputError(
            f"{subject}: {key} auto needs the package accelerate, which is not installed: in the "
            "checkout, pip install -e '.[hf]'"
        )
    if config.device_map is not None:
        return {"device_map": config.device_map}
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        raise InputError(
            f"{subject}: tp_plan auto needs a newer transformers: this one has no DistributedConfig"
        ) from None
    empty_model: Any = shape_only(load_config(directory, auto_class), auto_class)
    if not empty_model.supports_tp_plan:
        raise InputError(
            f"{subject}: transformers has no tensor-parallel plan for {type(empty_model).__name__}."
            " Leave tp_plan out; device_map: auto spreads any model over the devices of a machine"
        )
    # Only chosen rows are multiplied with the output matrix, outside the model: every process has
    # all of it, and of the input embeddings, which may be the same matrix.
    embeddings = {empty_model.get_input_embeddings(), empty_model.get_output_embeddings()}
    split_plan = {
        name: "replicate" for name, module in empty_model.named_modules() if module in embeddings
    }
    size = dist.get_world_size()
    log.info("%s: split among %d processes (tp_plan)", subject, size)
    return {"distributed_config": DistributedConfig(tp_size=size, tp_plan=split_plan)}


def check_spread(model: nn.Module, subject: str) -> None:
    """Log where a spread model lies; raise InputError if the parts used outside its passes have no
    place.
    """
    places: dict[str, Any] = getattr(model, "hf_device_map", {})
    devices = sorted({str(place) for place in places.values()})
    if len(devices) > 1:
        log.info("%s: spread over %s (device_map)", subject, ", ".join(devices))
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and output.weight.is_meta:
        raise InputError(
            f"{subject}: the devices have no room for it, and its output matrix would be moved in "
            "and out of them. Use more devices, or a lower precision"
        )
