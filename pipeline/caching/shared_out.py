"""Teachers that one device has no room for: spread over the devices of this machine (``device_map:
auto``), or shared out among the processes that torchrun has started (``tp_plan: auto``).

Of the latter the main process does all that is done alone, and tells the others which passes to
make with it: tensor parallelism needs them all in each. Both are transformers' own.
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
from rekindle.train.distributed import PATIENCE, ElsewhereError, World, join_world, meeting
from rekindle.train.launch import launched
from rekindle.train.model.files import load_config
from rekindle.train.model.folder import is_adapter
from rekindle.train.model.meta import shape_only

log = logging.getLogger("rekindle")

SAID = "rekindle/said"  # where the processes meet: the error that the main one ends with
HEARS_WITHIN = timedelta(seconds=10)  # as one of them may be later at the same
WAITS = timedelta(seconds=2)  # the main one, which may hold the place, before it ends

_control: list[dist.ProcessGroup] = []  # where the main process tells the others what to do


def check_processes(teachers: Sequence[TeacherConfig], alone: bool = True) -> None:
    """InputError where a teacher is to be shared out among processes, and there is one process, or
    (not ``alone``) the processes are those of an executor.
    """
    shared = next((teacher for teacher in teachers if teacher.tp_plan), None)
    if shared is None:
        return
    if not alone:
        raise InputError(
            f"teacher {shared.name!r}: tp_plan auto shares it out among the processes of torchrun, "
            "each of which makes a part of every pass. Leave --workers and --executor out"
        )
    if launched().world_size == 1:
        raise InputError(
            f"teacher {shared.name!r}: tp_plan auto shares it out among the processes of torchrun, "
            "and this is the only one. Start as many as it needs: torchrun --nproc-per-node 2 "
            "--no-python pipeline cache-teachers …; or let one process use several devices, with "
            "device_map: auto"
        )


@contextmanager
def in_step(teachers: Sequence[TeacherConfig]) -> Iterator[bool]:
    """Join the processes of torchrun where a teacher is to be shared out among them; give whether
    this one only follows (``follow``). At its end the main process lets the others go.
    """
    if not any(teacher.tp_plan for teacher in teachers):
        yield False
        return
    with join_world() as world:
        # They wait for as long as the main process works alone.
        _control.append(dist.new_group(backend="gloo", timeout=PATIENCE))
        try:
            yield not world.main
        except RekindleError as error:
            raise _said_once(error, world) from None
        finally:
            if world.main:
                with suppress(RekindleError):  # one that has ended hears nothing; it said why
                    tell(None)
            _control.clear()


def _said_once(error: RekindleError, world: World) -> RekindleError:
    """``error``, to be raised; one without words where the main process says the same."""
    store, said = dist.distributed_c10d._get_default_store(), None
    with suppress(RuntimeError):  # another process has ended, or has other worries
        if world.main:
            store.set(SAID, str(error))
            store.wait([f"{SAID}/{rank}" for rank in range(1, world.size)], WAITS)
        else:
            store.wait([SAID], HEARS_WITHIN)
            said = store.get(SAID).decode()
            store.set(f"{SAID}/{world.rank}", "heard")
    return ElsewhereError(error.exit_code) if said == str(error) else error


def tell(message: object) -> None:
    """Tell the other processes what to do, from the main one. RekindleError where one has ended."""
    _broadcast([message])


def told() -> Any:
    """Return what the main process tells next. RekindleError where it has ended."""
    found: list[Any] = [None]
    _broadcast(found)
    return found[0]


def _broadcast(found: list[Any]) -> None:
    with meeting():
        dist.broadcast_object_list(found, src=0, group=_control[0], device=torch.device("cpu"))


def loading(config: TeacherConfig, directory: Path, auto_class: str) -> dict[str, Any]:
    """Return what transformers is to be told when it loads a teacher.

    Raises InputError for an adapter, for a family that transformers cannot share out, and without
    accelerate.
    """
    if config.device_map is None and config.tp_plan is None:
        return {}
    who = f"teacher {config.name!r}"
    if is_adapter(directory):
        raise InputError(
            f"{who} is an adapter, which is merged into its base in the memory of one device: "
            "device_map and tp_plan need a whole model. Merge it first"
        )
    if find_spec("accelerate") is None:
        key = "device_map" if config.device_map else "tp_plan"
        raise InputError(
            f"{who}: {key} auto needs the package accelerate, which is not installed: in the "
            "checkout, pip install -e '.[hf]'"
        )
    if config.device_map is not None:
        return {"device_map": config.device_map}
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        raise InputError(
            f"{who}: tp_plan auto needs a newer transformers: this one has no DistributedConfig"
        ) from None
    shape: Any = shape_only(load_config(directory, auto_class), auto_class)
    if not shape.supports_tp_plan:
        raise InputError(
            f"{who}: transformers has no tensor-parallel plan of {type(shape).__name__}. Leave "
            "tp_plan out; device_map: auto spreads any model over the devices of a machine"
        )
    # The output matrix is multiplied with chosen rows alone, outside the model: every process has
    # it whole, and the input embeddings, which may be the same matrix.
    ends = {shape.get_input_embeddings(), shape.get_output_embeddings()}
    whole = {name: "replicate" for name, module in shape.named_modules() if module in ends}
    size = dist.get_world_size()
    log.info("%s: shared out among %d processes (tp_plan)", who, size)
    return {"distributed_config": DistributedConfig(tp_size=size, tp_plan=whole)}


def check_spread(model: nn.Module, who: str) -> None:
    """Say where a spread model lies; InputError where what is outside its passes has no place."""
    places: dict[str, Any] = getattr(model, "hf_device_map", {})
    used = sorted({str(place) for place in places.values()})
    if len(used) > 1:
        log.info("%s: spread over %s (device_map)", who, ", ".join(used))
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and output.weight.is_meta:
        raise InputError(
            f"{who}: the devices have no room for it, and its output matrix would be moved in and "
            "out of them. Use more devices, or a lower precision"
        )
