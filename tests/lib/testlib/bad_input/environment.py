"""Places that cannot be written, and machines that lack something."""

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

from testlib.bad_input.row import Bad, Place

MAKE = "cache-teachers run.yaml --set cache.path=new"
TRAIN = "train-student run.yaml --out new"
TUNE = "finetune lm --train train.jsonl --dev dev.jsonl --set epochs=1"
ASK = "evaluate expert --test dev.jsonl"
ANOTHER = "give another place"
FILE = "a file of that name exists where a folder is needed"

OUTPUTS = (
    Bad("--out of a student below a file",
        "train-student run.yaml --out run.yaml/new", "run.yaml/new",
        "is a file", "give another --out"),
    Bad("--out of a student on an existing file",
        "train-student run.yaml --out run.yaml", "run.yaml",
        "is not empty and holds no run", "give another --out"),
    Bad("cache.path below a file", "cache-teachers run.yaml --set cache.path=text.jsonl/new",
        "text.jsonl/new", "a file exists where a folder is needed", ANOTHER),
    Bad("--out of predictions below a file",
        "predict expert --text text.jsonl --out run.yaml/new.jsonl",
        "run.yaml", FILE, ANOTHER),
    Bad("--out of an export below a file",
        "export student --out run.yaml/new", "run.yaml", FILE, ANOTHER),
    Bad("--out of a run file below a file",
        "init uegp --out run.yaml/new.yaml", "run.yaml", FILE, ANOTHER),
    Bad("--out of an existing run file", "init uegp --out run.yaml", "run.yaml",
        "exists and is left as it is", "give another --out"),
    Bad("--out of a page on an existing folder", "compare student --out tokens", "tokens",
        "a folder exists where a file is needed", "give the path of a file"),
    Bad("--out of existing predictions",
        "predict expert --text text.jsonl --out dev.jsonl", "'dev.jsonl'",
        "already exists", "--force"),
    Bad("--out of predictions on an existing folder",
        "predict expert --text text.jsonl --out lm", "'lm'",
        "is a folder", "give the path of a file"),
    Bad("--out of an expert on a student's folder", f"{TUNE} --out student", "'student'",
        "is not a result of this command", "give another directory"),
    Bad("--out of an export on a model's folder", "export student --out lm", "'lm'",
        "exists and is not an export", "give another --out"),
    Bad("--out of the demo on an existing file", "demo --quick --out run.yaml", "run.yaml",
        "is not empty and holds no demo", "give another --out"),
    Bad("a symbolic link that points to itself", "inspect loop", "loop/cache.json",
        "Too many levels of symbolic links", "give the place itself",
        lambda place: (place / "loop").symlink_to("loop")),
    Bad("a name that is too long", f"init uegp --out {'x' * 300}", "xxxx", "File name too long",
        "give a shorter name"),
)  # fmt: skip


def _full(place: Place) -> None:
    """Simulate a full disk: the error comes when data is flushed."""

    plain = os.fsync

    def fail(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(place.root):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(descriptor)

    place.patch.setattr(os, "fsync", fail)


def _no_folders(number: int):
    def spoil(place: Place) -> None:
        plain = Path.mkdir

        def fail(self, *rest, **named):
            if self.name.lstrip(".").startswith("new"):
                raise OSError(number, os.strerror(number), str(self))
            return plain(self, *rest, **named)

        place.patch.setattr(Path, "mkdir", fail)

    return spoil


def _without(package: str):
    def spoil(place: Place) -> None:
        import importlib.util
        import sys

        plain = importlib.util.find_spec

        def find(name: str, *rest: object):
            return None if name.partition(".")[0] == package else plain(name, *rest)

        place.patch.setattr(importlib.util, "find_spec", find)
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            place.patch.setitem(sys.modules, module, None)
        place.patch.setitem(sys.modules, package, None)

    return spoil


def _held(place: Place) -> None:
    """A folder that another process has locked."""
    (place / "new").mkdir()
    place.write("new/.lock", "process 1 on another")
    held = os.open(place / "new/.lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)  # held until the descriptor is closed, at the end


def _variables(**values: str):
    return lambda place: [place.patch.setenv(name, value) for name, value in values.items()]


NO_ROOM = "No space left on device"
DISKS = (
    Bad("no disk space for a run file", "init uegp --out new.yaml", "new.yaml", NO_ROOM,
        "make room on that disk", _full),
    Bad("no disk space for predictions",
        "predict expert --text text.jsonl --out new.jsonl", "new.jsonl",
        NO_ROOM, "make room on that disk", _full),
    Bad("no disk space for an export", "export student --out new", "new", NO_ROOM,
        "make room on that disk", _full),
    Bad("no disk space for an expert",
        f"{TUNE} --out new", "new", NO_ROOM, "make room on that disk",
        _full, kept=".new.seeds"),
    Bad("no disk space for a cache", MAKE, "new", NO_ROOM, "make room", _full,
        kept="new"),
    Bad("no disk space for a student", TRAIN, "new", NO_ROOM, "make room on that disk", _full,
        kept="new"),
    Bad("no disk space for a page", "compare student --out new.html", "new.html", NO_ROOM,
        "make room on that disk", _full),
)  # fmt: skip


def _little_memory(place: Place) -> None:
    place.patch.setattr("rekindle.pipeline.checks.machine.free_memory", lambda device: 1000)


def _little_room(place: Place) -> None:
    place.patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))


AHEAD = (
    Bad("a disk too small for a new cache", "doctor run.yaml --set cache.path=new",
        "disk: ", "10 bytes are free", "choose another cache.path", _little_room),
    Bad("a teacher larger than the memory", "doctor run.yaml", "memory, lm: ",
        "It does not fit", "device_map: auto", _little_memory),
)  # fmt: skip

MACHINES = (
    Bad("WORLD_SIZE without torchrun", TRAIN, "WORLD_SIZE=2",
        "this process was not started by torchrun", "`unset WORLD_SIZE`",
        _variables(WORLD_SIZE="2")),
    Bad("an --out that another process uses", TRAIN, "process 1 on another",
        "another process works on new", "wait for it, or give another --out", _held),
    Bad("Ray is not installed", f"{MAKE} --executor ray", "ray", "is not installed",
        "pip install", _without("ray")),
    Bad("peft is not installed", f"{TRAIN} --set student.lora.r=4", "peft",
        "is not installed", "pip install", _without("peft")),
    Bad("a store whose package is missing", "inspect s3://bucket/cache", "'s3://bucket/cache'",
        "Install s3fs", "pip install", _without("s3fs")),
    Bad("--out of a student on a read-only disk", TRAIN, "new", "Read-only file system",
        "give a place that can be written", _no_folders(errno.EROFS)),
    Bad("--out of an expert without permission to write",
        f"{TUNE} --out new", "new", "Permission denied",
        "change its permissions", _no_folders(errno.EACCES)),
)  # fmt: skip

ROWS = OUTPUTS + DISKS + AHEAD + MACHINES
