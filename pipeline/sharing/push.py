"""``pipeline push``: compare a repository with what is to be sent, then send what differs."""

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

from rekindle.data.counted import counted, shown_bytes
from rekindle.data.errors import InputError
from rekindle.data.storage.manifest import MANIFEST
from rekindle.pipeline.progress import SILENT, Progress
from rekindle.pipeline.sharing.contents import Contents, PushRequest, contents_of
from rekindle.pipeline.sharing.hub import Hub, RemoteState, changed_files, split_into_commits
from rekindle.train.embedding.folder import ABOUT_ENCODER, MODULES_FILE, TRANSFORMER_FILES
from rekindle.train.model.folder import ABOUT_FILE, ADAPTER_FILE, ADAPTER_WEIGHTS, CONFIG_FILE

# The folders of a cache: push removes nothing outside them.
_CACHE_FOLDERS = ("corpus/", "views/", "targets/")
_DATA = (".arrow", ".safetensors", ".bin", ".gguf", ".model")
# Files that ``model_files`` sends. One left over from another kind of model would be loaded with
# the new one, or instead of it. Licences are not listed, because people add them on the hub.
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", ADAPTER_WEIGHTS)
_MODEL_PATTERNS = (
    *(*_WEIGHTS, "heads.safetensors", "prompts.safetensors"),
    *(CONFIG_FILE, ADAPTER_FILE, "generation_config.json"),
    *(ABOUT_FILE, "metrics.json", "metrics.jsonl", "summary.json", "export.json", "run.yaml"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    *("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model"),
    *(MODULES_FILE, ABOUT_ENCODER, *TRANSFORMER_FILES),
)
# In the folders of a sentence encoder's modules.
_MODULE_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model")
_MOST_SHOWN = 20  # names of removed files in one line


@dataclass(frozen=True)
class Pushed:
    """What was sent, or would be sent by a dry run."""

    kind: str
    repo: str
    url: str
    address: str
    files: dict[str, int]  # bytes of every file that belongs to it
    sent: list[str]  # those of them that the repository lacked
    removed: list[str]
    made: bool  # whether the repository is new
    private: bool
    dry_run: bool
    told: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        """Return it for --json."""
        return json.dumps(asdict(self))

    def as_text(self) -> str:
        """Return it for people; a dry run lists every file."""
        sent_bytes = sum(self.files[name] for name in self.sent)
        lines = []
        if self.dry_run:
            width = max(map(len, self.files), default=0)
            present = {*self.files} - {*self.sent}
            lines += [
                f"{name:{width}}  {shown_bytes(size)}{'  (is there)' * (name in present)}"
                for name, size in self.files.items()
            ]
            lines.append(
                "files that an earlier push has left there and that no longer belong to it would "
                "be removed, too; a dry run does not ask the hub which these are"
            )
        if self.removed:
            names, more = self.removed[:_MOST_SHOWN], len(self.removed) - _MOST_SHOWN
            lines.append(
                f"removed, because they no longer belong to it: {', '.join(names)}"
                + (f" and {counted(more, 'more file')}" if more > 0 else "")
            )
        done = "would be sent" if self.dry_run else "sent"
        visibility = f" ({'private' if self.private else 'public'}{', new' if self.made else ''})"
        before = len(self.files) - len(self.sent)
        lines.append(
            f"{self.kind} {self.url}{'' if self.dry_run else visibility}: "
            f"{counted(len(self.sent), 'file')}, {shown_bytes(sent_bytes)} {done}, "
            f"{before} were there" + (f", {len(self.removed)} removed" if self.removed else "")
        )
        if not self.dry_run:
            lines.append(f"to use it: {self.address}")
        return "\n".join(lines)


def push(
    request: PushRequest,
    *,
    private: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Pushed:
    """Send the cache or model at ``request.place`` to its repository. A dry run only reports what
    would be sent, and does not ask the hub.

    Raise InputError or CacheError, before anything is sent, for a place that is neither cache nor
    model, not finished or damaged, for a token that the hub does not accept, and for a repository
    that holds something else.
    """
    hubs, states = list[Hub](), [RemoteState()]

    def connect(repo_type: str) -> None:
        if not dry_run:
            hubs.append(Hub(request.repo, repo_type, request.revision))
            hubs[0].check_login()
            states[0] = hubs[0].read_state()
            _check_visibility(hubs[0], states[0], private)

    with contents_of(request, progress, connect) as contents:
        hub, remote = hubs[0] if hubs else None, states[0]
        is_new_branch = remote.exists and not remote.has_branch
        start = remote
        if hub is not None:
            _check_cache(hub, remote, contents)
            hub.create_missing(remote, private)
            if is_new_branch:  # it starts with the files of main
                start = hub.read_state()
        changed = changed_files(contents.files, start)
        obsolete = _obsolete_files(hub, start, contents)
        if hub is not None:
            title = message or f"{contents.kind} by rekindle"
            removed: Collection[str] = obsolete
            if is_new_branch:
                removed = _remove_other_cache(hub, start, changed, obsolete, title)
            _send(hub, contents, changed, removed, title, progress)
        target = hub or _DryRunHub(request, contents)
        return Pushed(
            kind=contents.kind,
            repo=request.repo,
            url=target.url,
            address=target.address,
            files={name: contents.size(name) for name in contents.files},
            sent=changed,
            removed=obsolete,
            made=not remote.exists,
            private=remote.private if remote.exists else private,
            dry_run=dry_run,
            told=contents.messages,
        )


@dataclass(frozen=True)
class _DryRunHub:
    """Stands for the hub in a dry run, which asks none."""

    request: PushRequest
    contents: Contents

    @property
    def url(self) -> str:
        start = "datasets/" if self.contents.repo_type == "dataset" else ""
        return f"{start}{self.request.repo}"

    @property
    def address(self) -> str:
        return f"hf://{self.url}"


def _check_visibility(hub: Hub, remote: RemoteState, private: bool) -> None:
    """Raise InputError if ``private`` is requested, but the repository exists and is public."""
    if remote.exists and private and not remote.private:
        raise InputError(
            f"{hub.url} exists, and everybody can see it; --private is only for a new repository. "
            "Make it private in its settings on the hub, or give another name. Nothing was sent"
        )


def _check_cache(hub: Hub, remote: RemoteState, contents: Contents) -> None:
    """Raise InputError if the repository holds a cache of another text."""
    if contents.kind != "cache" or MANIFEST not in dict(remote.files):
        return
    try:
        manifest = json.loads(hub.read_file(MANIFEST, remote))
        fingerprint = (manifest.get("corpus") or {}).get("fingerprint")
    except (ValueError, AttributeError):
        fingerprint = None
    if fingerprint is not None and fingerprint not in contents.fingerprints:
        raise InputError(
            f"{hub.url} holds a cache of another text. Give another repository, or a branch of it "
            "with --revision. Nothing was sent"
        )


def _obsolete_files(hub: Hub | None, remote: RemoteState, contents: Contents) -> list[str]:
    """Return the files left by an earlier push that no longer belong to it."""
    names = sorted({name for name, _ in remote.files} - {*contents.files})
    if contents.kind == "cache":
        return [name for name in names if name.startswith(_CACHE_FOLDERS)]
    folders = _module_folders(hub, remote)
    return [name for name in names if _is_model_file(name, folders)]


def _is_model_file(name: str, folders: Collection[str]) -> bool:
    """Return whether a push of a model sends such a file; ``folders``: those of its modules."""
    folder, _, last = name.rpartition("/")
    patterns = _MODULE_PATTERNS if folder in folders else () if folder else _MODEL_PATTERNS
    return any(fnmatchcase(last, pattern) for pattern in patterns)


def _module_folders(hub: Hub | None, remote: RemoteState) -> set[str]:
    """Return the module folders of the sentence encoder in the repository, if it is one."""
    if hub is None or MODULES_FILE not in dict(remote.files):
        return set()
    with suppress(ValueError, AttributeError, TypeError):  # not one that push has sent
        modules = json.loads(hub.read_file(MODULES_FILE, remote))
        return {str(module.get("path", "")).strip("/") for module in modules} - {""}
    return set()


def _remove_other_cache(
    hub: Hub, remote: RemoteState, names: Collection[str], removed: Collection[str], title: str
) -> Collection[str]:
    """Remove the other cache that a new branch starts with, before this one is sent; return the
    files that are still to be removed.

    So the same command can go on after an interruption: it no longer finds another cache there.
    """
    if MANIFEST not in names or MANIFEST not in dict(remote.files):
        return removed
    hub.commit({}, {*removed, MANIFEST}, f"{title}: without the cache of the main branch")
    return ()


def _send(
    hub: Hub,
    contents: Contents,
    names: Collection[str],
    removed: Collection[str],
    message: str,
    progress: Progress,
) -> None:
    commits = split_into_commits([*names], contents.size, lambda name: not name.endswith(_DATA))
    if not commits and removed:
        commits = [[]]
    with progress.task("push", unit="files", total=len(names)) as task:
        for number, part in enumerate(commits, start=1):
            is_last = number == len(commits)
            title = message if len(commits) == 1 else f"{message} ({number} of {len(commits)})"
            files = {name: contents.files[name] for name in part}
            hub.commit(files, removed if is_last else (), title)
            task.advance(len(part), bytes=sum(map(contents.size, part)))
