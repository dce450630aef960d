"""Send files to a hub through huggingface_hub: check the login, list the repository, commit.

huggingface_hub finds the token (HF_TOKEN, or its own login). Rekindle never stores it, and no
message repeats it.
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
class RemoteState:
    """The state of a repository on the hub, and of the files in the branch."""

    exists: bool = False
    private: bool = False
    has_branch: bool = False
    head: str | None = None  # the commit of the branch
    files: tuple[tuple[str, str], ...] = ()  # (name, "sha256:…" or "git:…" of its content)


class Hub:
    """Read and change one branch of a repository on a hub.

    ``repo``: OWNER/NAME; ``repo_type``: dataset or model; ``revision``: the branch.
    """

    def __init__(self, repo: str, repo_type: str, revision: str | None):
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{OFFLINE}: nothing can be sent. Unset it")
        self.repo, self.repo_type = repo, repo_type
        self.revision = revision or constants.DEFAULT_REVISION
        self._api: HfApi = HfApi(library_name="rekindle", library_version=version("rekindle-kd"))

    @property
    def url(self) -> str:
        """Return the address of the repository's page."""
        start = "datasets/" if self.repo_type == "dataset" else ""
        return f"{self._api.endpoint}/{start}{self.repo}"

    @property
    def address(self) -> str:
        """Return the hf:// address that Rekindle reads."""
        branch = None if self.revision == "main" else self.revision
        return HubPlace(self.repo_type, self.repo, branch, "").at(branch)

    def check_login(self) -> str:
        """Return the account's name; raise InputError if there is no token that the hub accepts."""
        with self._errors_about("your account"):
            return str(self._api.whoami()["name"])

    def read_state(self) -> RemoteState:
        """Return the repository as it is now."""
        about: dict[str, Any] = {"repo_type": self.repo_type}
        with self._errors_about(self.repo):
            try:
                info: Any = self._api.repo_info(self.repo, **about)
            except Exception as error:
                if "RepositoryNotFound" not in type(error).__name__:
                    raise
                return RemoteState()
            private = bool(info.private)
            refs = self._api.list_repo_refs(self.repo, **about)
            head = {ref.name: ref.target_commit for ref in refs.branches}.get(self.revision)
            if head is None:
                return RemoteState(True, private)
            tree = self._api.list_repo_tree(self.repo, recursive=True, revision=head, **about)
            files = tuple((one.path, _content_id(one)) for one in tree if hasattr(one, "size"))
        return RemoteState(True, private, True, head, files)

    def read_file(self, name: str, remote: RemoteState) -> bytes:
        """Return the content of a small file in the repository."""
        with self._errors_about(f"{self.repo}/{name}"):
            path = self._api.hf_hub_download(
                self.repo, name, repo_type=self.repo_type, revision=remote.head
            )
            return Path(path).read_bytes()

    def create_missing(self, remote: RemoteState, private: bool) -> None:
        """Create the repository and the branch where they are missing. A new branch starts with the
        files of the main branch.
        """
        about: dict[str, Any] = {"repo_type": self.repo_type}
        with self._errors_about(self.repo):
            if not remote.exists:
                self._api.create_repo(self.repo, private=private, exist_ok=True, **about)
            if not remote.has_branch and self.revision != "main":
                self._api.create_branch(self.repo, branch=self.revision, exist_ok=True, **about)

    def commit(
        self, files: Mapping[str, Path | bytes], removed: Collection[str], message: str
    ) -> None:
        """Send ``files`` and delete the files named in ``removed``, in one commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        operations += [CommitOperationDelete(name) for name in sorted(removed)]
        with self._errors_about(self.repo):
            self._api.create_commit(
                self.repo,
                operations,
                commit_message=message,
                repo_type=self.repo_type,
                revision=self.revision,
            )

    @contextmanager
    def _errors_about(self, subject: str) -> Iterator[None]:
        """Turn an error of the hub into one message without the token; hide the client's progress
        bars.
        """
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        had_progress_bars = not are_progress_bars_disabled()
        if had_progress_bars:
            disable_progress_bars()
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # errors of network, access and content share no base class
            raise InputError(
                f"{subject}: {describe_hub_error(error)}. What was already sent stays there: run "
                "the same command again, and it goes on"
            ) from None
        finally:
            if had_progress_bars:
                enable_progress_bars()


def _content_id(entry: Any) -> str:
    """Return the hash by which the hub knows the content of a file."""
    lfs = getattr(entry, "lfs", None)
    return f"sha256:{lfs.sha256}" if lfs is not None else f"git:{entry.blob_id}"


def changed_files(files: Mapping[str, Path | bytes], remote: RemoteState) -> list[str]:
    """Return the names of the files that the hub lacks or has with other content, in order."""
    ids = dict(remote.files)
    return [name for name, file in files.items() if not _has_content_id(file, ids.get(name, ""))]


def _has_content_id(content: Path | bytes, content_id: str) -> bool:
    """Return whether the content has this ``_content_id``."""
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    algorithm, _, digest = content_id.partition(":")
    if algorithm == "git":  # a small file; the hub hashes large ones with sha256
        return git_hash(content if isinstance(content, bytes) else content.read_bytes()) == digest
    if algorithm != "sha256":
        return False
    with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        return sha_fileobj(file).hex() == digest


def split_into_commits(
    names: Sequence[str], size: Callable[[str], int], is_last: Callable[[str], bool]
) -> list[list[str]]:
    """Split the files into commits of a limited number of files and bytes.

    The files for which ``is_last`` is true, small ones that describe the others, all go into the
    last commit, so that nothing counts before all of it is there.
    """
    commits: list[list[str]] = [[]]
    commit_bytes = 0
    for name in (one for one in names if not is_last(one)):
        is_full = len(commits[-1]) >= MOST_FILES or commit_bytes + size(name) > MOST_BYTES
        if commits[-1] and is_full:
            commits.append([])
            commit_bytes = 0
        commits[-1].append(name)
        commit_bytes += size(name)
    last = [name for name in names if is_last(name)]
    if len(commits[-1]) + len(last) > 2 * MOST_FILES:
        commits.append([])
    commits[-1] += last
    return [names for names in commits if names]
