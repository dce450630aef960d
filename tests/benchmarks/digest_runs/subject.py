"""Runs commands inside the commit under test and writes the digests of the results.

    PYTHONPATH=CHECKOUT/.ns python subject.py CHECKOUT STEPS.json DIGESTS.json

The current folder is the work folder. Of Rekindle, only the public paths are imported:
``rekindle.pipeline.cli`` (run as a module), ``rekindle.data.cache``, ``rekindle.kernels.losses``
and ``rekindle.train.student``. Every command runs in a fork of this process, which has imported
torch and transformers but nothing of Rekindle, so a command costs only its own seconds.
"""

import hashlib
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa

OF_CACHES = (
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.auto.modeling_auto",
    "typer",
    "pydantic",
    "rich.progress",
)
OF_STUDENTS = (
    "torch.utils.tensorboard",
    "torch.distributed",
    "torch.nn.parallel",
    "sklearn.metrics",
    "scipy.stats",
    "datasets",
)
FOLDERS = ("pipeline", "train", "kernels", "data")
# Keys of JSON files, besides all that name seconds, that are left out: waiting; a file's checksum
# over such keys; in a checkpoint's list of checksums, a file that holds such keys.
VOLATILE = {"data_wait", "record", "rekindle_student.json"}
LONGEST_WAIT = 300  # seconds for one command


def fail(message: str) -> NoReturn:
    """End with a message that ``digests.py`` shows."""
    sys.exit(f"digests: {message}")


# --- whose code runs ------------------------------------------------------------------------------


def leave_only(checkout: Path) -> None:
    """Make the packages of ``checkout`` the only ones: an editable install would otherwise serve
    modules that this commit lacks.
    """
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if "__editable___rekindle" not in getattr(finder, "__module__", type(finder).__module__)
    ]
    sys.path[:] = [entry for entry in sys.path if "__editable__.rekindle" not in entry]
    for name in FOLDERS:
        try:
            package = importlib.import_module(f"rekindle.{name}")
        except ImportError as error:
            fail(f"{checkout} gives no rekindle.{name} ({error}); is its .ns on PYTHONPATH?")
        where = [str(Path(entry).resolve()) for entry in package.__path__]
        if where != [str(checkout / name)]:
            fail(f"rekindle.{name} would be taken from {where}, not from {checkout}")
        del sys.modules[f"rekindle.{name}"]
    del sys.modules["rekindle"]


