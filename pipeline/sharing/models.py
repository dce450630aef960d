"""Choose the files of a model that are sent: what it needs, its card, and how it was made.

Checkpoints, logs and answers to single texts (``predictions.jsonl``) are not sent. The sent files
name no path of this machine.
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
    CONFIG_FILE,
    own_files,
    read_object,
)

# Settings that save_pretrained writes; only their keys that hold paths are made portable.
_SETTINGS = (CONFIG_FILE, "generation_config.json", "tokenizer_config.json", ADAPTER_FILE)
_UNCHANGED = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "chat_template.jinja", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE"),
    *(MODULES_FILE, ABOUT_ENCODER, *TRANSFORMER_FILES),  # of sentence-transformers
    *("model.safetensors.index.json", "metrics.jsonl"),
)
_TOKENIZER_MODELS = ("*.model",)  # of sentencepiece
_MODULE_PATTERNS = ("*.json", "*.safetensors", "*.txt", *_TOKENIZER_MODELS)
_RECORDS = (ABOUT_FILE, "metrics.json", "summary.json", "export.json")  # written by Rekindle


def model_files(
    folder: Path, place: str, repo: str
) -> tuple[str, dict[str, Path | bytes], list[str]]:
    """Return the kind of the model in ``folder`` (student, expert, model), the files that are sent,
    by name, and messages for the user.

    ``place``: the folder as the user gave it; ``repo``: the repository it is sent to.
    """
    files: dict[str, Path | bytes] = {}
    messages: list[str] = []
    if (folder / CONFIG_FILE).is_file() or _is_adapter(folder):
        files |= {path.name: path for path in own_files(folder)}
    for name, path in _module_files(folder):
        files[name] = path if _is_sent_unchanged(path) else _portable_json(path, is_record=False)
    for name in _UNCHANGED:
        if (folder / name).is_file():
            files[name] = folder / name
    for pattern in _TOKENIZER_MODELS:
        files |= {path.name: path for path in folder.glob(pattern)}
    for name in (*_SETTINGS, *_RECORDS):
        if (folder / name).is_file():
            files[name] = _portable_json(folder / name, is_record=name in _RECORDS)
    if (run := folder / "run.yaml").is_file():
        files[run.name] = _portable_yaml(run)
    card = _card(folder, place, repo)
    files[CARD_FILE] = card.encode()
    if licence_of(card) is None:
        messages.append(
            f"its card names no licence: put `license: …` into the block at the top of "
            f"{place}/{CARD_FILE}, and send it again"
        )
    messages += _base_messages(folder)
    return _model_kind(folder), dict(sorted(files.items())), messages


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_FILE).is_file()


def _model_kind(folder: Path) -> str:
    if (folder / ABOUT_FILE).is_file():
        return "student"
    metrics = folder / "metrics.json"
    return "expert" if metrics.is_file() and b"finetune" in metrics.read_bytes() else "model"


def _module_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files in the module folders of a sentence encoder, with their names."""
    if not is_encoder_folder(folder):
        return
    read_encoder_folder(folder)  # refuses a bad list of modules, and paths outside the folder
    for module in json.loads((folder / MODULES_FILE).read_bytes()):
        name = Path(os.path.normpath(module["path"]))
        for pattern in _MODULE_PATTERNS if name.parts else ():  # no parts: the folder itself
            for path in sorted((folder / name).glob(pattern)):
                yield (name / path.name).as_posix(), path


def _is_sent_unchanged(path: Path) -> bool:
    return path.suffix != ".json" or path.name in _UNCHANGED


def _portable_json(path: Path, is_record: bool) -> Path | bytes:
    """Return a JSON file without the paths in it: all paths of our own records, and of other
    files those under keys that hold paths. Return the file itself if it has none.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise InputError(
            f"{path} is not JSON: it is damaged. Copy it again, or repair it. Nothing was sent"
        ) from None
    without_paths = portable_record(values) if is_record else portable_config(values)
    if without_paths == values:
        return path
    return (json.dumps(without_paths, indent=1, ensure_ascii=False) + "\n").encode()


_KEPT_KEYS = (
    *("label_names", "labels", "domains", "class_counts", "dropped", "heads", "positive"),
    "prompt",
)


def portable_record(value: Any) -> Any:
    """Return ``value`` as ``portable`` does, but leave the names of labels and domains and the
    prompts as they are, even if they look like paths.
    """
    if isinstance(value, dict):
        return {
            str(portable(key)): one if key in _KEPT_KEYS else portable_record(one)
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
    """Return the card in the folder with the name of the repository in place of the folder's path,
    its merged copy's and its exports', and with only the last part of all other paths.
    """
    path = folder / CARD_FILE
    card = _text(path) if path.is_file() else f"# {last_part(repo)}\n"
    paths = {str(folder), str(folder.absolute()), str(folder.resolve()), place, place.rstrip("/")}
    # Cards of other trainers name the base model in their sentences, too.
    names = {base: portable_name(base) for base in _base_models(folder) if is_place(base)}
    names |= {path: repo for path in paths if is_place(path) or "/" in path}
    about = read_object(folder / ABOUT_FILE) if (folder / ABOUT_FILE).is_file() else {}
    heads = about.get("heads")
    exports = [f"-{file_name(head)}" for head in heads] if isinstance(heads, dict) else []
    return without_places(replace_paths(card, names, ["-merged", *exports]))


def _base_models(folder: Path) -> Iterator[str]:
    """Yield the models that this one's settings name, and the resolved paths of local ones."""
    for name, key in ((ADAPTER_FILE, "base_model_name_or_path"), (CONFIG_FILE, "_name_or_path")):
        base = read_object(folder / name).get(key) if (folder / name).is_file() else None
        if isinstance(base, str):
            yield base
            if is_place(base):
                yield str(Path(base).expanduser().resolve())


def _base_messages(folder: Path) -> Iterator[str]:
    """Yield a message about an adapter whose base is a local folder."""
    if not _is_adapter(folder):
        return
    base = read_object(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if isinstance(base, str) and (is_place(base) or Path(base).exists()):
        yield (
            f"it is an adapter, and its base is a folder of this machine ({last_part(base)}), "
            "which others need, too. Send the base, and put its id into base_model_name_or_path "
            f"in {ADAPTER_FILE}; or send what `pipeline merge-adapter` makes"
        )
