"""Find and load model directories: local or from the hub, checked, fingerprinted, never with remote
code.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from rekindle.data.errors import InputError, RekindleError
from rekindle.data.settings import Settings
from rekindle.train.model.fitting import AUTO_CLASSES
from rekindle.train.precision import chosen_precision

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("rekindle")

# What pip calls this package. The name `rekindle` is somebody else's there.
DISTRIBUTION = "rekindle-kd"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
# What a save changes without changing the model: these stay out of the configuration's fingerprint.
VOLATILE_KEYS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
# Families of RoBERTa's kind, which number positions from pad_token_id + 1.
COUNT_PAST_PADDING = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "ibert"),
    *("longformer", "mpnet", "data2vec-text", "xmod", "luke", "esm", "lilt"),
)


def resolve_model(path_or_id: str) -> Path:
    """The local directory of a model; a hub id is downloaded (or found in the hub's cache).

    Raises InputError when it is neither.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{path} is not a model directory: it has no config.json. "
                "Give a directory written by save_pretrained"
            )
        return path
    if path.exists() or path.is_absolute() or not HUB_ID.match(path_or_id):
        raise InputError(f"model {path_or_id!r}: no such directory (and not a hub id)")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises many kinds, all meaning "not there"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model {path_or_id!r} is no local directory and cannot be loaded from the hub "
            f"({reason})"
        ) from None


def weights_fingerprint(directory: Path) -> str:
    """sha256 over the names and contents of the directory's safetensors files."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{directory} has no *.safetensors weights. Pickled weights are not loaded; save the "
            "model again with save_pretrained"
        )
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(f"{file.name}\0".encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def config_fingerprint(directory: Path) -> str:
    """sha256 over the model's configuration, less what every save writes anew."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kept = {k: v for k, v in config.items() if k not in VOLATILE_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and reports; what matters is raised by us."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(50)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def refusing(
    what: str, advice: str = "", damaged: type[RekindleError] = InputError
) -> Iterator[None]:
    """Turn what transformers raises for a model that cannot be had into one error: ``what`` cannot
    be, transformers' reason, and ``advice``. ``damaged``: the class where bytes are not weights.
    """
    try:
        with quiet_transformers():
            yield
    except SafetensorError as error:
        raise damaged(f"{what}: its weights are damaged ({error}){advice}") from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{what}: {reason}{advice}") from None


def read_config(directory: Path) -> "PretrainedConfig":
    """The configuration of a model directory, never with remote code; InputError without one."""
    from transformers import AutoConfig

    with refusing(f"{directory}/config.json cannot be used"):
        return AutoConfig.from_pretrained(str(directory), trust_remote_code=False)


def load_weights(
    directory: Path,
    auto_class: str,
    dtype: torch.dtype,
    what: str,
    advice: str = "",
    damaged: type[RekindleError] = InputError,
    **options: object,
) -> tuple["PreTrainedModel", list[str], list[str]]:
    """Load safetensors weights through a transformers Auto class, never with remote code.

    Returns the model, and the names of its weights that the directory does not have in their
    shape: those of the body, and those of a head. ``what``, ``advice`` and ``damaged`` are as of
    ``refusing``.
    """
    import transformers

    with refusing(what, advice, damaged):
        model, info = getattr(transformers, auto_class).from_pretrained(
            str(directory),
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    unset = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    body = [key for key in unset if key.startswith(f"{model.base_model_prefix}.")]
    return model, body, [key for key in unset if key not in body]


def load_model(directory: Path, auto_class: str, dtype: torch.dtype) -> nn.Module:
    """Load a teacher; every weight must come from the directory.

    Raises InputError naming the missing weights: a randomly initialised head would cache noise.
    """
    what = f"{directory} cannot be loaded as {auto_class}"
    model, *unset = load_weights(directory, auto_class, dtype, what)
    missing = sorted(unset[0] + unset[1])
    if missing:
        raise InputError(
            f"{directory} has no weights for {', '.join(missing[:4])}"
            f"{' …' if len(missing) > 4 else ''}, which {auto_class} needs: they would be random. "
            "Is the teacher's `task` right for this model?"
        )
    return model


def new_language_model(
    directory: Path, task: str, attention: str | None = None
) -> "PreTrainedModel":
    """Make random weights of the configuration in ``directory``, in float32."""
    import transformers

    config = read_config(directory)
    with refusing(f"student {directory} cannot be made as {AUTO_CLASSES[task]}"):
        # The configuration may say bfloat16, as large models' do: weights are trained in float32.
        model: PreTrainedModel = getattr(transformers, AUTO_CLASSES[task]).from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    return model


def load_language_model(
    directory: Path, task: str, attention: str | None = None
) -> "PreTrainedModel":
    """Load pre-trained weights in float32; a body without LM head gets a fresh one, and that is
    said.
    """
    what = f"student {directory} cannot be loaded as {AUTO_CLASSES[task]}"
    advice = ". To start from its configuration alone, set student.from_scratch"
    kind, dtype = AUTO_CLASSES[task], torch.float32
    model, body, head = load_weights(
        directory, kind, dtype, what, advice, attn_implementation=attention
    )
    if body:
        raise InputError(
            f"student {directory} lacks weights of its body ({', '.join(body[:3])} …); "
            "to start from random weights, set student.from_scratch"
        )
    if head:
        log.info("student: fresh LM head, %s has none", directory)
    return model


def longest_input(config: "PretrainedConfig") -> int | None:
    """Tokens that a model of this transformers configuration takes; None where nothing is said."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not limit or limit < 0:
        return None
    offset = (text.pad_token_id or 0) + 1 if text.model_type in COUNT_PAST_PADDING else 0
    return int(limit) - offset


class Placement(Settings):
    """Where and how a model runs."""

    device: str
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of ``precision``."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            self.precision
        ]


def place(precision: str) -> Placement:
    """Return the first device of this process, and the precision that ``auto`` means on it."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = "cuda:0" if kind == "cuda" else kind
    return Placement(device=device, precision=chosen_precision(precision, kind))


def package_versions() -> dict[str, str]:
    """What a run was made with; informative. Our own version is told under the import's name."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a folder on the path
        own = "not installed"
    names = ("torch", "transformers", "tokenizers", "numpy", "pyarrow")
    found = {name: version(name) for name in names}
    return {"python": platform.python_version(), "rekindle": own} | found
