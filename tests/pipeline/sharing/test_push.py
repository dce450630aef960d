"""A cache sent to a hub is the one that was here; one without its text is made whole by it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from rekindle.data.cache import Cache
from rekindle.data.counted import counted
from rekindle.pipeline.checks.verify import verify_cache
from testlib.caches import examples, problems
from testlib.command import pipeline

NAME = "datasets/me/a"


@pytest.fixture(scope="module")
def teachers(make_teacher):
    return [
        make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 8, "codec": "compact"}),
        make_teacher("expert", "sequence_classification", config={"num_labels": 3}),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_cache, teachers, small_corpus) -> Path:
    """A run file, whose cache is made; a student of it is trained by each test that needs one."""
    root = tmp_path_factory.mktemp("shared")
    texts = root / "somebody" / "private.jsonl"
    texts.parent.mkdir()
    shutil.copy(small_corpus["source"][0], texts)
    config = make_cache(root / "cache", teachers, {"source": [str(texts)]})
    values = {
        "corpus": small_corpus | {"source": [str(texts)]},
        "cache": {"path": str(root / "cache"), "sequences_per_shard": 5, "replicas": 2},
        "student": {"model": teachers[0]["model"]},
        "train": {"steps": 2, "batch_sequences": 4, "warmup_steps": 1, "held_out": 0.0},
    }
    values["cache"]["mask"] = config.cache.mask.model_dump(mode="json")
    values["train"]["objective"] = {"distill": [{"teachers": ["lm"]}, {"teachers": ["expert"]}]}
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    return root / "run.yaml"


@pytest.fixture
def cache(run, tmp_path) -> Path:
    shutil.copytree(run.parent / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def sent(*arguments: object) -> str:
    done = pipeline("push", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments: object, code: int = 2) -> str:
    done = pipeline("push", *arguments)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def same(one: Cache, other: Cache, teachers: Iterator[str] | list[str]) -> None:
    """Every batch of one is that of the other."""
    pairs = zip(*(c.batches(list(teachers), 5) for c in (one, other)), strict=True)
    for here, there in pairs:
        assert list(here.digests) == list(there.digests)
        np.testing.assert_array_equal(here.input_ids, there.input_ids)
        for name in teachers:
            a, b = here.targets[name], there.targets[name]
            for key, value in vars(a).items():
                if isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(value, getattr(b, key))


def places_of(content: bytes) -> list[str]:
    """What of this machine a file says."""
    words = (b"somebody", b"pytest-of", str(Path.home()).encode() + b"/", os.getcwd().encode())
    return [word.decode() for word in words if word in content]


def test_a_cache_with_its_text_is_the_same_from_the_hub(hub, run, cache, tmp_path, everything_said):
    told = sent(cache, "me/a", "--with-text", "--private")
    assert "hf://datasets/me/a" in told
    assert hub.repositories[NAME].private
    for name, content in hub.files(NAME).items():
        assert not places_of(content), name
    here, there = Cache.open(cache), Cache.open("hf://datasets/me/a")
    same(here, there, ["lm", "expert"])
    assert [e.text for e in examples(here)] == [e.text for e in examples(there)]
    assert problems("hf://datasets/me/a") == []
    assert pipeline("inspect", "hf://datasets/me/a").returncode == 0
    # Students of both are equal to the byte.
    weights = []
    for place, out in ((cache, "here"), ("hf://datasets/me/a", "there")):
        asked = ("--set", f"cache.path={place}")
        done = pipeline("train-student", run, "--out", tmp_path / out, *asked)
        assert done.returncode == 0, done.stderr
        weights.append((tmp_path / out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_what_is_sent_without_the_text_is_made_whole_by_it(hub, run, cache, tmp_path):
    """The expert's answers, the checksums; no token of the text, no rank, no masked view."""
    done = pipeline("push", cache, "me/a")
    assert done.returncode == 0, done.stderr
    assert "left out, for the text can be read" in done.stderr
    assert "lm (masked_lm" in done.stderr
    files = hub.files(NAME)
    assert not [name for name in files if name.startswith(("corpus/data", "targets/lm"))]
    assert not [name for name in files if name.startswith("views/") and "view.json" not in name]
    texts = [e.text for e in examples(Cache.open(cache))]
    for name, content in files.items():
        assert not places_of(content), name
        assert not any(text.encode() in content for text in texts), name

    lone = pipeline("verify", "hf://datasets/me/a")
    assert lone.returncode == 3
    assert "passed on without its text" in lone.stdout
    asked = ("--set", "cache.path=hf://datasets/me/a")
    lone = pipeline("train-student", run, "--out", tmp_path / "no", *asked)
    assert lone.returncode == 3
    assert "passed on without its text" in lone.stderr

    # As the card says: download it, and read the same text again, of another place.
    shared = tmp_path / "other" / "shared"
    for name, content in files.items():
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        (shared / name).write_bytes(content)
    card = files["README.md"].decode()
    lines = card.partition("# rebuild.yaml\n")[2].partition("```")[0]
    rebuild = yaml.safe_load(lines)
    corpus = yaml.safe_load(run.read_text())["corpus"]
    moved = tmp_path / "other" / rebuild["corpus"]["source"][0]
    assert moved.name == "private.jsonl"
    rebuild["cache"]["path"] = str(shared)
    rebuild["corpus"]["tokenizer"] = str(shared / "corpus" / "tokenizer")
    rebuild["corpus"]["source"] = [str(moved)]
    (tmp_path / "rebuild.yaml").write_text(yaml.safe_dump(rebuild))

    text = Path(corpus["source"][0]).read_text()
    moved.write_text(text.replace("e", "a"))
    wrong = pipeline("cache-teachers", tmp_path / "rebuild.yaml")
    assert wrong.returncode == 3
    assert "has changed" in wrong.stderr
    moved.write_text(text)
    done = pipeline("cache-teachers", tmp_path / "rebuild.yaml")
    assert done.returncode == 0, done.stderr
    assert verify_cache(str(shared)).problems == []
    same(Cache.open(cache), Cache.open(shared), ["expert"])
    assert not (shared / "corpus" / "without_text.json").exists()


