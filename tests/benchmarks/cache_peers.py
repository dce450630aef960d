"""Other ways to hold the cache's targets: bare copies, parquet, datasets, npz and streaming."""

import importlib
import importlib.metadata
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy
from cache_rows import BATCH, LENGTH, SHARD, TARGETS, Ints, K, Rows, in_order
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

# ---------------------------------------------------------------------------------------------


class Peer:
    """One way to hold ``rows`` in ``folder``. ``batch`` returns Rows, possibly of tensors."""

    requires = ""  # a module that may be missing

    def __init__(self, folder: Path, rows: Rows):
        self.folder, self.all, self.count = folder, rows, len(rows.tokens)
        if self.requires:
            importlib.import_module(self.requires)

    def write(self) -> None:
        raise NotImplementedError

    def open(self) -> None:
        """Do what a reader does once."""

    def batch(self, index: Ints) -> Rows:
        raise NotImplementedError

    def stream(self) -> Iterator[Rows]:
        """Yield batches of all sequences, in order if the format has one."""
        return map(self.batch, in_order(self.count))

    def bytes(self) -> int:
        """Return the bytes on disk, without the tokens."""
        found = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())
        return found - self.all.tokens.nbytes

    def fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def samples(self) -> Iterator[dict[str, NDArray]]:
        for row in range(self.count):
            yield {name: column[row] for name, column in self.all._asdict().items()}


def stacked(samples: list[dict[str, Any]]) -> Rows:
    return Rows(*(np.stack([sample[name] for sample in samples]) for name in Rows._fields))


class Copies(Peer):
    """No store: the lower bound of any store that copies a batch together."""

    def write(self) -> None:
        self.held = Rows(*(column.copy() for column in self.all))

    def batch(self, index: Ints) -> Rows:
        out = Rows(*(np.empty((len(index), *c.shape[1:]), c.dtype) for c in self.held))
        for column, held in zip(out, self.held, strict=True):
            for number, row in enumerate(index.tolist()):
                column[number] = held[row]
        return out

    def bytes(self) -> int:
        return sum(column.nbytes for column in self.held[1:])


