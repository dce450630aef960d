"""What is sent to where there was something else: nothing of that is left, nothing else removed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from rekindle.data.cache import Cache
from rekindle.data.sharing.card import END
from rekindle.pipeline.sharing import models
from rekindle.pipeline.sharing.push import _is_model_file
from rekindle.train.embedding.folder import TRANSFORMER_FILES
from testlib.caches import problems
from testlib.command import pipeline

FOREIGN = {"picture.png", "LICENSE", ".gitattributes", "notes/config.json", "1_Pooling/notes.md"}


def sent(*arguments: object) -> str:
    done = pipeline("push", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def caches(tmp_path_factory, make_cache, make_teacher, small_corpus) -> list[Path]:
    """Two caches, each of another text and another teacher."""
    root = tmp_path_factory.mktemp("two")
    made = []
    for name, labels, rows in (("first", 3, 12), ("second", 2, 7)):
        teacher = make_teacher(name, "sequence_classification", config={"num_labels": labels})
        make_cache(root / name, [teacher], {"limit_sequences": rows})
        made.append(root / name)
    return made


def test_a_new_branch_holds_the_cache_that_is_sent_there_and_nothing_of_the_main_one(
    hub, caches, monkeypatch
):
    first, second = caches
    sent(first, "me/a", "--with-text")
    main = hub.files("datasets/me/a")
    card = main["README.md"].decode()
    assert "| first |" in card

    # Interrupted after the branch was made, the same command goes on.
    monkeypatch.setattr("rekindle.pipeline.sharing.hub.MOST_FILES", 1)
    uploads = hub.refuse_uploads_after(1)
    asked = (second, "me/a", "--with-text", "--revision", "b")
    assert "goes on" in pipeline("push", *asked).stderr
    assert len(uploads) == 2
    assert "cache.json" not in hub.files("datasets/me/a", "b")
    hub.refuse_nothing()
    assert "hf://datasets/me/a@b" in sent(*asked)

    sent(second, "me/b", "--with-text")
    alone, branch = hub.files("datasets/me/b"), hub.files("datasets/me/a", "b")
    cards = [files.pop("README.md").decode() for files in (alone, branch)]
    assert branch == alone
    assert cards[1] == cards[0].replace("hf://datasets/me/b", "hf://datasets/me/a@b")
    assert "| second |" in cards[1]
    assert "first" not in cards[1].partition(END)[0]
    assert problems("hf://datasets/me/a@b") == []
    assert set(Cache.open("hf://datasets/me/a@b").teachers) == {"second"}
    assert hub.files("datasets/me/a") == main

    # A branch that is there is protected as ever.
    done = pipeline("push", first, "me/a", "--with-text", "--revision", "b")
    assert done.returncode == 2
    assert "another text" in done.stderr


def _adapter(folder: Path, whole: Path) -> Path:
    """A student that is an adapter and a sentence encoder, with every file that is sent of one."""
    for name in (
        *models._SETTINGS,
        *models._RECORDS,
        *models._UNCHANGED,
        "1_Pooling/config.json",
    ):
        if name.startswith(("LICENSE", "NOTICE", "config.json", "model.", *TRANSFORMER_FILES[1:])):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    shutil.copy(whole / "tokenizer.json", folder)
    about = {"peft_type": "LORA", "base_model_name_or_path": "me/base"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    listed = {"Transformer": "", "Pooling": "1_Pooling"}
    kind = "sentence_transformers.models."
    modules = [{"type": f"{kind}{name}", "path": path} for name, path in listed.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("adapter_model", "heads", "prompts"):
        save_file({"a": np.zeros(2, np.float32)}, folder / f"{name}.safetensors")
    (folder / "spiece.model").write_bytes(b"pieces")
    (folder / "run.yaml").write_text(yaml.safe_dump({"seed": 1}))
    (folder / "README.md").write_text("# the adapter\n")
    return folder


def test_a_model_over_another_kind_leaves_none_of_its_files(hub, make_teacher, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(make_teacher("plain", "masked_lm")["model"], whole)
    (whole / "README.md").write_text("# the whole one\n")
    adapter = _adapter(tmp_path / "adapter", whole)
    name = "models/me/m"

    sent(adapter, "me/m")
    old = {*hub.files(name)}
    assert {"1_Pooling/config.json", "heads.safetensors", "adapter_config.json"} <= old
    repository = hub.repositories[name]
    files = dict(repository.commits[repository.at("main")])
    repository.commit("main", files | dict.fromkeys(FOREIGN, files["run.yaml"]), "by hand")

    dry = sent(whole, "me/m", "--dry-run")
    assert "an earlier push has left" in dry
    (line,) = [one for one in sent(whole, "me/m").splitlines() if one.startswith("removed, ")]
    files = hub.files(name)
    ours = {one.name for one in whole.iterdir()}
    assert {*files} == ours | FOREIGN
    gone = sorted(old - ours)
    assert len(gone) > 5
    shown = line.partition(": ")[2].partition(" and ")[0].split(", ")
    assert shown == gone[: len(shown)]
    assert len(shown) == len(gone) or f"and {len(gone) - len(shown)} more file" in line
    assert files["README.md"] == b"# the whole one\n"

    # A new branch begins as the main one: what is the same there is not sent, what is not goes.
    assert "0 files, " in sent(whole, "me/m", "--revision", "v1")
    assert hub.files(name, "v1") == files
    sent(adapter, "me/m", "--revision", "v2")
    assert {*hub.files(name, "v2")} == old | FOREIGN
    assert hub.files(name, "v2")["README.md"] == b"# the adapter\n"
    assert {*hub.files(name)} == ours | FOREIGN


def test_every_file_that_is_sent_of_a_model_is_known_as_one():
    """Except for licences: people add them on the hub."""
    names = {*models._SETTINGS, *models._RECORDS, *models._UNCHANGED, "run.yaml"}
    names |= {"model.safetensors", "model-00001-of-00002.safetensors"}
    left = {name for name in names if not _is_model_file(name, ())}
    licences = {"LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"}
    assert left == licences
