"""Read and check the descriptions of a teacher, ``teacher.json`` of each of its parts."""

from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError, unusable
from rekindle.data.settings import parse_settings
from rekindle.data.storage.base import Store
from rekindle.data.storage.seal import REPAIR, read_sealed
from rekindle.data.storage.shards import Shard
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.schema import TeacherInfo


def read_teacher(store: Store, name: str, part: str = "") -> TeacherInfo:
    """Return the validated description of a teacher, or of one of its extensions."""
    folder = f"targets/{name}/extensions/{part}" if part else f"targets/{name}"
    path = f"{folder}/teacher.json"
    with unusable(f"{store.location}/{path} is missing", FileNotFoundError, advice=f". {REPAIR}"):
        described = read_sealed(store, path)
    with unusable(store.location, InputError, advice=f". {REPAIR}"):
        info = parse_settings(TeacherInfo, described, path)
    if problem := kind_of(info).contradiction():
        raise CacheFormatError(f"{store.location}/{path} does not describe a teacher: {problem}")
    if (info.name, info.part) != (name, part):
        label = f"{info.name!r}, part {info.part!r}" if info.part or part else repr(info.name)
        raise CacheFormatError(f"{store.location}/{path} describes teacher {label}")
    return info


def has_files(store: Store, name: str) -> bool:
    """Return whether a teacher's folder holds anything; its first writer may have been killed
    early.
    """
    return bool(store.names(f"targets/{name}") or store.names(f"targets/{name}/commits"))


def is_described(store: Store, name: str) -> bool:
    """Return whether the cache has a teacher of that name."""
    return "teacher.json" in store.names(f"targets/{name}")


def check_owner(shard: Shard, info: TeacherInfo) -> TeacherInfo:
    """Return a shard's description of its teacher; raise CacheMismatchError unless it matches
    ``info``.
    """
    stated = parse_settings(TeacherInfo, shard.metadata.get("teacher"), shard.name)
    if stated.identity() != info.identity():
        raise CacheMismatchError(
            f"{shard.name} was made by another teacher than teacher.json describes: "
            "targets were exchanged, or the description was edited"
        )
    return stated


def read_parts(store: Store, name: str) -> list[TeacherInfo]:
    """Return the descriptions of a teacher and its extensions, all of the same teacher."""
    base = read_teacher(store, name)
    folder = f"targets/{name}/extensions"
    names = [p for p in store.folders(folder) if "teacher.json" in store.names(f"{folder}/{p}")]
    extensions = [read_teacher(store, name, part) for part in names]
    for info in extensions:
        if info.identity_of_model() != base.identity_of_model():
            raise CacheMismatchError(
                f"{store.location}/{info.folder} extends another teacher than targets/{name} "
                "describes: targets were exchanged, or the description was edited"
            )
    extended = {info.part for info in [base, *extensions] if kind_of(info).can_grow}
    for info in extensions:
        if info.extends is not None and info.extends not in extended:
            raise CacheFormatError(
                f"{store.location}/{info.folder} extends {info.extends!r}, which is not there"
            )
    return [base, *extensions]
