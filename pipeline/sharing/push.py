"""``pipeline push``: look at what is there and at what is to be sent, then send what differs."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field

from rekindle.data.counted import counted, shown_bytes
from rekindle.data.errors import InputError
from rekindle.data.storage.manifest import MANIFEST
from rekindle.pipeline.progress import SILENT, Progress
from rekindle.pipeline.sharing.contents import Asked, Contents, contents_of
from rekindle.pipeline.sharing.hub import Hub, There, batches, differing

# Folders of a cache; what else is in a repository is its owner's.
_OURS = ("corpus/", "views/", "targets/")
_DATA = (".arrow", ".safetensors", ".bin", ".gguf", ".model")


@dataclass(frozen=True)
class Pushed:
    """What was sent, or, of a dry run, would be."""

    kind: str
    repo: str
    url: str
    address: str
    files: dict[str, int]  # all that belongs to it, with bytes
    sent: list[str]  # of those, what was not there
    removed: list[str]
    made: bool  # whether the repository is new
    private: bool
    dry_run: bool
    told: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        """For --json."""
        return json.dumps(asdict(self))

    def as_text(self) -> str:
        """For people: of a dry run every file."""
        sent = sum(self.files[name] for name in self.sent)
        lines = []
        if self.dry_run:
            width = max(map(len, self.files), default=0)
            there = {*self.files} - {*self.sent}
            lines += [
                f"{name:{width}}  {shown_bytes(size)}{'  (is there)' * (name in there)}"
                for name, size in self.files.items()
            ]
            lines += [f"{name}  is removed" for name in self.removed]
        done = "would be sent" if self.dry_run else "sent"
        new = f" ({'private' if self.private else 'public'}{', new' if self.made else ''})"
        before = len(self.files) - len(self.sent)
        lines.append(
            f"{self.kind} {self.url}{'' if self.dry_run else new}: "
            f"{counted(len(self.sent), 'file')}, {shown_bytes(sent)} {done}, {before} were there"
            + (f", {len(self.removed)} removed" if self.removed else "")
        )
        if not self.dry_run:
            lines.append(f"to use it: {self.address}")
        return "\n".join(lines)


def push(
    asked: Asked,
    *,
    private: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Pushed:
    """Send what is at ``asked.place`` to its repository; of a dry run only say what that would be,
    without a question to the hub.

    Raises InputError and CacheError, before anything is sent, for what is no cache and no model,
    not finished or damaged, for a token that the hub does not take, a repository that holds
    something else.
    """
    hubs: list[Hub] = []
    seen = [There()]

    def ready(repo_type: str) -> None:
        if not dry_run:
            hubs.append(Hub(asked.repo, repo_type, asked.revision))
            hubs[0].check_login()
            seen[0] = hubs[0].look()
            _check_visibility(hubs[0], seen[0], private)

    with contents_of(asked, progress, ready) as found:
        hub, there = hubs[0] if hubs else None, seen[0]
        if hub is not None:
            _check_cache(hub, there, found)
        names = differing(found.files, there)
        gone = _gone(there, found)
        if hub is not None:
            hub.make(there, private)
            _send(hub, found, names, gone, message or f"{found.kind} by rekindle", progress)
        shown = _Shown(asked, found) if hub is None else hub
        return Pushed(
            kind=found.kind,
            repo=asked.repo,
            url=shown.url,
            address=shown.address,
            files={name: found.size(name) for name in found.files},
            sent=names,
            removed=gone,
            made=not there.exists,
            private=there.private if there.exists else private,
            dry_run=dry_run,
            told=found.told,
        )


@dataclass(frozen=True)
class _Shown:
    """What stands for a hub that is not asked."""

    asked: Asked
    found: Contents

    @property
    def url(self) -> str:
        start = "datasets/" if self.found.repo_type == "dataset" else ""
        return f"{start}{self.asked.repo}"

    @property
    def address(self) -> str:
        return f"hf://{self.url}"


def _check_visibility(hub: Hub, there: There, private: bool) -> None:
    """Raise InputError where a private repository is asked for, and there is a public one."""
    if there.exists and private and not there.private:
        raise InputError(
            f"{hub.url} is there, and everybody can see it; --private is of one that is made. Make "
            "it private in its settings on the hub, or give another name. Nothing was sent"
        )


def _check_cache(hub: Hub, there: There, found: Contents) -> None:
    """Raise InputError where a cache is sent to where there is one of another text."""
    if found.kind != "cache" or MANIFEST not in dict(there.files):
        return
    try:
        body = json.loads(hub.read(MANIFEST, there))
        stated = (body.get("corpus") or {}).get("fingerprint")
    except (ValueError, AttributeError):
        stated = None
    if stated is not None and stated not in found.fingerprints:
        raise InputError(
            f"{hub.url} holds a cache of another text. Give another repository, or a branch of it "
            "with --revision. Nothing was sent"
        )


def _gone(there: There, found: Contents) -> list[str]:
    """What an earlier push has left there and is no part of it any more."""
    names = [name for name, _ in there.files if name not in found.files]
    if found.kind == "cache":
        return [name for name in names if name.startswith(_OURS)]
    # Weights in other files than before: transformers would load the older ones.
    return [n for n in names if "/" not in n and n.startswith("model") and n.endswith(_WEIGHTS)]


_WEIGHTS = (".safetensors", ".safetensors.index.json")


def _send(
    hub: Hub,
    found: Contents,
    names: Collection[str],
    gone: Collection[str],
    message: str,
    progress: Progress,
) -> None:
    parts = batches([*names], found.size, lambda name: not name.endswith(_DATA))
    if not parts and gone:
        parts = [[]]
    with progress.task("push", unit="files", total=len(names)) as task:
        for number, part in enumerate(parts):
            told = message if len(parts) == 1 else f"{message} ({number + 1} of {len(parts)})"
            last = number == len(parts) - 1
            hub.commit({name: found.files[name] for name in part}, gone if last else (), told)
            task.advance(len(part), bytes=sum(map(found.size, part)))
