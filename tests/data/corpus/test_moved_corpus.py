"""Source files are known by their content: moved, renamed and among new ones, they are the same."""

import json
import logging
import random
import shutil
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.corpus import additions
from rekindle.data.corpus.additions import is_same_source
from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.source.source_states import assumed_order
from rekindle.data.storage.seal import SEAL, read_sealed, seal
from rekindle.data.storage.store import LocalStore

PER_SHARD = 4
WORDS = [
    "the",
    "river",
    "city",
    "teacher",
    "student",
    "writes",
    "learns",
    "paper",
    "table",
    "runs",
    "over",
    "under",
]
FILES = 5


def text_of(number):
    draw = random.Random(number)
    texts = [" ".join(draw.choices(WORDS, k=30)) for _ in range(3)]
    return "".join(json.dumps({"text": f"{number} {text}"}) + "\n" for text in texts)


def write(folder, numbers, name="part-{}.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / name.format(number)).write_text(text_of(number))
    return folder


@pytest.fixture
def build(tmp_path, wordpiece):
    def made(source, cache="cache", stop=None, **values):
        sources = [source] if isinstance(source, str | Path) else source
        config = CorpusConfig(
            source=tuple(map(str, sources)), tokenizer=str(wordpiece), sequence_length=16, **values
        )
        done = []

        def progress(sequences, tokens):
            done.append(sequences)
            if len(done) == stop:
                raise KeyboardInterrupt

        return build_corpus(LocalStore(tmp_path / cache), config, PER_SHARD, progress), len(done)

    return made


def rows(corpus):
    tables = [corpus.shard(shard).table() for shard in range(len(corpus.commits))]
    return [(row["document"], row["text"]) for table in tables for row in table.to_pylist()]


def test_the_next_file_of_a_glob_comes_after_those_read(tmp_path, build):
    folder = write(tmp_path / "texts", (8, 9))
    before = rows(build(folder / "*.jsonl")[0])
    write(folder, (10,))  # which is sorted before them
    grown = rows(build(folder / "*.jsonl")[0])
    assert grown[: len(before)] == before
    assert {document.split(":")[0] for document, _ in grown[len(before) :]} == {"part-10.jsonl"}
    assert build(folder / "*.jsonl")[1] == 0


def test_another_path_to_the_same_files_changes_nothing(tmp_path, build, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "rekindle")
    write(tmp_path / "texts", (1, 2))
    monkeypatch.chdir(tmp_path)
    begun = rows(build("texts/*.jsonl")[0])
    elsewhere = tmp_path / "node" / "mount"
    shutil.copytree(tmp_path / "texts", elsewhere)
    (elsewhere / "part-1.jsonl").rename(elsewhere / "z.jsonl")
    for source in (tmp_path / "texts/*.jsonl", elsewhere / "*", ["texts/part-2.jsonl", "texts/*"]):
        corpus, made = build(source)
        assert made == 0
        assert rows(corpus) == begun
    assert (
        "2 files of the corpus source are at another path now; recognised by content" in caplog.text
    )
    assert len(corpus.additions) == 1


@settings(max_examples=10, deadline=None)
@given(names=st.permutations(range(FILES)), begun=st.integers(1, FILES), stop=st.integers(1, 3))
def test_whatever_the_files_are_called_the_corpus_goes_on(
    tmp_path_factory, wordpiece, names, begun, stop
):
    """Begun with some files, killed, moved to other names, finished, grown: no row is another."""
    home = tmp_path_factory.mktemp("t")
    config = CorpusConfig(source="x", tokenizer=str(wordpiece), sequence_length=16)

    def build(cache, folder, stop=None):
        done = []

        def progress(sequences, tokens):
            done.append(sequences)
            if len(done) == stop:
                raise KeyboardInterrupt

        source = {"source": (str(folder / "*.jsonl"),)}
        return build_corpus(
            LocalStore(home / cache), config.model_copy(update=source), PER_SHARD, progress
        )

    first, second = home / "first", home / "second"
    write(first, range(begun))
    straight = rows(build("straight", first))
    with pytest.raises(KeyboardInterrupt):
        build("killed", first, stop)
    for number in range(begun):
        write(second / str(names[number]), [number], "renamed.jsonl")
        (second / str(names[number]) / "renamed.jsonl").rename(second / f"{names[number]}.jsonl")
    assert rows(build("killed", second)) == straight
    for number in range(begun, FILES):
        (second / f"{names[number]}.jsonl").write_text(text_of(number))
    grown = rows(build("killed", second))
    assert grown[: len(straight)] == straight
    assert sorted(text for _, text in grown) == sorted(
        text for _, text in rows(build("whole", second))
    )
    assert rows(build("killed", second)) == grown


def test_two_files_of_the_same_content_are_two(tmp_path, build):
    folder = write(tmp_path / "texts", (1,))
    shutil.copy(folder / "part-1.jsonl", folder / "part-2.jsonl")
    twice = rows(build(folder / "*.jsonl")[0])
    assert len(twice) == 2 * len({text for _, text in twice})
    (folder / "part-2.jsonl").unlink()
    with pytest.raises(CacheMismatchError, match=r"part-2\.jsonl \(is not there\)"):
        build(folder / "*.jsonl")


@pytest.mark.parametrize("moved", [False, True])
def test_a_changed_file_is_refused_by_its_name(tmp_path, build, moved):
    folder = write(tmp_path / "texts", (1, 2))
    build(folder / "*.jsonl")
    before = (tmp_path / "cache/corpus/corpus.json").read_bytes()
    if moved:
        folder = folder.rename(tmp_path / "elsewhere")
    (folder / "part-2.jsonl").write_text(text_of(2).replace("the", "teh", 1))
    with pytest.raises(CacheMismatchError, match=r"part-2\.jsonl \(has other content\)"):
        build(folder / "*.jsonl")
    (folder / "part-2.jsonl").rename(folder / "part-2.txt")
    (folder / "part-2.txt").write_text(text_of(2))  # would be read otherwise
    with pytest.raises(CacheMismatchError, match=r"part-2\.jsonl \(is not there\)"):
        build(folder / "*")
    assert (tmp_path / "cache/corpus/corpus.json").read_bytes() == before


def test_a_saved_dataset_may_move_too(tmp_path, build):
    rows_ = [json.loads(line) for n in range(3) for line in text_of(n).splitlines()]
    datasets.Dataset.from_list(rows_).save_to_disk(tmp_path / "one", num_shards=3)
    begun = rows(build(tmp_path / "one")[0])
    (tmp_path / "one").rename(tmp_path / "other")
    corpus, made = build(tmp_path / "other")
    assert (rows(corpus), made) == (begun, 0)


def test_beside_what_is_no_file_nothing_moves_in_order(tmp_path, build, monkeypatch):
    monkeypatch.setattr("rekindle.data.source.documents.python_docs", lambda: iter(()))
    folder = write(tmp_path / "texts", (1, 2))
    files = [folder / "part-1.jsonl", folder / "part-2.jsonl"]
    begun = rows(build([files[0], "python-docs", files[1]])[0])
    folder = folder.rename(tmp_path / "other")
    one, two = folder / "part-1.jsonl", folder / "part-2.jsonl"
    corpus, made = build([one, "python-docs", two])
    assert (rows(corpus), made) == (begun, 0)
    write(folder, (3,))
    for source in (
        [two, "python-docs", one],
        ["python-docs", one, two],
        [one, "python-docs", two, folder / "part-3.jsonl"],
    ):
        with pytest.raises(CacheMismatchError, match="another one"):
            build(source)
    with pytest.raises(CacheMismatchError, match=r"python-docs \(is not there\)"):
        build([one, two])


def test_a_finished_corpus_whose_source_is_gone_is_asked_for_by_its_own_path(tmp_path, build):
    folder = write(tmp_path / "texts", (1,))
    begun = rows(build(folder / "*.jsonl")[0])
    folder.rename(tmp_path / "other")
    assert rows(build(folder / "*.jsonl")[0]) == begun
    with pytest.raises(InputError, match="neither a file"):
        build(tmp_path / "nowhere" / "*.jsonl")


def test_an_older_corpus_that_did_not_record_the_order_moves_and_grows(
    tmp_path, build, monkeypatch
):
    """As format 2 wrote it; killed before its end, so that the order matters."""
    folder = write(tmp_path / "texts", (3, 1, 2))
    source = [folder / "part-2.jsonl", folder / "*.jsonl"]
    straight = rows(build(source, cache="straight")[0])
    with pytest.raises(KeyboardInterrupt):
        build(source, stop=1)
    path = tmp_path / "cache/corpus/corpus.json"
    body = read_sealed(LocalStore(tmp_path / "cache"), "corpus/corpus.json")
    older = {key: value for key, value in body.items() if key not in ("order", SEAL)}
    path.write_bytes(seal(older))
    folder = folder.rename(tmp_path / "other")
    (folder / "part-1.jsonl").rename(folder / "x.jsonl")
    write(folder, (0,))
    grown = rows(build(folder / "*.jsonl")[0])
    assert grown[: len(straight)] == straight
    assert len(Corpus(LocalStore(tmp_path / "cache")).additions) == 2
    assert additions.read_additions(LocalStore(tmp_path / "cache"))[0][1].shards is not None


def test_the_usual_order_is_that_of_the_entries_and_sorted_within_a_glob():
    files = ("t/b.txt", "t/a.txt", "t/sub/c.txt", "d/data-0.arrow", "z.jsonl")
    states = {path: [1, "x"] for path in files}
    source = ["t/b.txt", "python-docs", "t/**/*.txt", "d", "owner/name", "z.jsonl"]
    assert assumed_order(source, states) == (
        "t/b.txt",
        "python-docs",
        "t/a.txt",
        "t/sub/c.txt",
        "d/data-0.arrow",
        "owner/name",
        "z.jsonl",
    )


def test_an_order_that_was_not_recorded_is_that_of_globs_and_of_whatever_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/new")
    files = ("t/a.txt", "t/z.txt", "t/sub/m.txt", "/home/old/c/x.txt", "/home/old/b.txt", "q/o.txt")
    states = {path: [1, "x"] for path in files}
    source = ["t/*.txt", "~/c/*", "~/b.txt", "t/sub/*.txt", "~/none.txt"]
    assert assumed_order(source, states) == (
        "t/a.txt",
        "t/z.txt",
        "/home/old/c/x.txt",
        "/home/old/b.txt",
        "t/sub/m.txt",
    )
    assert assumed_order(["t/*"], states) == ("t/a.txt", "t/z.txt")
    assert assumed_order(["t/**"], states) == ("t/a.txt", "t/sub/m.txt", "t/z.txt")


@pytest.mark.parametrize("stop", [1, None])
def test_where_the_order_is_not_recorded_and_cannot_be_known_nothing_comes_after(
    tmp_path, build, stop
):
    folder = write(tmp_path / "texts", (1, 2))
    with suppress(KeyboardInterrupt):
        build(folder / "*.jsonl", stop=stop)
    path = tmp_path / "cache/corpus/corpus.json"
    body = read_sealed(LocalStore(tmp_path / "cache"), "corpus/corpus.json")
    older = {key: value for key, value in body.items() if key not in ("order", SEAL)}
    older["config"] = {**older["config"], "source": [str(folder / "part-1.jsonl")]}
    path.write_bytes(seal(older))
    if stop is None:  # nothing is missing
        assert build(folder / "*.jsonl")[1] == 0
        write(folder, (3,))
    before = path.read_bytes()
    with pytest.raises(CacheMismatchError, match=r"the order in which.*part-2\.jsonl was in"):
        build(folder / "*.jsonl")
    assert path.read_bytes() == before


def test_a_finished_corpus_whose_source_is_gone_goes_on_however_that_is_written(
    tmp_path, build, monkeypatch
):
    folder = write(tmp_path / "texts", (1,))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    begun = rows(build(folder / "*.jsonl", limit_sequences=8)[0])
    store = LocalStore(tmp_path / "cache")
    assert is_same_source(store, ["texts/*"])
    write(folder, (2,))
    assert not is_same_source(store, ["texts/*"])
    folder.rename(tmp_path / "other")
    for source in ("~/texts/*.jsonl", "texts/*.jsonl"):
        assert rows(build(source, limit_sequences=8)[0]) == begun
        assert is_same_source(store, [source])
        with pytest.raises(InputError, match="neither a file"):
            build(source)  # a longer one needs it
    with pytest.raises(InputError, match=r"as it was: \[.*texts/\*\.jsonl\]"):
        build("nowhere/*.jsonl", limit_sequences=8)


def test_a_file_that_is_named_twice_is_read_once_and_that_is_said(tmp_path, build, caplog):
    caplog.set_level(logging.INFO, "rekindle")
    folder = write(tmp_path / "texts", (1, 2))
    twice = rows(build([folder / "*.jsonl", folder / "part-*"])[0])
    assert len(twice) == len({text for _, text in twice})
    assert "corpus.source names 2 of its files more than once; each is read once" in caplog.text
