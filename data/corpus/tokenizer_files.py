"""The files of a tokenizer: which are needed, what reads them, and what is wrong with them.

The only module of ``data`` that uses transformers, and only inside functions: importing it imports
neither transformers nor torch.
"""

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from rekindle.data.errors import InputError
from rekindle.data.hub.places import hub_folder, is_hub
from rekindle.data.text_files import refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PIECES = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")
_AUTO_FILES = ("tokenizer.json", "tokenizer_config.json", *_PIECES)
_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
)
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def has_tokenizer_files(path: str | Path) -> bool:
    """Return whether ``path`` is a local directory in which ``load_tokenizer`` finds a
    tokenizer.
    """
    directory = Path(path)
    file_sets = [*((name,) for name in _AUTO_FILES), *_BARE_FILES]
    return any(_all_exist(directory, names) for names in file_sets)


def _all_exist(directory: Path, names: tuple[str, ...]) -> bool:
    return all((directory / name).is_file() for name in names)


def read_tokenizer_files(path_or_id: str) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a local directory or of a Hugging Face id, as ``load_tokenizer``
    says.
    """
    if is_hub(path_or_id):
        path_or_id = str(hub_folder(path_or_id))
    directory = Path(path_or_id).expanduser()
    if directory.is_dir():
        return _load_directory(directory)
    if is_gguf(path_or_id) and directory.is_file():
        check_gguf(directory)
        return _load_auto(str(directory.parent), gguf_file=directory.name)
    if directory.exists() or path_or_id.startswith(("/", ".", "~")) or path_or_id.count("/") > 1:
        raise InputError(
            f"tokenizer {path_or_id!r}: no such directory; give the directory that holds the "
            f"tokenizer's files, or a Hugging Face id"
        )
    return _load_auto(path_or_id)


def _load_directory(directory: Path) -> "PreTrainedTokenizerFast":
    for path in directory.iterdir():
        if path.is_file() and path.suffix in (".json", ".model", ".txt", ".bpe"):
            refuse_pointer(path)
    if not has_tokenizer_files(directory):
        raise InputError(
            f"tokenizer directory {directory} has no tokenizer files; it must hold tokenizer.json "
            f"(or what else AutoTokenizer reads), vocab.txt, encoder.json + vocab.bpe, or "
            f"vocab.json + merges.txt"
        )
    if any((directory / name).is_file() for name in (*_AUTO_FILES, "config.json")):
        _check_pieces(directory)
        _check_values(directory / "tokenizer_config.json")
        return _load_auto(str(directory))
    names = next(names for names in _BARE_FILES if _all_exist(directory, names))
    return _BARE_FILES[names](*(directory / name for name in names))


_FLAGS = re.compile("do_lower_case|strip_accents|tokenize_chinese_chars|add_(bos|eos)_token")


def _check_values(file: Path) -> None:
    """Raise InputError, naming the key, for values of tokenizer_config.json that transformers
    accepts unchecked, or fails on without naming them; invalid JSON is reported later.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    for key, value in content.items() if isinstance(content, dict) else ():
        rule = ""
        if _FLAGS.fullmatch(key) and not isinstance(value, bool | NoneType):
            rule = "true or false"
        if key == "tokenizer_class" and not isinstance(value, str | NoneType):
            rule = "the name of a class"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "model_max_length" and value is not None and not (is_number and value >= 1):
            rule = "a number of tokens"
        if rule:
            raise InputError(f"{file}: {key} is {value!r:.200}; it must be {rule}")


def is_gguf(path: str | Path) -> bool:
    """Return whether a path, or an id on the hub, names a file in llama.cpp's format."""
    return str(path).lower().endswith(".gguf")


def check_gguf(file: Path) -> None:
    """Raise InputError if a file is not GGUF, or nothing can read it."""
    refuse_pointer(file)
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file: it does not begin with GGUF")
    if find_spec("gguf") is None:
        raise InputError(
            f"{file} is a GGUF file, and the package gguf, which reads it, is not installed. "
            "Install the extra, in Rekindle's checkout: pip install -e '.[gguf]'"
        )


