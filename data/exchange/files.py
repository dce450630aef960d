"""Write exports as files: JSON lines, parquet, Arrow, or a folder of Hugging Face's ``datasets``.

A file appears complete or not at all.
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
# For numbers in JSON lines: DECIMALS is 500 times finer than a codec; DIGITS is for small numbers,
# such as the logarithm of a tail that is nearly everything.
DECIMALS, DIGITS = 6, 7
SUFFIXES = (".jsonl", ".parquet", ".arrow")


def write_export(
    export: Export, out: Path, force: bool = False, progress: Advance = lambda rows: None
) -> int:
    """Write the rows to ``out``, in the format of its ending, or as a dataset folder if it has
    none; return how many there are. Raise InputError for another ending, for an existing ``out``
    and, even with ``force``, for a folder that is not a data set's.
    """
    if out.suffix and out.suffix not in SUFFIXES:
        raise InputError(
            f"{out}: rows are written as {', '.join(SUFFIXES)} or, to a name without an ending, "
            "as a folder that datasets.load_from_disk reads"
        )
    _check_target(out, force)
    count = 0

    def report(rows: int) -> None:
        nonlocal count
        count += rows
        progress(rows)

    if not out.suffix:
        with new_folder(out) as folder:
            _save_dataset(export, folder, report)
    elif out.suffix == ".jsonl":
        with new_file(out) as file:
            for row in export.rows():
                file.write(json.dumps(plain(row), ensure_ascii=False).encode() + b"\n")
                report(1)
    else:
        with new_file(out) as file:
            is_parquet = out.suffix == ".parquet"
            make_writer: Any = pq.ParquetWriter if is_parquet else pa.ipc.new_file
            with make_writer(file, export.schema) as writer:
                for batch in export.batches(report):
                    writer.write_batch(batch)
    return count


def _check_target(out: Path, force: bool) -> None:
    """Raise InputError if ``out`` must not be written to. A folder is only replaced by a folder,
    and only if it is a data set's: anything else belongs to somebody.
    """
    if not out.exists():
        return
    if out.is_dir() and (out.suffix or not _is_dataset(out)):
        raise InputError(
            f"{out} is a folder that holds no data set, and is left as it is: give another name"
        )
    if not force:
        raise InputError(f"{out} already exists; give another name, or --force to replace it")


def _is_dataset(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or {"state.json", "dataset_info.json"} <= names


def _save_dataset(export: Export, folder: Path, progress: Advance) -> None:
    """Write what ``Dataset.save_to_disk`` would, through one mapped file, in bounded memory."""
    with tempfile.TemporaryDirectory(prefix=".", suffix=".new", dir=folder.parent) as rows:
        mapped_dataset(export, Path(rows) / "rows.arrow", progress).save_to_disk(folder)


def mapped_dataset(export: Export, path: Path, progress: Advance = lambda rows: None) -> "Dataset":
    """Return a dataset that is mapped from ``path``, which is written first."""
    from datasets import Dataset

    with new_file(path) as file, pa.ipc.new_stream(file, export.schema) as writer:
        for batch in export.batches(progress):
            writer.write_batch(batch)
    return Dataset.from_file(str(path))


def in_memory_dataset(export: Export) -> "Dataset":
    """Return a dataset that is held in memory."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    table = InMemoryTable(pa.Table.from_batches(export.batches(), export.schema))
    return Dataset(table, fingerprint=export.digest)


def plain(value: Any) -> Any:
    """Return a value as in JSON, rounded to DECIMALS; null for a number that is not finite."""
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
