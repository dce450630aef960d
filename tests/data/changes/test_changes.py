"""A changed teacher is the one that would have been made so at once, and no value is another."""

import json
import shutil

import pytest

from rekindle.data.cache import Cache
from rekindle.data.changes.carry_out import finish_interrupted, to_transcode
from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.inventory import roll_up_records
from rekindle.data.journal import JOURNAL_KEYS
from rekindle.data.storage import records as records_module
from rekindle.data.storage.seal import SEAL, VERSION, seal
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import LocalStore, open_store
from rekindle.data.targets.reading.files import read_parts
from rekindle.data.targets.scalars import FACT
from rekindle.pipeline.caching.repair import repair_cache
from rekindle.pipeline.progress import SILENT
from testlib.caches import committed, problems
from testlib.changes.changing import change, listed, said, same
from testlib.fuzz.templates import GOLDEN


def records(cache):
    """What the commit records say, but for what two runs of one unit say otherwise."""
    found = {}
    for path in cache.glob("targets/**/commits/*.json"):
        body = json.loads(path.read_text())
        body["facts"].pop("seconds", None)
        found[str(path.relative_to(cache))] = {
            k: v for k, v in body.items() if k not in ("path", "record")
        }
    return found


def descriptions(cache):
    return {str(p.relative_to(cache)): p.read_bytes() for p in cache.glob("targets/**/*.json")}


def assert_as_made_at_once(cache, made):
    assert listed(cache) == listed(made)
    assert committed(cache) == committed(made)
    assert records(cache) == records(made)
    own = lambda found: {n: c for n, c in found.items() if "/commits/" not in n}  # noqa: E731
    assert own(descriptions(cache)) == own(descriptions(made))
    told = json.loads((cache / "cache.json").read_text())
    wanted = json.loads((made / "cache.json").read_text())
    for key in (*JOURNAL_KEYS, "record"):
        told.pop(key, None), wanted.pop(key, None)
    assert told == wanted
    assert problems(cache) == []


def test_there_and_back(plain, called_b, compact, cache):
    """Renamed, transcoded, transcoded back, renamed back: each time as made at once."""
    before = said(plain)
    assert {"", "k6", "k6-tau-2"} == {p.info.part for p in Cache.open(cache).teachers["a"].parts}
    assert change(cache, ("rename", "a", "b"))
    assert_as_made_at_once(cache, called_b)
    assert same(said(cache)["b"], before["a"])
    assert not change(cache, ("rename", "a", "b"))
    assert change(cache, ("rename", "b", "a"))
    assert_as_made_at_once(cache, plain)
    assert change(cache, ("transcode", "a", "compact"))
    assert_as_made_at_once(cache, compact)
    assert same(said(cache), before)
    assert not change(cache, ("transcode", "a", "compact"))
    assert change(cache, ("transcode", "a", "default"))
    assert_as_made_at_once(cache, plain)


def test_removed_it_is_gone_with_its_bytes(plain, cache):
    assert change(cache, ("remove", "a"))
    assert same(said(cache), {"expert": said(plain)["expert"]})
    assert listed(cache) == [name for name in listed(plain) if not name.startswith("targets/a")]
    assert problems(cache) == []
    assert not change(cache, ("remove", "a"))
    assert change(cache, ("remove", "expert"))
    assert Cache.open(cache).teachers == {}
    assert problems(cache) == []


