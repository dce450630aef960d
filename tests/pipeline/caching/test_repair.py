"""Any one file of a cache may be damaged or gone: it is named, and exactly it is made again."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheError, CacheFormatError, InputError
from rekindle.data.inventory import collect_garbage
from rekindle.data.storage.seal import seal
from rekindle.data.storage.shards import ShardSet, shard_schema
from rekindle.data.storage.store import LocalStore, open_store
from rekindle.data.storage.units import unit_of
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.caching.repair import repair_cache
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.progress import SILENT
from testlib.caches import problems

Teachers = list[dict[str, Any]]

ATTEMPT = re.compile(r"-[0-9a-f]{8}\.arrow$")
CORPUS = {"limit_sequences": 8}
BITS = (0x01, 0x10, 0x80)


@pytest.fixture(scope="module")
def teachers(make_teacher) -> Teachers:
    """Every kind of shard: masked top-k, compact, hidden states, of sequences, words and pairs."""
    causal, classes = "causal_lm", "sequence_classification"
    two = {"kind": "topk", "k": 4, "temperatures": [2, 3]}
    return [
        make_teacher("lm", "masked_lm", targets=two),
        make_teacher("packed", causal, targets={"kind": "topk", "k": 4, "codec": "compact"}),
        make_teacher("hidden", causal, targets={"kind": "hidden"}),
        make_teacher("classes", classes, monte_carlo={"passes": 2}),
        make_teacher("words", "token_classification"),
        make_teacher("pairs", classes, pairs="adjacent"),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, configure, teachers) -> Iterator[Path]:
    """A finished cache; its masked teacher was extended by a temperature."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    fewer = teachers[0] | {"targets": {"kind": "topk", "k": 4, "temperatures": [2]}}
    cache_teachers(configure(path, [fewer], CORPUS))
    cache_teachers(configure(path, teachers, CORPUS))
    before = files(path)
    yield path
    assert files(path) == before  # the copies below are of hard links: none may be written into


@pytest.fixture(scope="module")
def larger(tmp_path_factory, configure, teachers) -> tuple[Path, Teachers]:
    """A cache whose teacher was extended by a larger k, and the configuration that did so."""
    path = tmp_path_factory.mktemp("larger") / "cache"
    first = teachers[1] | {"name": "grown", "targets": {"kind": "topk", "k": 2}}
    second = first | {"targets": {"kind": "topk", "k": 6}}
    cache_teachers(configure(path, [first], CORPUS))
    cache_teachers(configure(path, [second], CORPUS))
    return path, [second]


class State(NamedTuple):
    """What one file is."""

    inode: int
    modified: int
    content: bytes


def files(cache: Path) -> dict[str, State]:
    """Every file by its name below the cache, but its card: no checksum is over what it says."""
    found = {}
    for path in sorted(p for p in cache.rglob("*") if p.is_file() and p.name != "README.md"):
        state = path.stat()
        name = str(path.relative_to(cache))
        found[name] = State(state.st_ino, state.st_mtime_ns, path.read_bytes())
    return found


def copied(cache: Path, to: Path) -> Path:
    """A copy of hard links: quick, and a file keeps its inode and time."""
    return Path(shutil.copytree(cache, to, copy_function=os.link))


def put(cache: Path, name: str, content: bytes | None) -> None:
    """Other bytes (None: no file) under a name, without writing into what is linked there."""
    (cache / name).unlink()
    if content is not None:
        (cache / name).write_bytes(content)


def role(name: str) -> str:
    """A file's name without what differs between two attempts."""
    return ATTEMPT.sub("", name)


def unit_files(state: dict[str, State], name: str) -> set[str]:
    """A unit's record and data file, of either; else the file itself. The head's two are one."""
    if "/commits/" in name:
        folder, unit = name.removesuffix(".json").split("/commits/")
        return {name} | {n for n in state if role(n) == f"{folder}/data/{unit}"}
    if name.endswith(".arrow"):
        return {name, role(name).replace("/data/", "/commits/") + ".json"}
    if "/head." in name:
        folder = name.rpartition("/")[0]
        return {f"{folder}/head.json", f"{folder}/head.safetensors"}
    return {name}