def test_targets_that_tell_the_text_are_sent_when_that_is_said(hub, cache):
    assert "the text can be read" in refused(cache, "me/a", "--teacher", "lm")
    assert not hub.repositories
    sent(cache, "me/a", "--with-readable-targets")
    files = hub.files(NAME)
    assert any(name.startswith("targets/lm/data") for name in files)
    assert not any(name.startswith("corpus/data") for name in files)


def test_the_card_is_written_beside_a_finished_cache_and_keeps_what_was_added(
    cache, make_cache, teachers, run, make_teacher
):
    card = (cache / "README.md").read_text()
    about = DatasetCard(card).data
    assert about.size_categories == ["n<1K"]
    assert about.license is None
    assert "stated the licence" in card
    assert "`private.jsonl`" in card
    assert "| expert |" in card
    assert problems(cache) == []
    own = card.replace("---\n", "---\nlicense: cc-by-4.0\n", 1) + "\nMore words.\n"
    (cache / "README.md").write_text(own)
    more = make_teacher("words", "token_classification")
    corpus = {"source": yaml.safe_load(run.read_text())["corpus"]["source"]}
    make_cache(cache, [*teachers, more], corpus)
    card = (cache / "README.md").read_text()
    assert DatasetCard(card).data.license == "cc-by-4.0"
    assert "| words |" in card
    assert card.endswith("More words.\n")
    assert "stated the licence" not in card
    assert pipeline("teachers", cache, "--rename", "words", "tags").returncode == 0
    assert "| tags |" in (cache / "README.md").read_text()


def test_a_cache_that_cannot_be_written_stays_as_it_is(cache, monkeypatch):
    from rekindle.data.sharing.card import write_card
    from rekindle.data.storage.store import LocalStore

    (cache / "README.md").unlink()
    opened = Cache.open(cache)
    for writable in (False, True):
        monkeypatch.setattr(LocalStore, "writable", property(lambda store, now=writable: now))
        write_card(opened.store, opened.corpus, opened.teachers, 3)
        assert (cache / "README.md").exists() is writable