def test_what_is_half_cached_goes_on_under_its_new_name(cache, called_b):
    """Units that are missing are made by cache-teachers as ever; here they are copied back."""
    shards = ShardSet(open_store(cache), "targets/a")
    shards.forget("00001-r001")
    change(cache, ("rename", "a", "b"))
    assert "00001-r001" not in Cache.open(cache).teachers["b"].parts[0].commits
    assert problems(cache) == []
    assert committed(cache).keys() == committed(called_b).keys() - {"targets/b/00001-r001"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("remove", "c"), ("no teacher 'c'", "a, expert")),
        (("rename", "exprt", "b"), ("no teacher 'exprt'", "did you mean 'expert'")),
        (("rename", "a", "expert"), ("already has a teacher 'expert'", "--remove expert")),
        (("rename", "a", "a"), ("is already called 'a'",)),
        (("rename", "a", "../b"), ("a name becomes a folder", "'../b'")),
        (("rename", "a", ""), ("a name becomes a folder",)),
        (("transcode", "a", "zip"), ("default or compact",)),
        (("transcode", "a", "precise"), ("default or compact", "another name")),
        (("transcode", "expert", "compact"), ("3 logits", "only a codec for topk and threshold")),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(cache, asked, words):
    before = listed(cache)
    content = (cache / "cache.json").read_bytes()
    with pytest.raises(InputError) as refused:
        change(cache, asked)
    for word in words:
        assert word in str(refused.value)
    assert (listed(cache), (cache / "cache.json").read_bytes()) == (before, content)


def test_precise_targets_stay_precise(make_changed):
    cache = make_changed(codec="precise")
    with pytest.raises(InputError, match="has the codec precise: compact would lose precision"):
        change(cache, ("transcode", "a", "compact"))
    assert change(cache, ("rename", "a", "b"))
    assert problems(cache) == []


def test_a_vocabulary_can_be_too_large_for_compact(plain):
    parts = read_parts(open_store(plain), "a")
    large = [part.model_copy(update={"vocabulary_size": 600_000}) for part in parts]
    with pytest.raises(InputError, match=r"cannot have the codec compact.*600,000 tokens"):
        to_transcode(large, "compact")


def test_without_room_nothing_is_begun(cache, monkeypatch):
    monkeypatch.setattr(LocalStore, "free_bytes", 1000)
    for asked in (("rename", "a", "b"), ("transcode", "a", "compact")):
        with pytest.raises(InputError, match=r"needs .* kB for a copy .*the disk has 1\.0 kB free"):
            change(cache, asked)
    assert "change" not in json.loads((cache / "cache.json").read_text())
    assert change(cache, ("remove", "a"))  # needs none, and makes some


