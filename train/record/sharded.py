"""A sharded student on disk: every process writes its own files and reads its own rows.

Tensors are written whole, into files that any number of processes can read and that transformers
loads: ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with an index. The tensors of
a file are gathered one at a time, in the process that writes it: it never holds more than the file
and one more tensor.
"""

import json
import math
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.storage.addresses import sha256_of
from rekindle.data.storage.atomic import sync
from rekindle.train.distributed import ParallelStudent, World, blocks, full_tensor, local_rows
from rekindle.train.model.folder import INDEX_FILE, WEIGHTS_FILE, read_header
from rekindle.train.record.run_folder import LOCK_FILE
from rekindle.train.student import SavedTensor

LARGEST = 2 << 30  # bytes of a file, unless a block of the model or a tensor has more
LEAST = 64 << 20  # bytes of a checkpoint's file: smaller ones are not worthwhile

Unit = Mapping[str, Tensor]  # tensors that belong in one file, by name


def write_student(
    student: ParallelStudent,
    folder: Path,
    about: Mapping[str, object] | None = None,
    *,
    as_held: bool = False,
    limit: int | None = None,
) -> dict[str, str]:
    """Write a sharded student as ``Student.save_pretrained`` does, in files of ``limit`` bytes
    (None: ``LARGEST``); return the sha256 of the files that this process wrote.

    Every process takes part and sees the ``folder``. With ``as_held`` (see ``Student.save_model``)
    all write; otherwise only the main one, because transformers can convert only there.
    """
    wrapped, world = student.student, student.world
    tied = getattr(wrapped.model, "all_tied_weights_keys", None) or {}

    def convert(tensors: Unit, file: Path) -> None:
        with TemporaryDirectory(dir=folder) as temporary:
            wrapped.save_model(Path(temporary), tensors)
            os.rename(Path(temporary, WEIGHTS_FILE), file)

    def save(tensors: Unit, file: Path) -> None:
        untied = {k: v for k, v in tensors.items() if k not in tied or tied[k] not in tensors}
        save_file(untied, file, {"format": "pt"})

    if world.main:
        # the files beside the weights; this would remove weights written before
        wrapped.save_model(folder, {})
    units, file, limit = _units_of(wrapped.model), folder / WEIGHTS_FILE, limit or LARGEST
    if as_held:
        digests = write_files(world, units, limit, file, save)
    else:
        digests = write_files(world, units, limit, file, convert, writers=1)
    places = {key: name for name in digests for key in read_header(folder / name)}
    file_of = {key: name for of_process in world.gather(places) for key, name in of_process.items()}
    state = wrapped.state_dict(keep_vars=True)
    other_weights = {
        k: full_tensor(v.detach()).cpu() for k, v in state.items() if not k.startswith("model.")
    }
    if world.main:
        wrapped.save_beside(folder, other_weights, about)
        if WEIGHTS_FILE not in file_of.values():
            sizes = {
                "total_parameters": wrapped.model.num_parameters(),
                "total_size": _bytes_of(units),
            }
            index = {"metadata": sizes, "weight_map": file_of}
            content = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / INDEX_FILE).write_text(content, encoding="utf-8")
    return digests


def write_files(
    world: World,
    units: Sequence[Unit],
    limit: int,
    file: Path,
    save: Callable[[Unit, Path], None],
    writers: int | None = None,
) -> dict[str, str]:
    """``save`` all tensors of the ``units`` as ``file``, or as several files with numbers in their
    names; return the sha256 of those that this process wrote. Every process takes part.

    The first ``writers`` processes write (None: all), each one file at a time.
    """
    parts = divide_into_files([_bytes_of([unit]) for unit in units], limit)
    writers = writers or world.size
    digests: dict[str, str] = {}
    for first_number in range(0, len(parts), writers):
        own_number, tensors = first_number + world.rank, dict[str, Tensor]()
        for number in range(first_number, min(first_number + writers, len(parts))):
            for unit in parts[number]:
                tensors |= _gather_unit(units[unit], number == own_number)
        if world.rank < writers and own_number < len(parts):
            numbering = f"-{own_number + 1:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
            path = file.with_name(f"{file.stem}{numbering}{file.suffix}")
            save(tensors, path)
            sync(path)  # the main process cannot do it for a file of another machine
            digests[path.name] = sha256_of(path)
    return digests


