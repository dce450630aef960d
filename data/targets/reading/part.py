"""One part of a teacher's targets, its first one or an extension: a set of shards."""

from dataclasses import dataclass

from rekindle.data.storage.base import Store
from rekindle.data.storage.commits import Commits
from rekindle.data.storage.shards import ShardSet
from rekindle.data.targets.schema import TeacherInfo

COMPLETE_FILE = "complete.json"  # in the folder of an extension that was once complete


@dataclass(frozen=True)
class Part:
    """One set of a teacher's shards."""

    info: TeacherInfo
    shards: ShardSet
    commits: Commits
    was_complete: bool  # once: text added later may lack targets

    @classmethod
    def of(cls, store: Store, info: TeacherInfo) -> "Part":
        """Return the part with that description, as it is now."""
        shards = ShardSet(store, info.folder)
        was_complete = bool(info.part) and store.exists(f"{info.folder}/{COMPLETE_FILE}")
        return cls(info, shards, shards.committed(), was_complete)

    def covers(self, other: "Part") -> bool:
        """Return whether it has all units of ``other``, or had them before new text was added."""
        return self.was_complete or self.commits.has_all(other.commits)
