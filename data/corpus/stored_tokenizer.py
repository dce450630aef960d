"""The tokenizer beside a corpus, ``corpus/tokenizer/``, and the checksums of its files."""

import hashlib
import tempfile
from pathlib import Path

from rekindle.data.corpus.config import TokenizerFacts
from rekindle.data.corpus.tokenizer import Tokenizer, load_tokenizer
from rekindle.data.errors import CacheFormatError, CacheMismatchError
from rekindle.data.storage.base import Store
from rekindle.data.storage.seal import REPAIR, read_sealed, seal

TOKENIZER = "corpus/tokenizer"
TOKENIZER_FILES = "corpus/tokenizer.json"  # their sha256


def read_tokenizer(store: Store, facts: TokenizerFacts) -> Tokenizer:
    """Return the stored tokenizer, which ``facts`` describe.

    Raises CacheFormatError for damaged files, CacheMismatchError for those of another tokenizer.
    """
    for error in damaged_tokenizer_files(store).values():
        raise error
    with tempfile.TemporaryDirectory() as folder:
        for name in store.names(TOKENIZER):
            (Path(folder) / name).write_bytes(store.read_bytes(f"{TOKENIZER}/{name}"))
        tokenizer = load_tokenizer(folder)
    if tokenizer.digest != facts["digest"]:
        raise CacheMismatchError(
            f"{store.location}/{TOKENIZER} is not the tokenizer the corpus was made with"
        )
    return tokenizer


def damaged_tokenizer_files(store: Store) -> dict[str, CacheFormatError]:
    """Return what is wrong with the stored tokenizer's files, by name. Format 1 has no
    checksums.
    """
    try:
        recorded = read_sealed(store, TOKENIZER_FILES)
    except FileNotFoundError:
        return {}
    except CacheFormatError as error:
        return {TOKENIZER_FILES: error}
    damaged = {}
    for name, sha256 in recorded.items():
        path = f"{TOKENIZER}/{name}"
        try:
            is_intact = hashlib.sha256(store.read_bytes(path)).hexdigest() == sha256
        except (OSError, CacheFormatError):  # a folder, or an invalid name
            is_intact = False
        if not is_intact:
            damaged[path] = CacheFormatError(f"{store.location}/{path} is damaged. {REPAIR}")
    return damaged


def save_tokenizer(store: Store, tokenizer: Tokenizer) -> None:
    """Store the tokenizer's files that are missing or damaged."""
    if store.exists(TOKENIZER_FILES) and not damaged_tokenizer_files(store):
        return
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for file in sorted(f for f in Path(folder).iterdir() if f.is_file()):
            store.create(f"{TOKENIZER}/{file.name}", file.read_bytes())
            stored = store.read_bytes(f"{TOKENIZER}/{file.name}")
            files[file.name] = hashlib.sha256(stored).hexdigest()
    content = seal(files)
    if not store.create(TOKENIZER_FILES, content) and store.read_bytes(TOKENIZER_FILES) != content:
        store.replace(TOKENIZER_FILES, content)  # another version of the library saves differently


def check_gaps(store: Store, recorded: TokenizerFacts, current: TokenizerFacts) -> None:
    """Raise CacheMismatchError if the ``recorded`` facts come from a version that took the number
    of tokens for one past the largest id: text with larger ids is lost to it.
    """
    if recorded["digest"] == current["digest"] and "holes" in current and "holes" not in recorded:
        raise CacheMismatchError(
            f"{store.location} was made by an earlier version of Rekindle with a tokenizer that "
            f"has gaps in its ids: it took {recorded['size']:,} for one past the largest id, which "
            f"is {current['size']:,}. What it holds of text with smaller ids is read as it was "
            "made; it cannot be added to. Make the cache again under another cache.path"
        )