def test_an_interrupted_upload_goes_on_with_what_is_missing(hub, cache, monkeypatch):
    monkeypatch.setattr("rekindle.pipeline.sharing.hub.MOST_FILES", 4)
    hub.refuse_uploads_after(9)
    assert "goes on" in refused(cache, "me/a", "--with-text")
    assert "cache.json" not in hub.files(NAME)  # what makes it count comes last
    with pytest.raises(Exception, match="not a Rekindle cache"):
        Cache.open("hf://datasets/me/a")
    first = list(hub.stored)
    assert len(first) == 9
    hub.refuse_nothing()
    sent(cache, "me/a", "--with-text")
    assert len(hub.stored) == len({*hub.stored})  # nothing was sent twice
    assert problems("hf://datasets/me/a") == []
    before = len(hub.stored), len(hub.repositories[NAME].titles)
    assert "0 files" in sent(cache, "me/a", "--with-text")
    assert (len(hub.stored), len(hub.repositories[NAME].titles)) == before


@pytest.mark.parametrize("token", ["hf_wrong9876543210", "hf_read0123456789", None])
def test_a_token_that_will_not_do_is_refused_and_never_repeated(
    hub, cache, token, monkeypatch, everything_said
):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    done = pipeline("push", cache, "me/a", "--with-text")
    assert done.returncode == 2
    assert "token" in done.stderr
    assert not hub.repositories
    said = done.stdout + done.stderr + everything_said.text
    for one in ("hf_wrong9876543210", "hf_read0123456789", "hf_write0123456789"):
        assert one not in said


def test_the_token_is_in_nothing_that_is_said_sent_or_kept(
    hub, cache, run, tmp_path, everything_said
):
    hub.refuse = lambda method, path: 418 if path.endswith("/refs") else 0  # repeats the token
    done = [pipeline("push", cache, "me/a", "--with-text")]
    hub.refuse_nothing()
    done += [pipeline("push", cache, "me/a", "--with-text", "--json")]
    asked = ("--set", "cache.path=hf://datasets/me/a", "--set", "train.report_to=[]")
    done += [pipeline("train-student", run, "--out", tmp_path / "run", *asked)]
    done += [pipeline("push", tmp_path / "run", "me/b")]
    assert [one.returncode for one in done][1:] == [0, 0, 0], done
    token = os.environ["HF_TOKEN"]
    assert token not in "".join(one.stdout + one.stderr for one in done) + everything_said.text
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if token.encode() in path.read_bytes()]
    for name in hub.repositories:
        assert not any(token.encode() in content for content in hub.files(name).values())


def test_a_student_is_sent_with_its_card_and_used_by_its_address(hub, run, tmp_path):
    out = tmp_path / "somebody" / "student"
    assert pipeline("train-student", run, "--out", out).returncode == 0
    (out / "predictions.jsonl").write_text('{"text": "a private text"}\n')
    sent(out, "me/student", "--revision", "v2", "--message", "the second")
    files = hub.files("models/me/student", "v2")
    assert {"config.json", "model.safetensors", "heads.safetensors", "run.yaml"} <= {*files}
    assert not {"predictions.jsonl", "run.json"} & {*files}
    assert not any(name.startswith("checkpoints") for name in files)
    assert hub.repositories["models/me/student"].titles[-1] == "the second"
    for name, content in files.items():
        assert not places_of(content), name
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "fill-mask"
    assert '"me/student"' in card.content
    text = tmp_path / "rows.jsonl"
    text.write_text(json.dumps({"text": "the model guides the student"}) + "\n")
    answers = []
    for number, place in enumerate((out, "hf://me/student@v2")):
        rows = tmp_path / f"{number}.jsonl"
        asked = ("--head", "expert", "--text", text, "--out", rows)
        assert pipeline("predict", place, *asked).returncode == 0
        answers.append(rows.read_bytes())
    assert answers[0]
    assert answers[0] == answers[1]
    gone = pipeline("predict", "hf://me/student@v3", "--text", text, "--out", tmp_path / "3")
    assert gone.returncode == 2
    assert "no such revision" in gone.stderr


