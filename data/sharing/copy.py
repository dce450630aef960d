"""A copy of a cache for others: the same rows, and nothing of this machine.

Shards and descriptions record where models and text files were; in the copy these are the last
parts of the paths. A shard with such a record is written anew with the same rows; others are the
same files. Nothing depends on the time: making a copy again gives the same bytes.

Without the text, what reveals it is left out: the shards of corpus and views, and the targets of
teachers that are not named. Their records stay (of the corpus), or can be made again (of views).
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.stored_tokenizer import TOKENIZER, TOKENIZER_FILES
from rekindle.data.errors import InputError
from rekindle.data.inventory import shard_sets
from rekindle.data.settings import parse_settings
from rekindle.data.sharing.names import last_part, places_in, portable
from rekindle.data.storage.base import Store
from rekindle.data.storage.commits import Commit
from rekindle.data.storage.manifest import WITHOUT_TEXT
from rekindle.data.storage.records import ROLL_UP_ABOUT, ROLL_UP_TABLE
from rekindle.data.storage.seal import FORMAT_VERSION, SEAL, VERSION, seal, unseal
from rekindle.data.storage.shards import Shard, write_shard
from rekindle.data.storage.store import LocalStore
from rekindle.data.targets.head import HEAD_FILES
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.files import read_parts
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.writing import write_options

CONFIG_FILE = "tokenizer_config.json"
Done = Callable[[Commit], object]


@dataclass
class _FileNames:
    """The names of the text's files in the copy: the last parts of their paths, with a number if
    two are equal.
    """

    by_place: dict[str, str] = field(default_factory=dict)

    def add(self, place: str) -> None:
        """Give a place its name."""
        name = str(portable(place))
        used, number = {*self.by_place.values()}, 1
        if place not in self.by_place:
            while name in used:
                number += 1
                name = f"{number}/{last_part(place)}"
            self.by_place[place] = name

    def in_corpus(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Return a description of the corpus, or of a shard of it, with these names."""
        shared = dict(about)
        if "config" in shared:
            config = dict(shared["config"])
            config["source"] = [self._name(place) for place in config["source"]]
            if "without" in config:
                config["without"] = portable(config["without"])
            shared["config"] = config
        if "order" in shared:
            shared["order"] = [self._name(place) for place in shared["order"]]
        for key in ("sources", "contents", "generated"):
            if key in shared:
                shared[key] = {self._name(place): of for place, of in shared[key].items()}
        if "generated" in shared:
            shared["generated"] = portable(shared["generated"])
        return shared

    def _name(self, place: str) -> str:
        return self.by_place.get(place) or str(portable(place))


