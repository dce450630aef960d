"""Exports as files: JSON lines, parquet, Arrow, or a folder of Hugging Face's ``datasets``.

A file appears whole or not at all.
"""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rekindle.data.errors import InputError
from rekindle.data.exchange.exporting import Export
from rekindle.data.storage.atomic import new_file, new_folder

if TYPE_CHECKING:
    from datasets import Dataset

Advance = Callable[[int], None]
# Of numbers in JSON lines: 500 times finer than what a codec keeps; of small ones, as the logarithm
# of a tail that is nearly all, so many digits.
DECIMALS, DIGITS = 6, 7
SUFFIXES = (".jsonl", ".parquet", ".arrow")


def write_export(
    export: Export, out: Path, force: bool = False, progress: Advance = lambda rows: None
) -> int:
    """Write the rows to ``out``, by its ending, or as a dataset's folder where it has none; return
    how many there are. Raises InputError for another ending, for what is there already, and, even
    with ``force``, for a folder that is no data set's.
    """
    if out.suffix and out.suffix not in SUFFIXES:
        raise InputError(
            f"{out}: rows are written as {', '.join(SUFFIXES)}, or, to a name without an ending, "
            "as a folder that datasets.load_from_disk reads"
        )
    _check_target(out, force)
    count = 0

    def counted(rows: int) -> None:
        nonlocal count
        count += rows
        progress(rows)

    if not out.suffix:
        with new_folder(out) as folder:
            _save_dataset(export, folder, counted)
    elif out.suffix == ".jsonl":
        with new_file(out) as file:
            for row in export.rows():
                file.write(json.dumps(plain(row), ensure_ascii=False).encode() + b"\n")
                counted(1)
    else:
        with new_file(out) as file:
            parquet = out.suffix == ".parquet"
            make: Any = pq.ParquetWriter if parquet else pa.ipc.new_file
            with make(file, export.schema) as writer:
                for batch in export.batches(counted):
                    writer.write_batch(batch)
    return count


def _check_target(out: Path, force: bool) -> None:
    """Raise InputError where ``out`` must not be written to. A folder is replaced only by a folder,
    and only if it is a data set's: whatever else it holds is somebody's.
    """
    if not out.exists():
        return
    if out.is_dir() and (out.suffix or not _is_dataset(out)):
        raise InputError(
            f"{out} is a folder, and holds no data set; it is left as it is: give another name"
        )
    if not force:
        raise InputError(f"{out} is there already; give another name, or --force to replace it")


def _is_dataset(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or {"state.json", "dataset_info.json"} <= names


def _save_dataset(export: Export, folder: Path, progress: Advance) -> None:
    """As ``Dataset.save_to_disk`` leaves it, through one file that is mapped: in bounded memory."""
    with tempfile.TemporaryDirectory(prefix=".", suffix=".new", dir=folder.parent) as rows:
        mapped_dataset(export, Path(rows) / "rows.arrow", progress).save_to_disk(folder)


def mapped_dataset(export: Export, path: Path, progress: Advance = lambda rows: None) -> "Dataset":
    """A dataset that is mapped from ``path``, which is written."""
    from datasets import Dataset

    with new_file(path) as file, pa.ipc.new_stream(file, export.schema) as writer:
        for batch in export.batches(progress):
            writer.write_batch(batch)
    return Dataset.from_file(str(path))


def held_dataset(export: Export) -> "Dataset":
    """A dataset that is held in memory."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    table = InMemoryTable(pa.Table.from_batches(export.batches(), export.schema))
    return Dataset(table, fingerprint=export.digest)


def plain(value: Any) -> Any:
    """A value as JSON has it, with so many DECIMALS; null for what is no finite number."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(inside) for key, inside in value.items() if inside is not None}
    if isinstance(value, list):
        return [plain(inside) for inside in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return round(value, DECIMALS) if abs(value) >= 0.1 else float(f"{value:.{DIGITS}g}")
    return value