def _load_auto(path_or_id: str, gguf_file: str | None = None) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        hf = AutoTokenizer.from_pretrained(
            path_or_id, use_fast=True, trust_remote_code=False, **options
        )
    except Exception as error:  # the library's errors share no base; all mean: not to be had
        reason = " ".join(str(error).split())
        if gguf_file is not None:
            raise InputError(
                f"{path_or_id}/{gguf_file} cannot be read: {reason}; is it truncated, or part of "
                "a split file? Otherwise give the folder that it was made from"
            ) from error
        _raise_for_bad_file(Path(path_or_id))
        if find_spec("sentencepiece") is None and re.search("tiktoken|(?i:sentencepiece)", reason):
            raise InputError(f"tokenizer {path_or_id!r} {_NEEDS_PIECES}") from None
        raise InputError(
            f"tokenizer {path_or_id!r} cannot be loaded: {reason}; give a directory with the "
            f"tokenizer's files, or an id that is on the hub or in the local cache"
        ) from error
    if not hf.is_fast:
        raise InputError(
            f"tokenizer {path_or_id!r} has no fast implementation ({type(hf).__name__} gives no "
            f"character offsets); convert it to tokenizer.json with the tokenizers library"
        )
    return hf


_NEEDS_PIECES = (
    "is a sentencepiece model, and the package sentencepiece, which reads it, is not installed. "
    "Install the extra, in Rekindle's checkout: pip install -e '.[sentencepiece]'; or give a "
    "directory with a tokenizer.json, which needs no package"
)


def _check_pieces(directory: Path) -> None:
    """Raise InputError if there is only a sentencepiece model, and nothing to read it.

    transformers would take it for a tiktoken file, and ask for that package.
    """
    if (directory / "tokenizer.json").is_file() or find_spec("sentencepiece") is not None:
        return
    for path in filter(Path.is_file, (directory / name for name in _PIECES)):
        with path.open("rb") as file:
            # sentencepiece's message begins so; tiktoken's files are lines
            if file.read(1) == b"\n":
                raise InputError(f"tokenizer {path} {_NEEDS_PIECES}")


def _raise_for_bad_file(directory: Path) -> None:
    """Raise InputError, naming the file, if one of those that transformers reads is not a JSON
    object, tokenizer.json is not a tokenizer, or config.json not a configuration: the tokenizer
    needs it too.
    """
    from tokenizers import Tokenizer
    from transformers import AutoConfig

    for path in filter(Path.is_file, (directory / name for name in _JSON_FILES)):
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:  # also for bytes that are not UTF-8
            raise InputError(
                f"{path} is not JSON ({error}); give the file as it was saved"
            ) from None
        if not isinstance(content, dict):
            raise InputError(
                f"{path} holds {type(content).__name__}, not an object; give the file as it was "
                "saved"
            )
    if (file := directory / "tokenizer.json").is_file():
        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # it has no class of its own
            reason = " ".join(str(error).split())
            raise InputError(
                f"{file} is not a tokenizer of the tokenizers library: {reason}; give the file as "
                "it was saved"
            ) from None
    if (directory / "config.json").is_file():
        try:
            AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        except Exception as error:
            raise InputError(
                f"{directory}/config.json cannot be used: {' '.join(str(error).split())}. "
                "transformers reads it for the tokenizer, too; repair it, or remove it from the "
                "tokenizer's directory"
            ) from None


def _load_wordpiece(path: Path) -> "PreTrainedTokenizerFast":
    from transformers import BertTokenizerFast

    tokens = path.read_text(encoding="utf-8").split("\n")
    missing = [token for token in _BERT_SPECIALS if token not in tokens]
    if missing:  # transformers would add them at the end and change the vocabulary's size
        raise InputError(
            f"{path} is not a BERT vocabulary: it lacks {', '.join(missing)}; give the directory "
            "with tokenizer.json instead"
        )
    words = (token for token in tokens if not (token.startswith("[") and token.endswith("]")))
    is_cased = bool(re.search("[A-Z]", "\n".join(words)))
    return BertTokenizerFast(vocab=str(path), do_lower_case=not is_cased)


def _load_byte_level(vocabulary: Path, merges: Path) -> "PreTrainedTokenizerFast":
    from transformers import GPT2TokenizerFast

    if "<|endoftext|>" not in json.loads(vocabulary.read_text(encoding="utf-8")):
        raise InputError(
            f"{vocabulary} is not a GPT-2 vocabulary: it lacks <|endoftext|>; give the directory "
            "with tokenizer.json instead"
        )
    return GPT2TokenizerFast(vocab=str(vocabulary), merges=str(merges))


# Vocabulary files that suffice alone, and their readers.
_BARE_FILES: dict[tuple[str, ...], Callable[..., "PreTrainedTokenizerFast"]] = {
    ("vocab.txt",): _load_wordpiece,
    ("encoder.json", "vocab.bpe"): _load_byte_level,
    ("vocab.json", "merges.txt"): _load_byte_level,
}
