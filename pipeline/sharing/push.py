"""``pipeline push``: look at what is there and at what is to be sent, then send what differs."""

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

from rekindle.data.counted import counted, shown_bytes
from rekindle.data.errors import InputError
from rekindle.data.storage.manifest import MANIFEST
from rekindle.pipeline.progress import SILENT, Progress
from rekindle.pipeline.sharing.contents import Asked, Contents, contents_of
from rekindle.pipeline.sharing.hub import Hub, There, batches, differing
from rekindle.train.embedding.folder import ABOUT_ENCODER, MODULES_FILE, TRANSFORMER_FILES
from rekindle.train.model.folder import ABOUT_FILE, ADAPTER_FILE, ADAPTER_WEIGHTS, SETTINGS_FILE

# Folders of a cache; what else is in a repository is its owner's.
_OURS = ("corpus/", "views/", "targets/")
_DATA = (".arrow", ".safetensors", ".bin", ".gguf", ".model")
# Files of a model that ``model_files`` sends. One that is left of another kind of model would be
# loaded with this one, or in its place. A licence, which people add on the hub, is not among them.
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", ADAPTER_WEIGHTS)
_OF_MODELS = (
    *(*_WEIGHTS, "heads.safetensors", "prompts.safetensors"),
    *(SETTINGS_FILE, ADAPTER_FILE, "generation_config.json"),
    *(ABOUT_FILE, "metrics.json", "metrics.jsonl", "summary.json", "export.json", "run.yaml"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    *("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model"),
    *(MODULES_FILE, ABOUT_ENCODER, *TRANSFORMER_FILES),
)
_OF_PARTS = ("*.json", "*.safetensors", "*.txt", "*.model")  # of the parts that it lists
_SHOWN = 20  # names of removed files in a line


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
        """Return it for --json."""
        return json.dumps(asdict(self))

    def as_text(self) -> str:
        """Return it for people: of a dry run every file."""
        sent = sum(self.files[name] for name in self.sent)
        lines = []
        if self.dry_run:
            width = max(map(len, self.files), default=0)
            there = {*self.files} - {*self.sent}
            lines += [
                f"{name:{width}}  {shown_bytes(size)}{'  (is there)' * (name in there)}"
                for name, size in self.files.items()
            ]
            lines.append(
                "what an earlier push has left there, and is no part of it any more, would be "
                "removed, too; which files these are is seen when the hub is asked"
            )
        if self.removed:
            more = len(self.removed) - _SHOWN
            lines.append(
                f"removed, for they are no part of it any more: {', '.join(self.removed[:_SHOWN])}"
                + (f" and {counted(more, 'more file')}" if more > 0 else "")
            )
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
        new_branch = there.exists and not there.branch
        begun = there
        if hub is not None:
            _check_cache(hub, there, found)
            hub.make(there, private)
            if new_branch:  # it begins with what main has
                begun = hub.look()
        names = differing(found.files, begun)
        gone = _gone(hub, begun, found)
        if hub is not None:
            title = message or f"{found.kind} by rekindle"
            left = _clear(hub, begun, names, gone, title) if new_branch else gone
            _send(hub, found, names, left, title, progress)
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


def _gone(hub: Hub | None, there: There, found: Contents) -> list[str]:
    """Return what an earlier push has left there and is no part of it any more."""
    names = sorted({name for name, _ in there.files} - {*found.files})
    if found.kind == "cache":
        return [name for name in names if name.startswith(_OURS)]
    folders = _part_folders(hub, there)
    return [name for name in names if _is_of_model(name, folders)]


def _is_of_model(name: str, folders: Collection[str]) -> bool:
    """Return whether a push of a model sends such a file; ``folders``: those of its parts."""
    folder, _, last = name.rpartition("/")
    patterns = _OF_PARTS if folder in folders else () if folder else _OF_MODELS
    return any(fnmatchcase(last, pattern) for pattern in patterns)


def _part_folders(hub: Hub | None, there: There) -> set[str]:
    """Return the folders of the parts of the sentence encoder that is there, if there is one."""
    if hub is None or MODULES_FILE not in dict(there.files):
        return set()
    with suppress(ValueError, AttributeError, TypeError):  # a file of somebody else's
        listed = json.loads(hub.read(MODULES_FILE, there))
        return {str(one.get("path", "")).strip("/") for one in listed} - {""}
    return set()


def _clear(
    hub: Hub, there: There, names: Collection[str], gone: Collection[str], title: str
) -> Collection[str]:
    """Remove the other cache that a new branch begins with, before any of this one is sent; return
    what is still to be removed.

    If sending is interrupted, the same command goes on: what it finds then is no other cache.
    """
    if MANIFEST not in names or MANIFEST not in dict(there.files):
        return gone
    hub.commit({}, {*gone, MANIFEST}, f"{title}: without the cache of the main branch")
    return ()


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