def test_what_is_damaged_is_not_copied(cache):
    """Nor is the cache left in between: cache-teachers must be able to mend it."""
    name = next((cache / "targets/a/data").iterdir())
    content = bytearray(name.read_bytes())
    content[len(content) // 2] ^= 1
    name.write_bytes(content)
    before = listed(cache)
    for asked in (("rename", "a", "b"), ("transcode", "a", "compact")):
        with pytest.raises(CacheFormatError, match="checksum mismatch"):
            change(cache, asked)
        assert listed(cache) == before
        assert "change" not in json.loads((cache / "cache.json").read_text())
    assert change(cache, ("remove", "a"))


def test_scalars_can_be_read_alone_after_each(cache):
    facts = lambda: Cache.open(cache).teachers["a"].parts[0].commits["00000-r000"].facts  # noqa: E731
    assert FACT in facts()
    change(cache, ("transcode", "a", "compact"))
    assert FACT not in facts()  # the columns are not there as they are
    change(cache, ("transcode", "a", "default"))
    assert FACT in facts()


QUICK = ("cache-v1", "cache-v3", "cache-v7")
SLOW = [pytest.param(p.name, marks=pytest.mark.slow) for p in GOLDEN if p.name not in QUICK]


@pytest.mark.parametrize("version", [*QUICK, *SLOW])
def test_caches_of_all_versions_are_changed_or_refused(version, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(GOLDEN[0].parent / version, cache)
    before = said(cache)
    if version == "cache-v1":
        with pytest.raises(InputError, match="has cache format 1"):
            change(cache, ("rename", "lm", "b"))
    else:
        for name in before:
            change(cache, ("rename", name, f"{name}-2"))
        assert same(said(cache), {f"{name}-2": targets for name, targets in before.items()})
        renamed = said(cache)
        infos = [teacher.info for teacher in Cache.open(cache).teachers.values()]
        able = [i for i in infos if i.kind in ("topk", "threshold") and i.codec != "precise"]
        for codec in ("compact", "default"):
            for info in able:
                change(cache, ("transcode", info.name, codec))
            assert problems(cache) == []
            assert same(said(cache), renamed)
    for name in Cache.open(cache).teachers:
        change(cache, ("remove", name))
    assert problems(cache) == []


def test_rolled_up_records_are_those_of_the_changed_teacher(plain, cache, monkeypatch):
    monkeypatch.setattr(records_module, "MIN_UNITS", 2)
    monkeypatch.setattr(records_module, "SETTLE_SECONDS", 0.01)
    roll_up_records(open_store(cache))
    for asked in (
        ("transcode", "a", "compact"),
        ("rename", "a", "b"),
        ("transcode", "b", "default"),
    ):
        assert (cache / "targets" / asked[1] / records_module.ROLL_UP_TABLE).exists()
        change(cache, asked)
        assert problems(cache) == []
    assert same(said(cache)["b"], said(plain)["a"])


def test_of_a_linked_folder_the_link_is_removed(cache, tmp_path):
    """A teacher on another disk: what the link leads to is somebody's."""
    (cache / "targets/expert").rename(tmp_path / "elsewhere")
    (cache / "targets/expert").symlink_to(tmp_path / "elsewhere")
    change(cache, ("remove", "expert"))
    assert "expert" not in Cache.open(cache).teachers
    assert (tmp_path / "elsewhere/teacher.json").exists()


CHANGE = {"action": "transcode", "teacher": "a", "to": "compact", "sets": ["targets/a"]}
CHANGE |= {"version": 3, "phase": "placing"}
JOURNALS = [
    {"change": [1]},
    {"change": CHANGE | {"sets": ["corpus"]}},
    {"change": CHANGE | {"sets": ["targets/a/../../x"]}},
    {"change": CHANGE | {"sets": []}},
    {"change": CHANGE | {"teacher": "../a"}},
    {"change": CHANGE | {"action": "rename", "to": "b", "sets": []}},
    {"change": CHANGE | {"version": 99}},
    {"renamed": {"a": ["b"]}},
    {"removed": [{}]},
]


@pytest.mark.parametrize("journal", JOURNALS, ids=str)
def test_whatever_a_stranger_writes_down_of_changes_is_damage(cache, journal):
    write_journal(cache, journal)
    with pytest.raises(CacheFormatError, match=r"cache\.json is damaged: (change|renamed|removed)"):
        Cache.open(cache)
    for step in (
        lambda: change(cache, ("remove", "a")),
        lambda: finish_interrupted(open_store(cache)),
    ):
        with pytest.raises(CacheFormatError, match=r"cache\.json is damaged"):
            step()
    assert ["cache.json is damaged" in problem for problem in problems(cache)] == [True]
    assert repair_cache(open_store(cache), [], True, SILENT) == 1  # then it is made anew


def test_what_cannot_be_finished_any_more_can_be_removed(cache):
    """Somebody deleted the copy by hand, in the middle of a change."""
    write_journal(cache, {"change": CHANGE})
    with pytest.raises(
        CacheFormatError,
        match=r"\.next, from which it was read, no longer exists.*--remove a --yes",
    ):
        change(cache, ("transcode", "a", "compact"))
    change(cache, ("remove", "a"))
    assert problems(cache) == []
    assert [*Cache.open(cache).teachers] == ["expert"]


def test_two_names_that_became_each_other_end(cache):
    write_journal(cache, {"renamed": {"x": "y", "y": "x", "z": "expert"}, "removed": ["w"]})
    opened = Cache.open(cache)
    for name, word in (("x", "removed"), ("z", "renamed to 'expert'"), ("w", "removed")):
        with pytest.raises(InputError, match=f"Teacher '{name}' was {word}"):
            opened.teacher(name)


def write_journal(cache, journal):
    body = json.loads((cache / "cache.json").read_text())
    body = {key: value for key, value in body.items() if key not in (*JOURNAL_KEYS, VERSION, SEAL)}
    (cache / "cache.json").write_bytes(seal(body | journal))