def divide_into_files(sizes: Sequence[int], limit: int) -> list[range]:
    """Divide units of these ``sizes`` into runs of at most ``limit`` bytes each, or of one unit."""
    ranges, first, total = list[range](), 0, 0
    for number, size in enumerate(sizes):
        if number > first and total + size > limit:
            ranges.append(range(first, number))
            first, total = number, 0
        total += size
    return [*ranges, range(first, len(sizes))]


def checkpoint_file_size(tensors: Iterable[Tensor], world: World) -> int:
    """Return the size of a checkpoint's files, so that every process writes an equal part."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return min(LARGEST, max(LEAST, math.ceil(total / world.size)))


def _bytes_of(units: Sequence[Unit]) -> int:
    """Return the bytes of all tensors, tied ones counted once."""
    tensors = {id(tensor): tensor for unit in units for tensor in unit.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _units_of(model: torch.nn.Module) -> list[Unit]:
    """Return the model's tensors, grouped if they must be in one file: tied ones, and those of a
    block, from which transformers may form the tensors of the family's files.
    """
    block_names = {
        id(tensor): f"block {number}"
        for number, block in enumerate(blocks(model))
        for tensor in block.state_dict(keep_vars=True).values()
    }
    units: dict[object, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        units.setdefault(block_names.get(id(tensor), id(tensor)), {})[name] = tensor
    return list(units.values())


def _gather_unit(unit: Unit, is_own: bool) -> dict[str, Tensor]:
    """Gather tensors, each once; keep them, on the CPU, if the unit ``is_own``."""
    gathered: dict[int, Tensor | None] = {}
    for tensor in unit.values():
        if id(tensor) not in gathered:
            gathered[id(tensor)] = _gather_tensor(tensor, is_own)
    return {name: own for name, t in unit.items() if (own := gathered[id(t)]) is not None}


def _gather_tensor(tensor: Tensor, is_own: bool) -> Tensor | None:
    full = full_tensor(tensor.detach())
    return full.cpu().contiguous() if is_own else None


# --- reading --------------------------------------------------------------------------------------


@torch.no_grad()
def read_rows(saved: Mapping[str, SavedTensor], destinations: Mapping[str, Tensor]) -> None:
    """Read into each of the ``destinations`` the rows that it holds of the tensor of its name."""
    for file in dict.fromkeys(tensor.file for tensor in saved.values()):
        with safe_open(file, "pt") as stored:
            for name, tensor in saved.items():
                if tensor.file == file:
                    _fill_rows(destinations[name], stored, tensor.key)


def _fill_rows(destination: Tensor, stored: Any, key: str) -> None:
    rows, first = local_rows(destination)
    if rows.dim() == 0:
        rows.copy_(stored.get_tensor(key))
    elif len(rows):
        rows.copy_(stored.get_slice(key)[first : first + len(rows)])


# --- files that all processes see -----------------------------------------------------------------


def check_shared_folder(run: Path, world: World) -> None:
    """Raise InputError if a process does not see the folder that the main one works in."""
    main_lock = world.decide(lambda: _read(run / LOCK_FILE))

    def check() -> None:
        if _read(run / LOCK_FILE) != main_lock:
            raise InputError(
                f"process {world.rank} on {socket.gethostname()} does not see the main process's "
                f"files in {run}: with train.parallel: fsdp, and to --resume, all processes read "
                "and write there. Give an --out on a file system that all nodes share"
            )

    world.agree(check)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None


def check_visible(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if files that other processes have written are not visible."""
    invisible = [name for name in names if not (folder / name).is_file()]
    if invisible:
        raise CheckpointError(
            f"{invisible[0]}, which another process has written to {folder}, is not visible to the "
            "main one. Give an --out on a file system that all nodes share"
        )