def _portable_teacher(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return a teacher's description; names of labels and domains stay, whatever they look like."""
    shared = dict(about) | {"model": portable(about.get("model", ""))}
    if "lineage" in shared:
        shared["lineage"] = [
            dict(run) | {"student": portable(run.get("student", ""))} for run in shared["lineage"]
        ]
    return shared


def _portable_description(
    folder: str, about: Mapping[str, Any], names: _FileNames
) -> dict[str, Any]:
    """Return a description in ``folder``, or that of a shard, as others read it."""
    kind = folder.partition("/")[0]
    if kind == "corpus":
        return names.in_corpus(about)
    if kind == "targets":
        if "teacher" in about:
            return dict(about) | {"teacher": _portable_teacher(about["teacher"])}
        return _portable_teacher(about) if "fingerprints" in about else dict(about)
    return dict(about)


def copy_for_others(
    corpus: Corpus,
    teachers: Collection[str],
    into: Path,
    with_text: bool,
    done: Done = lambda commit: None,
) -> LocalStore:
    """Make the copy in the folder ``into``, with these teachers and, if ``with_text``, the text.

    The manifest is not written: it is derived from what a reader finds, see ``Cache``. Every byte
    copied is checked against its checksum. Raises CacheFormatError if one is damaged, InputError
    for a teacher that is known by a place of this machine.
    """
    store, target = corpus.store, LocalStore(into)
    names = _names(corpus)
    _check_identities(store, teachers)
    digests: dict[str, str] = {}  # of the corpus's shards in the copy, by those of the cache
    for shards in shard_sets(store):
        kind, _, rest = shards.folder.partition("/")
        if kind == "targets" and rest.partition("/")[0] not in teachers:
            continue
        _copy_descriptions(store, target, shards.folder, names)
        if kind == "views" and not with_text:
            continue
        for unit, commit in shards.committed().items():
            shard = shards.open(commit, direct=True)
            shard.check()
            copied = _copy_shard(shard, shards.folder, target, names, digests)
            if kind == "corpus":
                digests[commit.sha256] = copied.sha256
                if not with_text:
                    target.discard(f"{shards.folder}/{copied.path}")
            target.create(f"{shards.folder}/commits/{unit}.json", copied.to_bytes())
            done(commit)
    if not with_text:
        target.create(WITHOUT_TEXT, seal({"shards": len(corpus.commits)}))
    _copy_tokenizer(store, target)
    return target


def _names(corpus: Corpus) -> _FileNames:
    names = _FileNames()
    for addition in corpus.additions:
        for place in (*addition.config["source"], *addition.order, *addition.sources):
            names.add(place)
    return names


def _check_identities(store: Store, teachers: Collection[str]) -> None:
    """Raise InputError for teachers that are known by a place of this machine: imported ones whose
    provenance has one, and those of a server that calls its model by one.
    """
    for name in sorted(teachers):
        info = read_parts(store, name)[0]
        if info.imported is not None and (places := places_in(info.imported.provenance)):
            raise InputError(
                f"the provenance of teacher {name!r} names a place of this machine ({places[0]}), "
                "and is what the teacher is known by: import it again with another --provenance, "
                "or name the teachers that are to be sent with --teacher"
            )
        if info.served is not None and (places := places_in(info.served.model)):
            raise InputError(
                f"the server of teacher {name!r} calls its model by a place of that machine "
                f"({places[0]}), and this is what the teacher is known by: start the server with "
                "another name for it (vLLM: --served-model-name) and cache the teacher again, or "
                "name the teachers that are to be sent with --teacher"
            )


def _copy_descriptions(store: Store, target: Store, folder: str, names: _FileNames) -> None:
    """Copy the sealed files beside the shards of a set, and an output matrix unchanged."""
    for name in store.names(folder):
        path = f"{folder}/{name}"
        if path in (TOKENIZER_FILES, WITHOUT_TEXT) or name in (ROLL_UP_TABLE, ROLL_UP_ABOUT):
            continue
        content = store.read_bytes(path)
        if name.endswith(".json") and name not in HEAD_FILES:
            values = store.parse_json(path, content)
            body = unseal(values, f"{store.location}/{path}")
            version = body.pop(VERSION, FORMAT_VERSION)
            shared = _portable_description(folder, body, names)
            if shared != body or SEAL not in values:
                content = seal(shared, max(version, FORMAT_VERSION))
        target.create(path, content)


def _copy_shard(
    shard: Shard, folder: str, target: LocalStore, names: _FileNames, digests: Mapping[str, str]
) -> Commit:
    """Copy a shard: the same file, or one that reveals nothing of this machine."""
    commit = shard.commit
    corpus_sha256 = commit.facts.get("corpus_sha256")
    facts = dict(commit.facts)
    if isinstance(corpus_sha256, str):
        facts["corpus_sha256"] = digests.get(corpus_sha256, corpus_sha256)
    metadata = shard.metadata
    shared = _portable_description(folder, metadata, names)
    path = target.root / folder / commit.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if shared == metadata:
        source = Path(shard.name)
        if source.is_file():
            path.symlink_to(source.absolute())
        else:
            with open(path, "xb") as file:
                for offset, length, _ in commit.regions:
                    file.write(shard.source.region(offset, length))
        return replace(commit, facts=facts)
    schema = shard.schema.with_metadata({"rekindle": json.dumps(shared, sort_keys=True)})
    batches = (
        pa.RecordBatch.from_arrays(shard.batch(number, keep=False).columns, schema=schema)
        for number in range(shard.batch_count)
    )
    options = None
    if metadata.get("kind") == "targets":
        info = parse_settings(TeacherInfo, metadata.get("teacher"), shard.name)
        options = write_options(kind_of(info))
    written = write_shard(path, schema, batches, options)
    return Commit(commit.unit, commit.path, *written, facts, commit.rows_per_batch)


def _copy_tokenizer(store: Store, target: Store) -> None:
    """Copy the tokenizer's files, and their checksums."""
    if not store.exists(TOKENIZER_FILES):  # of format 1
        for name in store.names(TOKENIZER):
            target.create(f"{TOKENIZER}/{name}", store.read_bytes(f"{TOKENIZER}/{name}"))
        return
    files = {}
    for name in store.names(TOKENIZER):
        content = store.read_bytes(f"{TOKENIZER}/{name}")
        if name == CONFIG_FILE:
            values = json.loads(content)
            if (shared := portable_config(values)) != values:
                content = (json.dumps(shared, indent=2, ensure_ascii=False) + "\n").encode()
        target.create(f"{TOKENIZER}/{name}", content)
        files[name] = hashlib.sha256(content).hexdigest()
    target.create(TOKENIZER_FILES, seal(files))


def portable_config(values: Any) -> Any:
    """Return the settings of a model or tokenizer without the places under path keys, also those of
    its parts (``text_config``): tokens and templates stay as they are, whatever they begin with.
    """
    if not isinstance(values, Mapping):
        return values
    return {
        key: portable(one)
        if "path" in str(key) or str(key).endswith("_file")
        else portable_config(one)
        for key, one in values.items()
    }


def files_of(copy: LocalStore) -> dict[str, Path]:
    """Return all files of a copy by their names in it, sorted."""
    paths = (path for path in copy.root.rglob("*") if path.is_file())
    names = {PurePosixPath(path.relative_to(copy.root)).as_posix(): path for path in paths}
    return dict(sorted(names.items()))
