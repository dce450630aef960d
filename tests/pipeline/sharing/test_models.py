"""What is sent of a model: all that it needs, and nothing of where it was made."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rekindle.data.errors import InputError
from rekindle.data.hub.places import HubPlace, hub_place
from rekindle.data.sharing import copy as sharing_copy
from rekindle.data.sharing.names import is_place, last_part
from rekindle.data.sharing.places_in_text import portable_name, replace_paths, without_places
from rekindle.data.targets.served import Served
from rekindle.pipeline.progress import SILENT
from rekindle.pipeline.sharing.contents import Asked, contents_of, model_place
from rekindle.pipeline.sharing.models import model_files, portable_record
from rekindle.train.embedding.folder import TRANSFORMER_FILES
from testlib.encoders import encoder_folder

POOLING = {"pooling_mode": "mean"}


@pytest.fixture(scope="module")
def bert(make_model, wordpiece) -> Path:
    found: Path = make_model("bert", "AutoModelForMaskedLM", wordpiece, num_hidden_layers=1)
    return found


def content(files: dict[str, Path | bytes], name: str) -> bytes:
    found = files[name]
    return found if isinstance(found, bytes) else found.read_bytes()


def sent(folder: Path, place: str = "") -> dict[str, bytes]:
    found = model_place(str(folder))
    _, files, _ = model_files(found, place or str(folder), "me/x")
    return {name: content(files, name) for name in files}


def apart(bert: Path, out: Path) -> Path:
    """A folder of sentence-transformers whose model is in a folder of its own."""
    encoder_folder(out, bert, POOLING)
    inner = out / "0_Transformer"
    inner.mkdir()
    for path in [*out.glob("*.*")]:
        if path.is_file() and path.name not in (
            "modules.json",
            "config_sentence_transformers.json",
        ):
            path.rename(inner / path.name)
    modules = json.loads((out / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (out / "modules.json").write_text(json.dumps(modules))
    return out


def test_only_the_folders_own_path_is_called_otherwise():
    text = (
        'load("/w/a"), `runs/a`. /w/a2 /w/a.b /old/runs/a runs/a-base runs/a-tone/x, "runs/a-tone" '
        "runs/a-tones runs/a."
    )
    assert replace_paths(text, {"/w/a": "me/x", "runs/a": "me/x"}, ["-tone", "-merged"]) == (
        'load("me/x"), `me/x`. /w/a2 /w/a.b /old/runs/a runs/a-base me/x-tone/x, "me/x-tone" '
        "runs/a-tones me/x."
    )
    assert replace_paths(f"load({json.dumps('/w/ü')})", {"/w/ü": "me/x"}) == 'load("me/x")'


def test_places_in_a_card_are_shortened_and_links_and_relative_names_stay():
    card = r"""---
