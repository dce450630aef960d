"""Addresses ``hf://``: a repository of a model hub at a revision. Hubs are only read here.

``hf://datasets/OWNER/NAME[@REVISION][/PATH]`` is a data repository, for caches;
``hf://OWNER/NAME[@REVISION][/PATH]`` one of a model. huggingface_hub decides which account and
token are used.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle.data.errors import InputError, first_words

HUB = "hf://"
DATASETS = "datasets"
_ADDRESS = re.compile(
    r"hf://(?P<data>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<path>[^@]*))?"
)
_FORMS = "hf://datasets/OWNER/NAME[@REVISION][/PATH] (caches), or hf://OWNER/NAME[@REVISION][/PATH]"
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.gguf")
OFFLINE = "HF_HUB_OFFLINE is set, so that the hub is not asked"


@dataclass(frozen=True)
class HubPlace:
    """A place in a repository: its kind, owner and name, its revision, and the path in it."""

    kind: str  # dataset or model, as huggingface_hub calls them
    repo: str  # OWNER/NAME
    revision: str | None  # a branch, a tag or a commit; None: the main branch
    path: str

    def at(self, revision: str | None) -> str:
        """Return its address at a revision; None: on the main branch."""
        start = f"{DATASETS}/" if self.kind == "dataset" else ""
        # A branch may have a slash in its name.
        branch = revision or ""
        quoted = branch if branch.startswith("refs/") else branch.replace("/", "%2F")
        suffix = f"@{quoted}" if quoted else ""
        return f"{HUB}{start}{self.repo}{suffix}{f'/{self.path}' if self.path else ''}"


def is_hub(place: object) -> bool:
    """Return whether ``place`` is an address on a hub."""
    return isinstance(place, str) and place.startswith(HUB)


def hub_place(address: str) -> HubPlace:
    """Return the place of an address; raise InputError if it is not that of a repository."""
    match = _ADDRESS.fullmatch(address.rstrip("/"))
    if match is None or match["repo"].startswith((f"{DATASETS}/", "spaces/", "buckets/")):
        raise InputError(f"{address!r} is no place on a hub; give {_FORMS}")
    revision = match["revision"] and match["revision"].replace("%2F", "/").replace("%2f", "/")
    kind = "dataset" if match["data"] else "model"
    return HubPlace(kind, match["repo"], revision, (match["path"] or "").strip("/"))


def refuse_offline(address: str) -> None:
    """Raise InputError if huggingface_hub is set to ask no hub."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{address}: {OFFLINE}. Unset it, or fetch it once where there is a network (`hf "
            "download`) and give that folder"
        )


def pinned(address: str) -> str:
    """Return the address at the commit that its revision is now: all reads see one state.

    Raises InputError if there is no such repository or revision, or it cannot be reached.
    """
    place = hub_place(address)
    refuse_offline(address)
    from huggingface_hub import HfApi

    try:
        info: Any = HfApi().repo_info(place.repo, repo_type=place.kind, revision=place.revision)
    except Exception as error:  # many kinds: of the network, of rights, of names
        raise InputError(f"{address}: {describe_hub_error(error)}") from None
    return place.at(str(info.sha))


def hub_folder(address: str) -> Path:
    """Return the local folder of a model on a hub, in huggingface_hub's cache: downloaded, or,
    without a network, as downloaded before. Raises InputError if there is none.
    """
    from huggingface_hub import snapshot_download

    place = hub_place(address)
    start = f"{place.path}/" if place.path else ""
    try:
        snapshot = snapshot_download(
            place.repo,
            repo_type=place.kind,
            revision=place.revision,
            allow_patterns=[f"{start}{pattern}" for pattern in _MODEL_FILES],
            # A repository may hold more than a model: a run's checkpoints, an expert's seeds.
            ignore_patterns=[f"{start}checkpoints/*", f"{start}seeds/*"],
        )
    except Exception as error:
        raise InputError(f"{address}: {describe_hub_error(error)}") from None
    folder = Path(snapshot) / place.path
    if not folder.is_dir():
        raise InputError(f"{address}: the repository has no folder {place.path!r}")
    return folder


def describe_hub_error(error: BaseException) -> str:
    """Return why a hub, or its client, failed, with the way out; without any token."""
    name = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if name in ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "IncompleteSnapshotError"):
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return f"{OFFLINE}, and nothing of it was downloaded before. Unset it"
    if name == "LocalTokenNotFoundError" or (status == 401 and "RepositoryNotFound" not in name):
        return (
            "the hub does not take the token, or there is none: log in with `hf auth login`, or "
            "set HF_TOKEN to one of your account"
        )
    if name == "GatedRepoError" or status == 403:
        return "the hub refuses it to this account: ask its owner, or take a token that may do it"
    if name == "RevisionNotFoundError":
        return "the repository has no such revision; give a branch, a tag or a commit of it"
    if "RepositoryNotFound" in name or status == 404:
        return (
            "there is no such repository, or it is private and this account may not see it (log in "
            "with `hf auth login`, or set HF_TOKEN)"
        )
    return f"the hub cannot be asked: {without_token(first_words(error) or name)}"


def without_token(text: str) -> str:
    """Return ``text`` without the token used here, and without anything that looks like one."""
    from huggingface_hub import get_token

    token = get_token()
    text = text.replace(token, "***") if token else text
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "***", text)