def check_modules(checkout: Path) -> None:
    """Fail unless every imported module of Rekindle lies in ``checkout``."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) if name.startswith("rekindle.") else None
        if file and not Path(file).resolve().is_relative_to(checkout):
            fail(f"{name} was imported from {file}, not from {checkout}")


# --- commands -------------------------------------------------------------------------------------


def command(arguments: list[str], log: Path, checkout: Path, environment: dict[str, str]) -> int:
    """Start ``python -m rekindle.pipeline.cli ARGUMENTS`` in a fork; return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code: object = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        sys.argv = ["pipeline", *arguments]
        runpy.run_module("rekindle.pipeline.cli", run_name="__main__", alter_sys=True)
        check_modules(checkout)
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def world(processes: int) -> list[dict[str, str]]:
    """Return the environment of each process, as torchrun gives it."""
    if processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def wait(child: int, ready: Callable[[], bool] | None, deadline: float) -> int:
    """Wait for a child's exit code; kill it as soon as ``ready``. The code is then −9."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline or (ready is not None and ready()):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def run_step(step: dict, log: Path, checkout: Path) -> None:
    """Run one command to its end, or until it is to be killed; fail if it ends differently."""
    before = time.monotonic()
    stop, lines = step.get("stop"), step.get("lines", 0)
    ready = (lambda: _lines(Path(stop)) >= lines) if stop else None
    world_ = world(step.get("processes", 1))
    children = [command(step["arguments"], log, checkout, about) for about in world_]
    codes = [wait(child, ready, before + LONGEST_WAIT) for child in children]
    if any(code != (-signal.SIGKILL if stop else 0) for code in codes):
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        fail(f"pipeline {' '.join(step['arguments'])} ended with {codes}:\n{last}")
    print(f"{time.monotonic() - before:6.1f} s  pipeline {' '.join(step['arguments'])}", flush=True)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- digests --------------------------------------------------------------------------------------


def digest(parts: Iterable[object]) -> str:
    """Return the first 128 bits of the sha256 of bytes, arrays, plain values and dataclasses of
    them.
    """
    found = hashlib.sha256()
    for part in parts:
        _feed(found, part)
    return found.hexdigest()[:32]


def _feed(found: "hashlib._Hash", part: object) -> None:
    if isinstance(part, bytes | memoryview):
        found.update(part)
    elif isinstance(part, np.ndarray):
        found.update(f"{part.dtype}{part.shape}".encode())
        found.update(np.ascontiguousarray(part).tobytes())
    elif isinstance(part, dict):
        for key in sorted(part, key=str):
            _feed(found, [str(key), part[key]])
    elif isinstance(part, list | tuple):
        found.update(f"{len(part)}".encode())
        for item in part:
            _feed(found, item)
    elif is_dataclass(part):
        _feed(found, {field.name: getattr(part, field.name) for field in fields(part)})
    else:
        found.update(repr(part).encode())


def settled(value: object) -> object:
    """Return a JSON value without what differs between two equal runs."""
    if isinstance(value, dict):
        return {
            key: settled(item)
            for key, item in value.items()
            if key not in VOLATILE and "second" not in key
        }
    return [settled(item) for item in value] if isinstance(value, list) else value


def json_digest(path: Path) -> str:
    """Return the digest of a JSON document, or of JSON lines."""
    lines = path.read_text(encoding="utf-8")
    values = map(json.loads, lines.splitlines() if path.suffix == ".jsonl" else [lines])
    return digest(json.dumps(settled(value), sort_keys=True).encode() for value in values)


def columns_digest(path: Path) -> str:
    """Return the digest of an Arrow file's fields and values, whatever its metadata and record
    batches.
    """
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    plain = table.replace_schema_metadata(None).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, plain.schema) as writer:
        writer.write_table(plain)
    return digest([memoryview(sink.getvalue())])


def cache_digests(name: str) -> dict[str, str]:
    """Return the digests of each unit's file and columns, of each other file, and of the decoded
    values.
    """
    root = Path("caches") / name
    found, data = {}, set()
    for path in sorted(root.rglob("*.json")):
        key = f"cache {name}/{path.relative_to(root).with_suffix('')}"
        if path.parent.name == "commits":
            record = json.loads(path.read_text())
            file = path.parent.parent / record.pop("path")  # its name is random
            data.add(file)
            found[f"{key} file"] = digest([file.read_bytes()])
            found[f"{key} columns"] = columns_digest(file)
            body = settled(record)
            found[f"{key} record"] = digest([json.dumps(body, sort_keys=True).encode()])
        else:
            found[f"{key}.json"] = json_digest(path)
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix != ".json" and path not in data:
            key = f"cache {name}/{path.relative_to(root)}"
            found[key] = digest([path.read_bytes()])
    return found | decoded_digests(name)


def decoded_digests(name: str) -> dict[str, str]:
    """Return the digests of what ``Cache`` gives: sequences, every teacher's targets, the order of
    an epoch.
    """
    from rekindle.data.cache import Cache

    cache = Cache.open(f"caches/{name}")
    examples = [cache.example(index) for index in range(len(cache))]
    found = {
        f"cache {name} sequences": digest([e.digest, e.text, e.input_ids] for e in examples),
        f"cache {name} order": digest(
            [batch.index, batch.input_ids] for batch in cache.batches([], 4, seed=1, epoch=2)
        ),
    }
    for teacher in cache.teachers:
        targets = [e.targets.get(teacher) for e in examples]
        found[f"cache {name} decoded {teacher}"] = digest(targets)
    return found


def tensors_digest(path: Path) -> str:
    """Return the digest of the tensors of a safetensors file, by name."""
    from safetensors.numpy import load_file

    return digest([load_file(path)])


def student_digests() -> dict[str, str]:
    """Return the digests of all weights, metrics and JSON files below ``students``, checkpoints
    included.
    """
    found = {}
    for path in sorted(Path("students").rglob("*")):
        if path.suffix == ".safetensors":
            found[str(path)] = tensors_digest(path)
        elif path.suffix in (".json", ".jsonl", ".yaml"):
            found[str(path)] = (
                json_digest(path) if path.suffix != ".yaml" else digest([path.read_bytes()])
            )
        if path.name == "rekindle_student.json" and "checkpoints" not in path.parts:
            found[f"{path.parent} reloaded"] = reloaded_digest(path.parent)
    return found


def reloaded_digest(folder: Path) -> str:
    """Return the digest of a student that the public ``Student`` has loaded and saved again."""
    from rekindle.train.student import Student

    with tempfile.TemporaryDirectory() as temporary:
        Student.from_pretrained(folder).save_pretrained(temporary)
        return digest(tensors_digest(path) for path in sorted(Path(temporary).glob("*.safe*")))


def loss_digests() -> dict[str, str]:
    """Return the digests of the losses and gradients of ``rekindle.kernels.losses`` on
    drawn rows.
    """
    import torch

    from rekindle.kernels.losses import kd_loss, linear_kd_loss, merge_targets

    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16), torch.randn(50, 16)
    bias, labels = torch.randn(50), torch.randint(0, 50, (7,))
    ids = torch.stack([torch.randperm(50)[:5] for _ in range(7)])
    ids[2, 3:] = -1
    probs = torch.rand(7, 5) / 6
    found = {}
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        for tail in ("bucket", "renormalise", "none"):
            settings = {"divergence": divergence, "tail": tail, "temperature": 2.0}
            settings |= {"labels": labels, "ce_weight": 0.5}
            leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
            loss = linear_kd_loss(*leaves[:2], ids, probs, bias=leaves[2], **settings)
            loss.loss.backward()
            logits = (hidden @ weight.T + bias).requires_grad_()
            whole = kd_loss(logits, ids, probs, reduction="sum", **settings)
            whole.loss.backward()
            tensors = [*loss, *whole, logits.grad, *(leaf.grad for leaf in leaves)]
            arrays = [tensor.detach().numpy() for tensor in tensors]
            found[f"losses {divergence} {tail}"] = digest(arrays)
    merged = merge_targets([(ids, probs, None), (ids.flip(0), probs, None)], [0.3, 0.7])
    return found | {"losses merge_targets": digest([tensor.numpy() for tensor in merged])}


def every_digest() -> dict[str, str]:
    """Return the digests of everything in the work folder, and of the losses."""
    found = loss_digests()
    for cache in sorted(Path("caches").iterdir()):
        found |= cache_digests(cache.name)
    found |= student_digests()
    prompts = Path("prompts.jsonl")
    return found | ({prompts.name: json_digest(prompts)} if prompts.exists() else {})


def main(checkout: Path, steps: Path, result: Path) -> None:
    leave_only(checkout)
    before = time.monotonic()
    wanted = json.loads(steps.read_text())
    trains = any(step["arguments"][0] != "cache-teachers" for step in wanted)
    for name in (*OF_CACHES, *(OF_STUDENTS if trains else ())):
        importlib.import_module(name)
    print(f"{time.monotonic() - before:6.1f} s  libraries", flush=True)
    for number, step in enumerate(wanted):
        run_step(step, Path("logs") / f"{number:02}.log", checkout)
    before = time.monotonic()
    found = every_digest()
    check_modules(checkout)
    print(f"{time.monotonic() - before:6.1f} s  digests", flush=True)
    result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), Path(sys.argv[3]))
