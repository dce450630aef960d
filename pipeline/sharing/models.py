"""The files of a model that are sent: what it needs, its card, and how it was made; nothing else.

Checkpoints, logs, and answers to single texts (``predictions.jsonl``) stay here. What is sent says
nothing of this machine.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rekindle.data.errors import InputError
from rekindle.data.sharing.card import licence_of
from rekindle.data.sharing.copy import portable_config
from rekindle.data.sharing.names import is_place, last_part, portable
from rekindle.data.sharing.places_in_text import portable_name, replace_paths, without_places
from rekindle.pipeline.yaml_text import parse_yaml
from rekindle.train.embedding.folder import (
    ABOUT_ENCODER,
    MODULES_FILE,
    TRANSFORMER_FILES,
    is_encoder_folder,
    read_encoder_folder,
)
from rekindle.train.export.card import CARD_FILE, file_name
from rekindle.train.model.folder import (
    ABOUT_FILE,
    ADAPTER_FILE,
    SETTINGS_FILE,
    own_files,
    read_object,
)

# As save_pretrained writes them: settings, whose keys of paths are made portable.
_SETTINGS = (SETTINGS_FILE, "generation_config.json", "tokenizer_config.json", ADAPTER_FILE)
_AS_THEY_ARE = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "chat_template.jinja", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"),
    *(MODULES_FILE, ABOUT_ENCODER, *TRANSFORMER_FILES),  # of sentence-transformers
    *("model.safetensors.index.json", "metrics.jsonl"),
)
_MODELS = ("*.model",)  # of sentencepiece
_OF_PARTS = ("*.json", "*.safetensors", "*.txt", *_MODELS)
_RECORDS = (ABOUT_FILE, "metrics.json", "summary.json", "export.json")  # of ours


def model_files(
    folder: Path, place: str, repo: str
) -> tuple[str, dict[str, Path | bytes], list[str]]:
    """What the model in ``folder`` is (student, expert, model), the files that are sent by their
    names, and what is said of it. ``place``: as it was given; ``repo``: where it goes.
    """
    files: dict[str, Path | bytes] = {}
    told: list[str] = []
    for path in own_files(folder) if (folder / SETTINGS_FILE).is_file() or _adapter(folder) else ():
        files[path.name] = path
    for name, path in _parts(folder):
        files[name] = path if _is_as_it_is(path) else _portable_json(path, whole=False)
    for name in _AS_THEY_ARE:
        if (folder / name).is_file():
            files[name] = folder / name
    for pattern in _MODELS:
        files |= {path.name: path for path in folder.glob(pattern)}
    for name in (*_SETTINGS, *_RECORDS):
        if (folder / name).is_file():
            files[name] = _portable_json(folder / name, whole=name in _RECORDS)
    if (run := folder / "run.yaml").is_file():
        files[run.name] = _portable_yaml(run)
    card = _card(folder, place, repo)
    files[CARD_FILE] = card.encode()
    if licence_of(card) is None:
        told.append(
            f"its card names no licence: put `license: …` into the block at the top of "
            f"{place}/{CARD_FILE}, and send it again"
        )
    told += _told_of_base(folder)
    return _kind(folder), dict(sorted(files.items())), told


def _adapter(folder: Path) -> bool:
    return (folder / ADAPTER_FILE).is_file()


def _kind(folder: Path) -> str:
    if (folder / ABOUT_FILE).is_file():
        return "student"
    metrics = folder / "metrics.json"
    return "expert" if metrics.is_file() and b"finetune" in metrics.read_bytes() else "model"


def _parts(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of the parts of a sentence encoder, in folders of their own, with their names."""
    if not is_encoder_folder(folder):
        return
    read_encoder_folder(folder)  # refuses what is no list of modules, and places outside
    for module in json.loads((folder / MODULES_FILE).read_bytes()):
        name = Path(os.path.normpath(module["path"]))
        for pattern in _OF_PARTS if name.parts else ():  # the folder itself has none: Path(".")
            for path in sorted((folder / name).glob(pattern)):
                yield (name / path.name).as_posix(), path


def _is_as_it_is(path: Path) -> bool:
    return path.suffix != ".json" or path.name in _AS_THEY_ARE


def _portable_json(path: Path, whole: bool) -> Path | bytes:
    """A file of settings without the places in it: of our records all, of others' those of keys
    that are paths. The file itself where it names none.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise InputError(
            f"{path} is not JSON: it is damaged. Copy it again, or mend it. Nothing was sent"
        ) from None
    found = portable_record(values) if whole else portable_config(values)
    if found == values:
        return path
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()


_WORDS = (
    *("label_names", "labels", "domains", "class_counts", "dropped", "heads", "positive"),
    "prompt",
)


def portable_record(value: Any) -> Any:
    """As ``portable``, but that names of labels and domains, and what is put before a text, stay,
    whatever they look like.
    """
    if isinstance(value, dict):
        return {
            str(portable(key)): one if key in _WORDS else portable_record(one)
            for key, one in value.items()
        }
    return [portable_record(one) for one in value] if isinstance(value, list) else portable(value)


def _portable_yaml(path: Path) -> bytes:
    values = parse_yaml(_text(path), str(path))
    text: str = yaml.safe_dump(portable_record(values), sort_keys=False, allow_unicode=True)
    return text.encode()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text in UTF-8 (its byte {error.start:,} is not): save it as UTF-8, or "
            "move it out of the folder. Nothing was sent"
        ) from None


def _card(folder: Path, place: str, repo: str) -> str:
    """The card that lies there, in which the folder has the name of the repository, its merged copy
    and its exports likewise, and other places are their last parts.
    """
    path = folder / CARD_FILE
    card = _text(path) if path.is_file() else f"# {last_part(repo)}\n"
    own = {str(folder), str(folder.absolute()), str(folder.resolve()), place, place.rstrip("/")}
    # Cards of other trainers name the base in their sentences, too.
    names = {base: portable_name(base) for base in _bases(folder) if is_place(base)}
    names |= {name: repo for name in own if is_place(name) or "/" in name}
    about = read_object(folder / ABOUT_FILE) if (folder / ABOUT_FILE).is_file() else {}
    heads = about.get("heads")
    exports = [f"-{file_name(head)}" for head in heads] if isinstance(heads, dict) else []
    return without_places(replace_paths(card, names, ["-merged", *exports]))


def _bases(folder: Path) -> Iterator[str]:
    """The models that the settings of this one name."""
    for name, key in ((ADAPTER_FILE, "base_model_name_or_path"), (SETTINGS_FILE, "_name_or_path")):
        found = read_object(folder / name).get(key) if (folder / name).is_file() else None
        if isinstance(found, str):
            yield found
            if is_place(found):
                yield str(Path(found).expanduser().resolve())


def _told_of_base(folder: Path) -> Iterator[str]:
    """Of an adapter whose base is a folder of ours."""
    if not _adapter(folder):
        return
    base = read_object(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if isinstance(base, str) and (is_place(base) or Path(base).exists()):
        yield (
            f"it is an adapter, and its base is a folder of this machine ({last_part(base)}): "
            "others need it, too. Send it, and put its id into base_model_name_or_path in "
            f"{ADAPTER_FILE}; or send what `pipeline merge-adapter` makes"
        )
