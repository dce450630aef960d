"""Models in llama.cpp's format. A GGUF file is converted once to a folder as save_pretrained writes
it, and that folder is the model: everything that works for folders works for it.
"""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from rekindle.data.corpus.tokenizer_files import check_gguf, read_tokenizer_files
from rekindle.data.errors import InputError, first_words
from rekindle.data.places import home
from rekindle.data.storage.atomic import new_folder, write_json
from rekindle.data.text_files import refuse_pointer
from rekindle.train.outside.digest import digest_of
from rekindle.train.outside.quiet import quiet_transformers

log = logging.getLogger("rekindle")

RECORD_FILE = "gguf.json"  # in the folder: the file it was made from, and by what


def folder_of_gguf(path_or_id: str) -> Path:
    """Return the folder made from a GGUF file: local, or ``owner/name/file.gguf`` on the hub.

    Weights are float32, as transformers dequantises them. The folder is in ``home()``, named by the
    file's sha256, so another file of the same name is another model. Raises InputError.
    """
    file = _local_file(path_or_id)
    refuse_pointer(file)
    digest = digest_of(file).hex()
    out = home() / "gguf" / f"{file.stem}-{digest[:16]}"
    if not out.is_dir():
        with _locked(out):
            if not out.is_dir():
                _convert(file, digest, out)
    return out


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Let one process at a time convert: several may start together, and it takes much memory."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f".{out.name}.lock"), "a") as lock:
        with suppress(OSError):  # a file system without locks: two convert the same, harmlessly
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _local_file(path_or_id: str) -> Path:
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return path
    *repository, name = path_or_id.split("/")
    if path.is_absolute() or len(repository) != 2 or path_or_id.startswith((".", "~")):
        raise InputError(f"model {path_or_id!r}: no such file (and not owner/name/file.gguf)")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("/".join(repository), name))
    except Exception as error:  # the hub's client raises many kinds, all meaning "not there"
        reason = first_words(error) or type(error).__name__
        raise InputError(
            f"model {path_or_id!r} is not a local file and cannot be loaded from the hub ({reason})"
        ) from None


def _convert(file: Path, digest: str, out: Path) -> None:
    check_gguf(file)
    import torch
    import transformers

    log.info("converting %s to a folder once, in float32: %s", file.name, out)
    tokenizer = read_tokenizer_files(str(file))
    try:
        with quiet_transformers():
            model, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # many kinds: an architecture, a quantisation, a truncated file
        raise InputError(
            f"model {file} cannot be read: {first_words(error) or type(error).__name__}. Only "
            "causal language models of the families that transformers reads from GGUF are "
            "supported; otherwise give the folder that the file was made from"
        ) from None
    if missing := sorted(loading_info["missing_keys"]):
        raise InputError(
            f"model {file} lacks weights: {', '.join(missing[:5])}{', …' if missing[5:] else ''}"
        )
    # The saved model is no longer quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    with quiet_transformers(), new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made_by = {name: version(name) for name in ("transformers", "gguf")}
        write_json(folder / RECORD_FILE, {"file": file.name, "sha256": digest, "made by": made_by})
