"""Send files to a hub through huggingface_hub: check the login, list what is there, commit.

The token is huggingface_hub's business (HF_TOKEN, or its own login): it is never read into anything
that is kept here, and no message repeats it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

from rekindle.data.errors import InputError
from rekindle.data.hub.places import OFFLINE, HubPlace, describe_hub_error

# Limits of one commit: hubs handle a few hundred files at a time well, and if a commit fails, what
# was uploaded for it is lost.
MOST_FILES, MOST_BYTES = 200, 8 << 30


@dataclass(frozen=True)
class There:
    """Hold a repository as it is: whether it exists, is private, has the branch, what is in it."""

    exists: bool = False
    private: bool = False
    branch: bool = False
    head: str | None = None  # the commit of the branch
    files: tuple[tuple[str, str], ...] = ()  # (name, "sha256:…" or "git:…" of its content)


class Hub:
    """Ask and change a repository, ``repo`` = OWNER/NAME, of that type; ``revision``: a branch."""

    def __init__(self, repo: str, repo_type: str, revision: str | None):
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{OFFLINE}: nothing can be sent. Unset it")
        self.repo, self.repo_type = repo, repo_type
        self.revision = revision or constants.DEFAULT_REVISION
        self._api: HfApi = HfApi(library_name="rekindle", library_version=version("rekindle-kd"))

    @property
    def url(self) -> str:
        """Return where people look at it."""
        start = "datasets/" if self.repo_type == "dataset" else ""
        return f"{self._api.endpoint}/{start}{self.repo}"

    @property
    def address(self) -> str:
        """Return what Rekindle reads it by."""
        branch = None if self.revision == "main" else self.revision
        return HubPlace(self.repo_type, self.repo, branch, "").at(branch)

    def check_login(self) -> str:
        """Return the account's name; raise InputError if there is no token that the hub takes."""
        with self._asking("your account"):
            return str(self._api.whoami()["name"])

    def look(self) -> There:
        """Return the repository as it is now."""
        about: dict[str, Any] = {"repo_type": self.repo_type}
        with self._asking(self.repo):
            try:
                found: Any = self._api.repo_info(self.repo, **about)
            except Exception as error:
                if "RepositoryNotFound" not in type(error).__name__:
                    raise
                return There()
            private = bool(found.private)
            refs = self._api.list_repo_refs(self.repo, **about)
            head = {ref.name: ref.target_commit for ref in refs.branches}.get(self.revision)
            if head is None:
                return There(True, private)
            tree = self._api.list_repo_tree(self.repo, recursive=True, revision=head, **about)
            files = tuple((one.path, _state_of(one)) for one in tree if hasattr(one, "size"))
        return There(True, private, True, head, files)

    def read(self, name: str, there: There) -> bytes:
        """Return the content of a small file that is there."""
        with self._asking(f"{self.repo}/{name}"):
            found = self._api.hf_hub_download(
                self.repo, name, repo_type=self.repo_type, revision=there.head
            )
            return Path(found).read_bytes()

    def make(self, there: There, private: bool) -> None:
        """Make the repository and the branch, as far as they are not there. A new branch begins as
        the main one: with its files.
        """
        about: dict[str, Any] = {"repo_type": self.repo_type}
        with self._asking(self.repo):
            if not there.exists:
                self._api.create_repo(self.repo, private=private, exist_ok=True, **about)
            if not there.branch and self.revision != "main":
                self._api.create_branch(self.repo, branch=self.revision, exist_ok=True, **about)

    def commit(
        self, files: Mapping[str, Path | bytes], gone: Collection[str], message: str
    ) -> None:
        """Send some files, and remove those that are ``gone``, in one commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [
            CommitOperationAdd(name, one if isinstance(one, bytes) else str(one))
            for name, one in files.items()
        ]
        operations += [CommitOperationDelete(name) for name in sorted(gone)]
        with self._asking(self.repo):
            self._api.create_commit(
                self.repo,
                operations,
                commit_message=message,
                repo_type=self.repo_type,
                revision=self.revision,
            )

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turn an error of the hub into one message, without the token; hide its progress bars."""
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        shown = not are_progress_bars_disabled()
        if shown:
            disable_progress_bars()
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # of the network, of rights, of what was sent: no common base
            raise InputError(
                f"{what}: {describe_hub_error(error)}. What was sent before this stays: run the "
                "same command again, and it goes on"
            ) from None
        finally:
            if shown:
                enable_progress_bars()


def _state_of(entry: Any) -> str:
    """Return what tells the content of a file that is there."""
    lfs = getattr(entry, "lfs", None)
    return f"sha256:{lfs.sha256}" if lfs is not None else f"git:{entry.blob_id}"


def differing(files: Mapping[str, Path | bytes], there: There) -> list[str]:
    """Return the names of the files that the hub lacks, or has with other content, in order."""
    known = dict(there.files)
    return [name for name, one in files.items() if not _is_same(one, known.get(name, ""))]


def _is_same(one: Path | bytes, state: str) -> bool:
    """Return whether the content is that of a file on the hub, as ``_state_of`` tells it."""
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    kind, _, told = state.partition(":")
    if kind == "git":  # small: large files are told by sha256
        return git_hash(one if isinstance(one, bytes) else one.read_bytes()) == told
    if kind != "sha256":
        return False
    with BytesIO(one) if isinstance(one, bytes) else one.open("rb") as file:
        return sha_fileobj(file).hex() == told


def batches(
    names: Sequence[str], size: Callable[[str], int], is_last: Callable[[str], bool]
) -> list[list[str]]:
    """Split the files into commits of bounded number and bytes. Small files that say what there is
    all go into the last commit, because only they make the rest valid.
    """
    found: list[list[str]] = [[]]
    taken = 0
    for name in (one for one in names if not is_last(one)):
        if found[-1] and (len(found[-1]) >= MOST_FILES or taken + size(name) > MOST_BYTES):
            found.append([])
            taken = 0
        found[-1].append(name)
        taken += size(name)
    last = [name for name in names if is_last(name)]
    if len(found[-1]) + len(last) > 2 * MOST_FILES:
        found.append([])
    found[-1] += last
    return [one for one in found if one]
