"""A folder of sentence-transformers, by its files: which steps lead from a text to a vector.

``modules.json`` lists them: a transformer, pooling, and what follows. The package is not needed,
and code of the folder is not run: a step not known here is refused by its name. Does not import
torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rekindle.data.errors import InputError
from rekindle.train.model.folder import (
    WEIGHTS_FILE,
    check_folder,
    read_header,
    read_object,
)
from rekindle.train.outside.digest import digest_of

MODULES_FILE = "modules.json"
ABOUT_ENCODER = "config_sentence_transformers.json"
# Names of the first module's own file in various versions.
TRANSFORMER_FILES = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
POOLINGS = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")
# Former settings of pooling: a key for each mode. Several are concatenated in this order.
POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
AFTER = ("Dense", "Normalize", "LayerNorm", "Dropout")  # modules that may come after pooling
KNOWN = f"Transformer, Pooling, {', '.join(AFTER)}"
TANH = "torch.nn.modules.activation.Tanh"  # for a Dense that names no activation


@dataclass(frozen=True)
class Step:
    """A step applied to vectors after pooling."""

    kind: str  # Dense, Normalize or LayerNorm
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None


NORMALIZE = Step("Normalize")


@dataclass(frozen=True)
class EncoderFolder:
    """How a text becomes a vector, and where the model for it is."""

    transformer: Path  # the folder of the model and its tokenizer
    pooling: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    max_length: int | None = None  # tokens that it reads; None: as many as the model takes
    lower_case: bool = False
    prompt: str = ""  # put before each text
    skips_prompt: bool = False  # whether pooling leaves the prompt out
    dimensions: int | None = None  # keep only so many values of a vector; None: all
    prompts: Mapping[str, str] = field(default_factory=dict)  # the prompts that it has, by name
    pooled: int | None = None  # the width of states that pooling says it takes

    @property
    def normalised(self) -> bool:
        """Return whether its vectors have length 1."""
        return bool(self.steps) and self.steps[-1] == NORMALIZE and self.dimensions is None

    @property
    def pooling_name(self) -> str:
        """Return the modes of pooling in one word."""
        return "+".join(self.pooling)

    def width(self, hidden_size: int) -> int:
        """Return D, the values of a vector, for a model with such hidden states.

        Raises InputError if the steps do not fit each other.
        """
        if self.pooled not in (None, hidden_size):
            raise InputError(
                f"{self.transformer}: its pooling takes states of {self.pooled} values, but its "
                f"model gives {hidden_size}; save the folder again as sentence-transformers does"
            )
        width = hidden_size * len(self.pooling)
        for step in self.steps:
            input_width = step.settings.get("in_features", step.settings.get("dimension", width))
            if input_width != width:
                raise InputError(
                    f"{self.transformer}: its {step.kind} takes vectors of {input_width} values "
                    f"but is given {width}; save the folder again as sentence-transformers does"
                )
            width = step.settings.get("out_features", width)
        return width if self.dimensions is None else min(width, self.dimensions)

    @property
    def fingerprint(self) -> str:
        """Return a digest of all that decides the vectors besides the model and its tokenizer."""
        steps = [
            [step.kind, dict(step.settings), step.weights and digest_of(step.weights).hex()]
            for step in self.steps
        ]
        values = [self.pooling, steps, self.max_length, self.lower_case, self.prompt]
        canonical = json.dumps([*values, self.skips_prompt, self.dimensions], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def is_encoder_folder(directory: Path) -> bool:
    """Return whether sentence-transformers wrote the folder."""
    return (directory / MODULES_FILE).is_file()


def check_encoder_folder(directory: Path) -> None:
    """Raise InputError unless the folder holds a model, or modules that begin with one."""
    check_folder(
        read_encoder_folder(directory).transformer if is_encoder_folder(directory) else directory
    )


def plain_encoder(
    directory: Path, pooling: str, normalise: bool, prompt: str = ""
) -> EncoderFolder:
    """Return the settings given for a model without modules."""
    steps = (NORMALIZE,) if normalise else ()
    return EncoderFolder(directory, (pooling,), steps, prompt=prompt)


def read_encoder_folder(directory: Path, prompt: str | None = None) -> EncoderFolder:
    """Read a folder of sentence-transformers; ``prompt`` replaces its default one.

    Raises InputError, naming the module, for an unknown one, or an unusual order.
    """
    modules = _modules(directory)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or {*kinds[2:]} - {*AFTER}:
        raise InputError(
            f"{directory}: its modules are {', '.join(kinds)}; supported are a Transformer, "
            f"Pooling, and any of {', '.join(AFTER)} after them, in this order"
        )
    (_, transformer), (_, pooling), *later_modules = modules
    config = _optional(directory / ABOUT_ENCODER)
    if (model_type := config.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise InputError(
            f"{directory} is a {model_type}, which gives no vector of a text; give the folder of a "
            "SentenceTransformer"
        )
    settings = _transformer_settings(transformer)
    modes, skips_prompt, pooled = _pooling(pooling)
    steps = (_step(kind, folder) for kind, folder in later_modules if kind != "Dropout")
    prompts = {k: v for k, v in (config.get("prompts") or {}).items() if v}
    chosen_prompt = (
        prompts.get(config.get("default_prompt_name") or "", "") if prompt is None else prompt
    )
    return EncoderFolder(
        transformer=transformer,
        pooling=modes,
        steps=tuple(steps),
        max_length=_count(settings, "max_seq_length", transformer),
        lower_case=bool(settings.get("do_lower_case", False)),
        prompt=chosen_prompt,
        skips_prompt=skips_prompt,
        dimensions=_count(config, "truncate_dim", directory),
        prompts=prompts,
        pooled=pooled,
    )


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """Return the name of each module's class, and its folder."""
    path = directory / MODULES_FILE
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); copy the folder again") from None
    rule = 'it is a list of modules: [{"type": "sentence_transformers.models.Pooling", "path": …}]'
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path} was not written by sentence-transformers: {rule}")
    modules = []
    for number, entry in enumerate(entries):
        kind, place = entry.get("type"), entry.get("path")
        if not isinstance(kind, str) or not isinstance(place, str):
            raise InputError(f"{path}: module {number} has no type or no path; {rule}")
        package, _, name = kind.rpartition(".")
        is_known_package = package.split(".")[0] == "sentence_transformers"
        if not is_known_package or name not in ("Transformer", "Pooling", *AFTER):
            origin_text = "" if is_known_package else ", code of another package, which is not run"
            raise InputError(
                f"{path}: module {number} is {kind}{origin_text}. Known are {KNOWN} of "
                "sentence-transformers; give an encoder with only these"
            )
        folder = (directory / place).resolve()
        if not folder.is_relative_to(directory.resolve()):
            raise InputError(f"{path}: module {number} is outside its folder ({place})")
        modules.append((name, directory / place if place else directory))
    return modules


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _count(settings: Mapping[str, Any], key: str, source: Path) -> int | None:
    """Return a number of 1 or more, if one is given."""
    value = settings.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(f"{source}: {key} is {value!r}; it is a number of 1 or more")
    return value