base_model: /home/me/base
---
See [it](https://a.org/b/c), `https://a.org/b/c`, "hf://me/y", `runs/a` and a/b,
users'/doctors' own.
Of `/home/me/k`, "C:\\me\\k", 'D:/me/k', `\\srv\me\k`.
```sh
pipeline evaluate /home/me/k --test=/home/me/t.jsonl > /dev/null  # a / b
```
"""
    wanted = card
    for folder in ("/home/me/", r"C:\\me" "\\\\", "D:/me/", "\\\\srv\\me\\"):
        assert folder in wanted
        wanted = wanted.replace(folder, "")
    assert without_places(card) == wanted
    hub = "/home/me/.cache/hub/models--org--name/snapshots/0123"
    assert portable_name(hub) == "org/name"


def test_paths_of_windows_are_places_and_a_prompt_is_none():
    for place in ("C:/Users/me/x", "C:\\Users\\me\\x", "\\\\srv\\x\\x"):
        assert is_place(place)
        assert last_part(place) == "x"
    assert not is_place("a:b")
    told = {"prompt": "/home/me/q ", "model": "/home/me/q"}
    assert portable_record(told) == {"prompt": "/home/me/q ", "model": "q"}


@pytest.mark.parametrize("name", TRANSFORMER_FILES)
def test_the_length_and_case_of_an_encoder_are_sent(bert, tmp_path, name):
    folder = encoder_folder(tmp_path / "e", bert, POOLING)
    settings = {"max_seq_length": 12, "do_lower_case": True}
    (folder / "sentence_bert_config.json").unlink()
    (folder / name).write_text(json.dumps(settings))
    assert json.loads(sent(folder)[name]) == settings


def test_the_settings_of_parts_say_nothing_of_this_machine(bert, tmp_path):
    folder = apart(bert, tmp_path / "e")
    settings = folder / "0_Transformer" / "config.json"
    own = json.loads(settings.read_text())
    more = {"_name_or_path": "/home/somebody/m", "text_config": {"_name_or_path": "/somebody/n"}}
    settings.write_text(json.dumps(own | more))
    files = sent(folder)
    assert {"0_Transformer/model.safetensors", "1_Pooling/config.json"} <= {*files}
    assert not [name for name, of in files.items() if b"somebody" in of]
    kept = json.loads(files["0_Transformer/config.json"])
    assert kept == own | {"_name_or_path": "m", "text_config": {"_name_or_path": "n"}}


def _write(name: str, what: bytes):
    return lambda folder: (folder / name).write_bytes(what)


def _cut(folder: Path) -> None:
    weights = folder / "0_Transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_write("modules.json", b"{"), "modules.json is not JSON"),
        (_write("modules.json", b'["a", "b"]'), "it is a list of modules"),
        (_write("modules.json", b'{"a": 1}'), "it is a list of modules"),
        (_write("README.md", b"a \xff b"), "README.md is not text in UTF-8"),
        (_write("run.yaml", b"a: \xff"), "run.yaml is not text in UTF-8"),
        (lambda folder: (folder / "0_Transformer" / "model.safetensors").unlink(), "no \\*.safet"),
        (_cut, "damaged or truncated"),
    ],
)
def test_a_bad_folder_of_a_model_is_refused_in_one_message(bert, tmp_path, spoil, told):
    folder = apart(bert, tmp_path / "e")
    spoil(folder)
    with pytest.raises(InputError, match=told):
        sent(folder)


def test_a_teacher_that_is_known_by_a_place_of_its_server_is_refused(monkeypatch):
    for model, refused in (("/home/me/m", True), ("org/m", False)):
        info = SimpleNamespace(imported=None, served=Served(model=model, probes=()))
        monkeypatch.setattr(sharing_copy, "read_parts", lambda *_, info=info: (info,))
        if refused:
            with pytest.raises(InputError, match=r"/home/me/m.*--served-model-name.*--teacher"):
                sharing_copy._check_identities(None, ["t"])
        else:
            sharing_copy._check_identities(None, ["t"])


@pytest.fixture(scope="module")
def cache(make_cache, make_teacher, tmp_path_factory) -> Path:
    found: Path = tmp_path_factory.mktemp("branches") / "cache"
    make_cache(found, [make_teacher("expert", "sequence_classification")])
    return found


@pytest.mark.parametrize("branch", ["feature/a", "refs/pr/2"])
def test_the_card_of_a_branch_has_addresses_that_are_read_as_that_branch(cache, branch):
    def card(with_text: bool) -> str:
        asked = Asked(str(cache), "me/x", branch, with_text=with_text)
        with contents_of(asked, SILENT, lambda kind: None) as found:
            return content(found.files, "README.md").decode()

    address = card(True).partition('Cache.open("')[2].partition('"')[0]
    assert hub_place(address) == HubPlace("dataset", "me/x", branch, "")
    command = f"hf download me/x --repo-type dataset --revision {branch} --local-dir shared"
    assert command in card(False).splitlines()