class Parquet(Peer):
    """Parquet as DistillKit writes it: rows of Python lists of bytes, 1000 a row group, default
    options.

    ``input_ids`` list<uint64>; ``bytepacked_indices`` and ``compressed_logprobs``
    list<list<uint8>>. Positions are implied by the list. Source: arcee-ai/DistillKit,
    distillkit/sample_common.py at 40198e11.
    """

    GROUP = 1000

    def write(self) -> None:
        folder = self.fresh()
        lists = pa.list_(pa.list_(pa.uint8()))
        names = ("input_ids", "bytepacked_indices", "compressed_logprobs")
        types = (pa.list_(pa.uint64()), lists, lists)
        schema = pa.schema(list(zip(names, types, strict=True)))
        a = self.all
        for number, at in enumerate(range(0, self.count, self.GROUP)):
            part = slice(at, at + self.GROUP)
            parts = (a.values[part], a.scalars[part].view(np.uint8))
            columns = (a.tokens[part], a.ids[part].view(np.uint8), np.concatenate(parts, axis=2))
            lists_of = (c.tolist() for c in columns)
            arrays = [pa.array(v, t) for v, t in zip(lists_of, types, strict=True)]
            with pq.ParquetWriter(folder / f"data_{number}.parquet", schema) as writer:
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    def open(self) -> None:
        files = range(-(-self.count // self.GROUP))
        self.files = [pq.ParquetFile(self.folder / f"data_{n}.parquet") for n in files]

    def bytes(self) -> int:
        groups = [f.metadata.row_group(0) for f in self.files]
        return sum(g.column(c).total_compressed_size for g in groups for c in (1, 2))

    def batch(self, index: Ints) -> Rows:
        parts, files = [], index // self.GROUP
        for number in np.unique(files):
            table = self.files[number].read_row_group(0, use_threads=False)
            parts.append(table.take(index[files == number] % self.GROUP))
        back = np.argsort(np.argsort(files, kind="stable"), kind="stable")
        return self._rows(pa.concat_tables(parts).take(back))

    def stream(self) -> Iterator[Rows]:
        for file in self.files:
            for batch in file.iter_batches(BATCH, use_threads=False):
                yield self._rows(pa.table(batch))

    def _rows(self, table: pa.Table) -> Rows:
        shape, arrays = (table.num_rows, TARGETS, -1), []
        for name in table.column_names:
            column = table[name].combine_chunks().flatten()
            arrays.append((column if name == "input_ids" else column.flatten()).to_numpy())
        both = arrays[2].reshape(shape)
        return Rows(
            arrays[0].reshape(table.num_rows, LENGTH),
            np.broadcast_to(np.arange(TARGETS, dtype=np.uint16), shape[:2]),
            arrays[1].view(np.uint16).reshape(shape),
            both[:, :, :K],
            np.ascontiguousarray(both[:, :, K:]).view(np.uint16),
        )


class HuggingFace(Peer):
    """``datasets``, map-style, lists of fixed-size lists; its format decides what it returns."""

    form: str | None = "arrow"

    def write(self) -> None:
        self.fresh()
        with ArrowWriter(path=str(self.folder / "data.arrow")) as writer:
            for at in range(0, self.count, 128):
                part = Rows(*(column[at : at + 128] for column in self.all))
                writer.write_table(pa.table({n: nested(c) for n, c in part._asdict().items()}))
            writer.finalize()

    def open(self) -> None:
        path = str(self.folder / "data.arrow")
        self.data = datasets.Dataset.from_file(path).with_format(self.form)

    def batch(self, index: Ints) -> Rows:
        return self._rows(self.data[index])

    def stream(self) -> Iterator[Rows]:
        return map(self._rows, self.data.iter(BATCH, drop_last_batch=True))

    def _rows(self, found: Any) -> Rows:
        if self.form != "arrow":
            return Rows(*(found[name] for name in Rows._fields))
        arrays = []
        for name, column in zip(Rows._fields, self.all, strict=True):
            flat = found[name].combine_chunks().flatten()
            flat = flat.flatten() if column.ndim == 3 else flat
            arrays.append(flat.to_numpy().reshape(found.num_rows, *column.shape[1:]))
        return Rows(*arrays)


def nested(column: NDArray) -> pa.Array:
    """Return [n,P] as list<T>, [n,P,w] as list<fixed_size_list<T,w>>."""
    flat = pa.array(column.reshape(-1))
    if column.ndim == 3:
        flat = pa.FixedSizeListArray.from_arrays(flat, column.shape[2])
    offsets = np.arange(len(column) + 1, dtype=np.int32) * column.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


class HuggingFaceNumpy(HuggingFace):
    form = "numpy"


class HuggingFaceTorch(HuggingFace):
    form = "torch"


class Safetensors(Peer):
    """A file of stacked tensors per 512 sequences, memory-mapped, read by slices."""

    def write(self) -> None:
        folder = self.fresh()
        for at in range(0, self.count, SHARD):
            part = {n: c[at : at + SHARD] for n, c in self.all._asdict().items()}
            safetensors.numpy.save_file(part, folder / f"{at // SHARD:05d}.safetensors")

    def open(self) -> None:
        paths = sorted(self.folder.iterdir())
        self.files = [safetensors.safe_open(path, "numpy") for path in paths]
        self.slices = [[file.get_slice(name) for name in Rows._fields] for file in self.files]

    def batch(self, index: Ints) -> Rows:
        out = Rows(*(np.empty((len(index), *c.shape[1:]), c.dtype) for c in self.all))
        for number, row in enumerate(index.tolist()):
            file, local = divmod(row, SHARD)
            for column, piece in zip(out, self.slices[file], strict=True):
                column[number] = piece[local : local + 1][0]
        return out

    def stream(self) -> Iterator[Rows]:
        for at in range(0, self.count - BATCH + 1, BATCH):
            file, local = divmod(at, SHARD)
            yield Rows(*(piece[local : local + BATCH] for piece in self.slices[file]))


class Npz(Peer):
    """A file per sequence, not compressed."""

    def write(self) -> None:
        folder = self.fresh()
        for number, sample in enumerate(self.samples()):
            np.savez(folder / f"{number:07d}.npz", **sample)  # type: ignore[arg-type]

    def batch(self, index: Ints) -> Rows:
        samples = []
        for number in index.tolist():
            with np.load(self.folder / f"{number:07d}.npz") as file:
                samples.append({name: file[name] for name in Rows._fields})
        return stacked(samples)


class Mosaic(Peer):
    """mosaicml-streaming (MDS): ndarray columns of fixed shape, from the local folder."""

    requires = "streaming"

    def write(self) -> None:
        module = importlib.import_module(self.requires)
        folder = self.fresh()
        kinds = {
            name: f"ndarray:{column.dtype}:{','.join(map(str, column.shape[1:]))}"
            for name, column in self.all._asdict().items()
        }
        with module.MDSWriter(out=str(folder), columns=kinds) as writer:
            for sample in self.samples():
                writer.write(sample)

    def open(self) -> None:
        module = importlib.import_module(self.requires)
        self.data = module.StreamingDataset(
            local=str(self.folder), remote=None, batch_size=BATCH, shuffle=False
        )

    def batch(self, index: Ints) -> Rows:
        return stacked([self.data[i] for i in index.tolist()])


class LitData(Peer):
    """litdata: dicts of arrays in chunks of 64 MB; its StreamingDataset is indexed by number."""

    requires = "litdata"
    shuffle = False

    def write(self) -> None:
        module = importlib.import_module("litdata.streaming")
        cache = module.Cache(str(self.fresh()), chunk_bytes="64MB")
        for number, sample in enumerate(self.samples()):
            cache[number] = sample
        cache.done()
        cache.merge()

    def open(self) -> None:
        kind = importlib.import_module("litdata").StreamingDataset
        self.data = kind(str(self.folder), shuffle=self.shuffle)
        # By default, each requested number decodes its neighbours, too.
        self.by_number = kind(str(self.folder), batch_decode=False)

    def batch(self, index: Ints) -> Rows:
        return stacked([self.by_number[i] for i in index.tolist()])

    def stream(self) -> Iterator[Rows]:
        waiting = []
        for sample in self.data:
            waiting.append(sample)
            if len(waiting) == BATCH:
                yield stacked(waiting)
                waiting = []


class LitDataOwn(LitData):
    """litdata in its own shuffled order."""

    shuffle = True


PEERS: dict[str, tuple[type[Peer], str]] = {  # and the one whose files it reads
    "bare copies (no store)": (Copies, ""),
    "safetensors, slices": (Safetensors, ""),
    "datasets, arrow by hand": (HuggingFace, ""),
    "datasets, numpy": (HuggingFaceNumpy, "datasets, arrow by hand"),
    "datasets, torch": (HuggingFaceTorch, "datasets, arrow by hand"),
    "parquet (DistillKit)": (Parquet, ""),
    "npz, one a sequence": (Npz, ""),
    "mosaicml-streaming": (Mosaic, ""),
    "litdata": (LitData, ""),
    "litdata, own order": (LitDataOwn, "litdata"),
}