def test_a_cache_is_read_at_the_commit_that_it_was_opened_at(hub, cache):
    sent(cache, "me/a", "--with-text")
    first = hub.repositories[NAME].at("main")
    before = Cache.open("hf://datasets/me/a")
    assert pipeline("teachers", cache, "--remove", "lm", "--yes").returncode == 0
    told = sent(cache, "me/a", "--with-text")
    assert "removed" in told
    assert not any(name.startswith("targets/lm") for name in hub.files(NAME))
    assert next(iter(before.batches(["lm"], 4))).targets["lm"] is not None
    after = Cache.open("hf://datasets/me/a")
    assert set(after.teachers) == {"expert"}
    assert set(Cache.open(f"hf://datasets/me/a@{first}").teachers) == {"lm", "expert"}


def test_what_cannot_be_sent_is_refused_before_anything_is(hub, cache, tmp_path, make_cache, run):
    public = "me/public"
    sent(cache, public)
    asked = len(hub.repositories)
    assert "everybody can see" in refused(cache, public, "--private")
    other = tmp_path / "other"
    values = yaml.safe_load(run.read_text())
    corpus = {"source": values["corpus"]["source"], "limit_sequences": 7}
    expert = {"name": "expert", "model": values["student"]["model"], "task": "masked_lm"}
    make_cache(other, [expert], corpus)
    assert "another text" in refused(other, public, "--with-text")
    assert "no repository" in refused(cache, "one")
    assert "it is no cache (" in refused(tmp_path / "other" / "corpus", "me/x")
    assert "give one of them" in refused(tmp_path, "me/x")
    assert "no such folder" in refused(tmp_path / "nowhere", "me/x")
    assert "has no teacher" in refused(cache, "me/x", "--teacher", "experts")
    victim = next((cache / "targets" / "expert" / "data").iterdir())
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert victim.name in refused(cache, "me/x", code=3)
    next((cache / "targets" / "expert" / "commits").iterdir()).unlink()
    assert "is not finished" in refused(cache, "me/x")
    assert len(hub.repositories) == asked


def test_a_dry_run_lists_what_would_be_sent_and_asks_nobody(hub, cache):
    told = sent(cache, "me/a", "--dry-run", "--with-text")
    assert hub.requests == []
    sizes = {name: len(content) for name, content in _files_after(hub, cache).items()}
    for name, size in sizes.items():
        (line,) = [line for line in told.splitlines() if line.split("  ")[0] == name]
        assert size >= 1000 or counted(size, "byte") in line


def _files_after(hub, cache) -> dict[str, bytes]:
    sent(cache, "me/a", "--with-text")
    return hub.files(NAME)


def test_offline_and_writing_to_a_hub_are_one_message(hub, cache, run, tmp_path, monkeypatch):
    asked = ("--set", "cache.path=hf://datasets/me/a")
    written = pipeline("cache-teachers", run, *asked)
    assert written.returncode == 2
    assert "pipeline push" in written.stderr
    written = pipeline("train-student", run, "--out", "hf://me/run")
    assert written.returncode == 2
    assert "pipeline push" in written.stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = tmp_path / "rows.jsonl"
    text.write_text(json.dumps({"text": "the model guides the student"}) + "\n")
    for arguments in (
        ("verify", "hf://datasets/me/a"),
        ("push", cache, "me/a"),
        ("evaluate", "hf://me/student", "--text", text),
    ):
        done = pipeline(*arguments)
        assert done.returncode == 2
        assert "HF_HUB_OFFLINE is set" in done.stderr
    assert hub.requests == []


def test_a_copy_that_is_made_again_is_the_same_to_the_byte(hub, cache):
    def digests() -> dict[str, str]:
        sent(cache, "me/a", "--with-text")
        return {n: hashlib.sha256(c).hexdigest() for n, c in hub.files(NAME).items()}

    first = digests()
    hub.repositories.clear()
    assert digests() == first