def _transformer_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the first module beside its config.json."""
    file = next((folder / name for name in TRANSFORMER_FILES if (folder / name).is_file()), None)
    settings = {} if file is None else read_object(file)
    task = settings.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise InputError(f"{file}: transformer_task {task!r} gives no states of tokens to pool")
    text = (settings.get("modality_config") or {}).get("text", {})
    output = (text.get("method", "forward"), text.get("method_output_name", "last_hidden_state"))
    if output != ("forward", "last_hidden_state") or (settings.get("modality_config") and not text):
        raise InputError(
            f"{file}: its modality_config reads no text, or takes {'.'.join(map(str, output))}; "
            "supported are encoders of texts by their last_hidden_state"
        )
    for key in ("processing_kwargs", "query_expansion"):
        if settings.get(key):
            raise InputError(f"{file}: {key} is not known here; give an encoder without it")
    return settings


def _pooling(folder: Path) -> tuple[tuple[str, ...], bool, int | None]:
    """Return the modes, whether a prompt is left out, and the width of the pooled states."""
    path = folder / "config.json"
    settings = _optional(path)
    mode_setting = settings.get("pooling_mode")
    if mode_setting is None:
        mode_setting = [mode for key, mode in POOLING_KEYS.items() if settings.get(key)] or "mean"
    modes = (mode_setting,) if isinstance(mode_setting, str) else tuple(mode_setting)
    if unknown_modes := [mode for mode in modes if mode not in POOLINGS]:
        raise InputError(f"{path}: pooling {unknown_modes[0]!r} is not known; known are {POOLINGS}")
    keys = ("embedding_dimension", "word_embedding_dimension")
    widths = [_count(settings, key, path) for key in keys if key in settings]
    return modes, not settings.get("include_prompt", True), widths[0] if widths else None


def _step(kind: str, folder: Path) -> Step:
    """Return a module after pooling; only the header of its weights is read."""
    settings = _optional(folder / "config.json")
    places = (settings.get("module_input_name"), settings.get("module_output_name"))
    if {*places} - {None, "sentence_embedding"}:
        raise InputError(
            f"{folder}: a {kind} from {places[0]} to {places[1]} is not one of vectors; known are "
            "those of sentence_embedding"
        )
    if kind == "Normalize":
        return NORMALIZE
    if kind == "LayerNorm":
        size = _count(settings, "dimension", folder)
        shapes: dict[str, tuple[int | None, ...]] = {"norm.weight": (size,), "norm.bias": (size,)}
        step_settings: dict[str, Any] = {"dimension": size}
    else:
        in_features = _count(settings, "in_features", folder)
        out_features = _count(settings, "out_features", folder)
        has_bias, residual = settings.get("bias", True), settings.get("use_residual", False)
        shapes = {"linear.weight": (out_features, in_features)}
        shapes |= {"linear.bias": (out_features,)} if has_bias else {}
        if residual and in_features != out_features:
            shapes["residual.weight"] = (out_features, in_features)
        step_settings = {
            "in_features": in_features,
            "out_features": out_features,
            "bias": bool(has_bias),
        }
        step_settings |= {"activation_function": settings.get("activation_function", TANH)}
        step_settings |= {"use_residual": True} if residual else {}
    if None in next(iter(shapes.values())):
        raise InputError(f"{folder / 'config.json'} does not give the sizes of its {kind}")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise InputError(
            f"{folder} has no {WEIGHTS_FILE}: a {kind} needs its weights, and pickled ones are not "
            "loaded. Save the encoder again with sentence-transformers"
        )
    stored = {name: tensor.shape for name, tensor in read_header(weights).items()}
    if stored != shapes:
        raise InputError(
            f"{weights} holds {stored}, but its config.json says {shapes}; copy the folder again"
        )
    return Step(kind, step_settings, weights)