def flip(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= bit
    return bytes(changed)


def assert_named(cache: Path, name: str, what: str) -> None:
    """The file is named in all that is said, so that nothing else is blamed."""
    found = problems(cache)
    assert found, f"{name}, {what}: nothing is said"
    for problem in found:
        assert name in problem, f"{name}, {what}: {problem}"


def concerned(name: str) -> list[str]:
    """The teacher that a file belongs to, or one that needs it: a run of all plans all of them."""
    first, second, *_ = [*name.split("/"), ""]
    by_view = {"masked": "lm", "pairs": "pairs"}
    if first == "targets":
        return [second]
    return [by_view[second.split("-")[0]]] if first == "views" else ["classes"]


def assert_made_again(
    cache: Path, config: Any, before: dict[str, State], name: str, only: Sequence[str] = ()
) -> None:
    """``cache_teachers`` makes the part of ``name`` again, with its bytes, and touches no other."""
    part = unit_files(before, name)
    cache_teachers(config, only)
    after = files(cache)
    roles = {role(n): state.content for n, state in after.items()}
    lost = [n for n in before if role(n) not in roles]
    assert not lost, f"{name}: not made again: {lost}"
    for other, state in before.items():
        if other == "cache.json":  # rolled up again by every run
            assert after[other].content == state.content
        elif other not in part:
            assert after.get(other) == state, f"{name}: {other} was touched"
        elif "/commits/" not in other:
            new = [s.content for n, s in after.items() if role(n) == role(other) and n != other]
            content = new[0] if new else after[other].content
            assert content == state.content, f"{name}: {other} has other bytes"
    report = verify_cache(str(cache))
    assert report.problems == [], name
    # A damaged record does not tell which data file was its own.
    orphans = {n for n in part & after.keys() if n.endswith(".arrow") and "/commits/" in name}
    assert report.orphans == len(orphans)
    assert collect_garbage(open_store(cache), 0).keys() == orphans
    assert {role(n) for n in files(cache)} == {role(n) for n in before}
    assert cache_teachers(config, only).repaired == 0


# One file of each kind there is.
KINDS = {
    "manifest": "cache.json",
    "corpus": "corpus/corpus.json",
    "end of the corpus": "corpus/complete.json",
    "tokenizer": "corpus/tokenizer/tokenizer.json",
    "tokenizer's settings": "corpus/tokenizer/tokenizer_config.json",
    "tokenizer's checksums": "corpus/tokenizer.json",
    "corpus record": "corpus/commits/00000.json",
    "corpus shard": "corpus/data/00000-*.arrow",
    "masked view": "views/masked-*/view.json",
    "masked record": "views/masked-*/commits/00001-r000.json",
    "masked shard": "views/masked-*/data/00000-r001-*.arrow",
    "pair view": "views/pairs-*/view.json",
    "pair view's record": "views/pairs-*/commits/00000.json",
    "pair view's shard": "views/pairs-*/data/00001-*.arrow",
    "teacher": "targets/lm/teacher.json",
    "teacher's record": "targets/lm/commits/00001-r001.json",
    "teacher's shard": "targets/lm/data/00000-r001-*.arrow",
    "extension": "targets/lm/extensions/*/teacher.json",
    "extension's end": "targets/lm/extensions/*/complete.json",
    "extension's record": "targets/lm/extensions/*/commits/00000-r000.json",
    "extension's shard": "targets/lm/extensions/*/data/00001-r000-*.arrow",
    "compact shard": "targets/packed/data/00000-*.arrow",
    "hidden states": "targets/hidden/data/00001-*.arrow",
    "teacher of hidden states": "targets/hidden/teacher.json",
    "head": "targets/hidden/head.safetensors",
    "head's description": "targets/hidden/head.json",
    "logits": "targets/classes/data/00000-*.arrow",
    "words": "targets/words/data/00001-*.arrow",
    "pair expert": "targets/pairs/data/00000-*.arrow",
}
# Without these a cache is one that is not finished: sound as far as it goes.
UNFINISHED = re.compile(r".*/complete(-\d+)?\.json|(views|targets)/.*/commits/.*")


def one(cache: Path, pattern: str) -> str:
    (found,) = cache.glob(pattern)
    return str(found.relative_to(cache))


def places(size: int) -> list[int]:
    """The first byte, the last, the middle, and some between."""
    return sorted({0, 1, size // 7, size // 3, size // 2, size - size // 5 - 1, size - 1})


def test_every_kind_of_file_is_among_the_kinds(whole):
    """A file that is not of one of the kinds above would not be tested below."""
    kinds = {re.sub(r"\d{5}(-r\d{3})?(?=[-.]|$)", "U", role(one(whole, p))) for p in KINDS.values()}
    missing = set()
    for name in files(whole):
        kind = re.sub(r"\d{5}(-r\d{3})?(?=[-.]|$)", "U", role(name))
        if kind not in kinds and not kind.endswith("commits/U.json"):
            missing.add(kind)
    assert missing == {
        f"targets/{name}/teacher.json" for name in ("packed", "classes", "words", "pairs")
    }


def test_a_flipped_byte_of_any_file_is_named(whole, tmp_path):
    cache = copied(whole, tmp_path / "cache")
    for number, (name, state) in enumerate(files(whole).items()):
        spots = places(len(state.content))
        for turn, place in enumerate(spots[number % 4 :: 4]):
            put(cache, name, flip(state.content, place, BITS[(number + turn) % 3]))
            assert_named(cache, name, f"byte {place}")
        (cache / name).unlink()
        os.link(whole / name, cache / name)
    assert problems(cache) == []


def test_every_part_of_a_small_file_is_covered(whole, tmp_path):
    """Every 97th byte, in each of its bits in turn."""
    cache = copied(whole, tmp_path / "cache")
    patterns = ["cache.json", "corpus/corpus.json", "corpus/complete.json", "corpus/tokenizer.json"]
    patterns += ["views/*/view.json", "targets/lm/teacher.json", "targets/hidden/head.json"]
    for pattern in [*patterns, "targets/lm/commits/00001-r001.json"]:
        for path in sorted(whole.glob(pattern)):
            check_bytes(whole, cache, str(path.relative_to(whole)), 97)


@pytest.mark.slow
def test_every_third_byte_of_every_description_and_record_is_covered(whole, tmp_path):
    cache = copied(whole, tmp_path / "cache")
    for name in files(whole):
        if name.endswith(".json") and not name.startswith("corpus/tokenizer/"):
            check_bytes(whole, cache, name, 3)


@pytest.mark.slow
def test_every_53rd_byte_of_every_other_file_is_covered(whole, tmp_path):
    cache = copied(whole, tmp_path / "cache")
    for name in files(whole):
        if name.endswith((".arrow", ".safetensors")) or name.startswith("corpus/tokenizer/"):
            check_bytes(whole, cache, name, 53)


def check_bytes(whole: Path, cache: Path, name: str, step: int) -> None:
    content = (whole / name).read_bytes()
    for place in range(0, len(content), step):
        bit = 1 << (place // step % 8)
        put(cache, name, flip(content, place, bit))
        assert_named(cache, name, f"byte {place}, bit {bit}")
    (cache / name).unlink()
    os.link(whole / name, cache / name)


# --- made again -----------------------------------------------------------------------------------

CHANGES = {
    "first byte": lambda content: flip(content, 0, 1),
    "last byte": lambda content: flip(content, len(content) - 1, 1),
    "middle byte": lambda content: flip(content, len(content) // 2, 1),
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "gone": lambda content: None,
}


def damage_and_mend(
    whole: Path, cache: Path, config: Any, name: str, change: str, only: Sequence[str] = ()
) -> None:
    copied(whole, cache)
    before = files(whole)
    put(cache, name, CHANGES[change](before[name].content))
    assert_made_again(cache, config, before, name, only)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_made_again(whole, tmp_path, configure, teachers, kind):
    """One way of damage for each kind of file, and each way for several kinds: every second file is
    gone. The slow test below has all of them.
    """
    number = list(KINDS).index(kind)
    change = "gone" if number % 2 else list(CHANGES)[number // 2 % 5]
    cache, name = tmp_path / "cache", one(whole, KINDS[kind])
    config = configure(cache, teachers, CORPUS)
    damage_and_mend(whole, cache, config, name, change, concerned(name))


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_any_damaged_file_is_made_again(whole, tmp_path, configure, teachers, change):
    wrong = []
    for number, name in enumerate(files(whole)):
        cache = tmp_path / str(number)
        try:
            damage_and_mend(whole, cache, configure(cache, teachers, CORPUS), name, change)
        except (AssertionError, CacheError) as error:
            wrong.append(f"{name}: {error}")
        shutil.rmtree(cache)
    assert wrong == []


def test_all_that_is_damaged_is_made_again_at_once(whole, tmp_path, configure, teachers):
    cache = copied(whole, tmp_path / "cache")
    config = configure(cache, teachers, CORPUS)
    before = files(whole)
    damaged = [n for n in before if n.endswith(".arrow") or n.endswith("teacher.json")]
    for number, name in enumerate(damaged):
        # Descriptions are restored by what sound shards say: one of each set stays.
        if name.endswith(".json") or number % 2:
            content = before[name].content
            put(cache, name, flip(content, len(content) // 2, 1))
    broken = problems(cache)
    assert len(broken) == sum(n.endswith(".json") or i % 2 for i, n in enumerate(damaged))
    assert cache_teachers(config).repaired == len(broken)
    assert problems(cache) == []
    assert {role(n): s.content for n, s in files(cache).items() if "/commits/" not in n} == {
        role(n): s.content for n, s in before.items() if "/commits/" not in n
    }


def test_a_head_without_its_description_is_made_again(whole, tmp_path, configure, teachers):
    """As a process leaves it that is killed between the two."""
    cache = copied(whole, tmp_path / "cache")
    for path in (cache / "targets" / "hidden").rglob("*"):
        if path.is_file() and path.name != "head.safetensors":
            path.unlink()
    cache_teachers(configure(cache, teachers, CORPUS))
    assert problems(cache) == []
    assert {role(n): s.content for n, s in files(cache).items() if "/commits/" not in n} == {
        role(n): s.content for n, s in files(whole).items() if "/commits/" not in n
    }


# --- a file that is gone --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_gone_is_named(whole, tmp_path, kind):
    cache = copied(whole, tmp_path / "cache")
    name = one(whole, KINDS[kind])
    put(cache, name, None)
    if kind == "masked record":  # targets on masks that are not there
        view = name.split("/")[1]
        assert any(f"{view} has no unit 00001-r000" in problem for problem in problems(cache))
    elif UNFINISHED.fullmatch(name):
        assert problems(cache) == []
    elif kind == "manifest":
        assert "has no cache.json" in problems(cache)[0]
    elif kind == "corpus record":
        assert "corpus lacks shard 0" in problems(cache)[0]
    else:
        assert_named(cache, name, "gone")


@pytest.mark.parametrize("change", ["cut", "empty", "longer"])
def test_a_file_of_another_size_is_named(whole, tmp_path, change):
    """Of all files a third for each change."""
    cache = copied(whole, tmp_path / "cache")
    for name, state in [*files(whole).items()][["cut", "empty", "longer"].index(change) :: 3]:
        content = state.content
        other = content + b"\0" if change == "longer" else CHANGES[change](content)
        if other == content:
            continue
        put(cache, name, other)
        assert_named(cache, name, change)
        (cache / name).unlink()
        os.link(whole / name, cache / name)


# --- caches that have grown -----------------------------------------------------------------------

LARGER = {
    "teacher": "targets/grown/teacher.json",
    "extension": "targets/grown/extensions/k6/teacher.json",
    "extension's record": "targets/grown/extensions/k6/commits/00000.json",
    "extension's shard": "targets/grown/extensions/k6/data/00001-*.arrow",
}


@pytest.mark.covering
@pytest.mark.parametrize("change", ["middle byte", "gone"])
@pytest.mark.parametrize("kind", LARGER)
def test_a_part_of_a_teacher_with_a_larger_k_is_made_again(
    larger, tmp_path, configure, kind, change
):
    whole, teachers = larger
    cache, name = tmp_path / "cache", one(whole, LARGER[kind])
    copied(whole, cache)
    content = (whole / name).read_bytes()
    put(cache, name, CHANGES[change](content))
    if change != "gone":
        assert_named(cache, name, change)
    config = configure(cache, teachers, CORPUS)
    assert_made_again(cache, config, files(whole), name)


@pytest.mark.parametrize(
    "pattern", ["targets/grown/commits/00001.json", "targets/grown/data/00000-*.arrow"]
)
def test_a_damaged_unit_that_a_larger_k_has_replaced_is_taken_out(
    larger, tmp_path, configure, pattern
):
    """Nobody reads it: it costs no teacher's time, and the cache is sound again."""
    whole, teachers = larger
    cache, name = tmp_path / "cache", one(whole, pattern)
    copied(whole, cache)
    put(cache, name, CHANGES["middle byte"]((whole / name).read_bytes()))
    assert_named(cache, name, "middle byte")
    before = Cache.open(whole).example(3).targets["grown"][0]
    done = cache_teachers(configure(cache, teachers, CORPUS))
    assert (done.units_done, done.repaired) == (0, 1)
    assert verify_cache(str(cache)).problems == []
    after = Cache.open(cache).example(3).targets["grown"][0]
    assert (after.ids == before.ids).all()


def test_what_this_run_cannot_make_again_is_left(whole, tmp_path, configure, teachers):
    """Another teacher's damaged files stay where they are until its own configuration runs."""
    cache = copied(whole, tmp_path / "cache")
    shard, head = one(whole, KINDS["compact shard"]), one(whole, KINDS["head"])
    for name in (shard, head):
        put(cache, name, CHANGES["middle byte"]((whole / name).read_bytes()))
    config = configure(cache, teachers, CORPUS)
    done = cache_teachers(config, only=["classes"])
    assert (done.units_done, done.repaired) == (0, 0)
    assert len(problems(cache)) == 2
    assert cache_teachers(config).repaired == 2
    assert problems(cache) == []


@pytest.fixture(scope="module")
def longer(tmp_path_factory, configure, teachers) -> tuple[Path, dict[str, Any]]:
    """A cache whose corpus has grown, by a larger limit; and the configuration that did so."""
    path = tmp_path_factory.mktemp("longer") / "cache"
    cache_teachers(configure(path, teachers[3:4], CORPUS))
    cache_teachers(configure(path, teachers[3:4], {"limit_sequences": 12}))
    return path, {"limit_sequences": 12}


ADDITIONS = [
    "corpus/corpus.json",
    "corpus/complete.json",
    "corpus/growth-001.json",
    "corpus/complete-001.json",
    "corpus/commits/00001.json",
    "corpus/commits/00002.json",
    "corpus/data/00000-*.arrow",
    "corpus/data/00002-*.arrow",
    "targets/classes/data/00002-*.arrow",
]


@pytest.mark.covering
@pytest.mark.parametrize("change", ["middle byte", "gone"])
@pytest.mark.parametrize("pattern", ADDITIONS)
def test_a_file_of_a_corpus_that_has_grown_is_made_again(
    longer, tmp_path, configure, teachers, pattern, change
):
    whole, corpus = longer
    cache, name = tmp_path / "cache", one(whole, pattern)
    copied(whole, cache)
    put(cache, name, CHANGES[change]((whole / name).read_bytes()))
    if change != "gone":
        assert_named(cache, name, change)
    assert_made_again(cache, configure(cache, teachers[3:4], corpus), files(whole), name)


def test_a_lost_description_of_a_moved_corpus_says_what_would_bring_it_back(
    tmp_path, configure, corpus_file
):
    source, elsewhere = tmp_path / "docs.jsonl", tmp_path / "elsewhere.jsonl"
    shutil.copy(corpus_file, source)
    path = tmp_path / "cache"
    cache_teachers(configure(path, [], corpus=CORPUS | {"source": [str(source)]}))
    before = Cache.open(path).corpus.fingerprint
    (path / "corpus/corpus.json").unlink()
    source.rename(elsewhere)
    with pytest.raises(InputError, match=r"corpus\.json is lost.*must be where it was: .*docs"):
        cache_teachers(configure(path, [], corpus=CORPUS | {"source": [str(elsewhere)]}))
    shutil.copy(elsewhere, source)
    cache_teachers(configure(path, [], corpus=CORPUS | {"source": [str(elsewhere)]}))
    assert Cache.open(path).corpus.fingerprint == before


def test_the_last_shard_of_more_than_100_000_says_which_additions_there_are(tmp_path):
    """By name, 99999 would be the last one: what 100000 belongs to would not be missed."""
    shards = ShardSet(LocalStore(tmp_path), "corpus")
    for shard, about in ((99_999, {}), (100_000, {"stage": 1})):
        schema = shard_schema([pa.field("n", pa.int64())], about)
        shards.write(unit_of(shard), schema, [pa.record_batch([pa.array([1])], schema=schema)])
    shards.store.create("corpus/corpus.json", seal({}))
    with pytest.raises(CacheFormatError, match="growth-001"):
        repair_cache(shards.store, [], False, SILENT)
