"""Write a student's vectors as a sentence-transformers folder: the files beside its model.

``modules.json`` names the steps from a text to a vector: the model itself, Pooling, Dense if the
student's vector is projected to its teacher's size, Normalize. What transformers loads from the
folder does not change.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rekindle.data.errors import InputError
from rekindle.train.embedding.encoder import load_encoder
from rekindle.train.embedding.folder import (
    ABOUT_ENCODER,
    MODULES_FILE,
    POOLING_KEYS,
    TRANSFORMER_FILES,
    read_encoder_folder,
)
from rekindle.train.model.family_head import difference, sample_inputs
from rekindle.train.model.network import HeadConfig, StudentNetwork, head_key
from rekindle.train.model.parts.head_config import Pooling, width_of
from rekindle.train.model.parts.vectors import VectorHead
from rekindle.train.model.sight import evaluating
from rekindle.train.model.student_config import OWN
from rekindle.train.student import Student

POOLING_FOLDER, DENSE_FOLDER = "1_Pooling", "2_Dense"
MODELS = "sentence_transformers.models"  # the modules' package, as every version reads it


@dataclass(frozen=True)
class Encoder:
    """A student as a sentence encoder: how the states of a text become its vector."""

    name: str  # of the head, or ``own``
    head: VectorHead
    drops: bool = False  # whether there is a projection that is left out

    @classmethod
    def own(
        cls, name: str, width: int, pooling: Pooling, normalise: bool, drops: bool = False
    ) -> "Encoder":
        """Return an encoder without a projection, of states with ``width`` numbers."""
        return cls(name, VectorHead(width, None, pooling, normalise), drops)

    @property
    def pooling(self) -> Pooling:
        """Return how the states of a text become one."""
        return self.head.pooling

    @property
    def normalise(self) -> bool:
        """Return whether vectors have length 1."""
        return self.head.normalise

    @property
    def projection(self) -> nn.Linear | None:
        """Return the map to the size of the head's teacher; None: the student's own size."""
        return self.head.projection

    def size(self, width: int) -> int:
        """Return the size of a vector, for states with ``width``."""
        return width if self.projection is None else self.projection.out_features

    def vectors(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the vectors [B,D] of a student's ``states`` [B,S,H]."""
        vectors: Tensor = self.head(states, {"attention_mask": attention_mask})
        return vectors

    @property
    def description(self) -> str:
        """Return what the vectors are, and what happened to the projection."""
        properties = f"{self.pooling} pooling" + (", length 1" if self.normalise else "")
        if self.projection is not None:
            return (
                f"the size of its teacher {self.name!r} ({properties}; the projection is a Dense)"
            )
        return f"the student's own size ({properties}{'; the projection is dropped' * self.drops})"


def encoder_of(student: StudentNetwork, requested: str | None) -> Encoder | None:
    """Return the student as the requested encoder: that of a head, or ``own``, without a
    projection; None for a student that learns from no sentence encoder.

    Its own vectors have length 1 if those of all its heads have.
    """
    configs = {n: one for n, one in student.head_configs.items() if one.kind == "embedding"}
    if requested is None or not configs:
        return None
    head = next(iter(configs.values()))
    assert head.pooling is not None  # the same for all heads
    if requested in configs:
        module = student.heads[head_key(requested)]
        assert isinstance(module, VectorHead)
        return Encoder(requested, module)
    normalise = all(one.normalise for one in configs.values())
    drops = any(one.projection for one in configs.values())
    return Encoder.own(OWN, width_of(student.model.config), head.pooling, normalise, drops)


def not_an_encoder(student: Student) -> str | None:
    """Return why sentence-transformers cannot load a student's folder; None if it can."""
    if student.prompts is not None:
        return (
            "the student has domain prompts, a vector after each text's first token, which "
            "sentence-transformers does not insert. Train one without student.domain_prompts"
        )
    if student.adapter is not None:
        return (
            "the student is an adapter of its base. `pipeline merge-adapter` writes the whole "
            "model, which can be loaded (or train with student.lora.merge: true)"
        )
    return None


def write_modules(encoder: Encoder, width: int, longest: int, folder: Path) -> None:
    """Write the files that turn the ``folder`` of a model with states of ``width`` numbers into one
    of sentence-transformers; texts are cut at ``longest`` tokens.
    """
    kinds = [("Transformer", ""), ("Pooling", POOLING_FOLDER)]
    kinds += [] if encoder.projection is None else [("Dense", DENSE_FOLDER)]
    kinds += [("Normalize", f"{len(kinds)}_Normalize")] if encoder.normalise else []
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{MODELS}.{kind}"}
        for number, (kind, path) in enumerate(kinds)
    ]
    pooling: dict[str, object] = {"word_embedding_dimension": width}
    pooling |= {key: name == encoder.pooling for key, name in POOLING_KEYS.items()}
    write(folder / POOLING_FOLDER / "config.json", pooling | {"include_prompt": True})
    if encoder.projection is not None:
        _write_dense(encoder.projection, folder / DENSE_FOLDER)
    defaults: dict[str, object] = {
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write(folder / ABOUT_ENCODER, {"__version__": {}} | defaults)
    write(folder / TRANSFORMER_FILES[0], {"max_seq_length": longest, "do_lower_case": False})
    write(folder / MODULES_FILE, modules)


def _write_dense(projection: nn.Linear, folder: Path) -> None:
    settings = {
        "in_features": projection.in_features,
        "out_features": projection.out_features,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write(folder / "config.json", settings)
    named = {f"linear.{name}": v for name, v in projection.state_dict().items()}
    weights = {name: v.detach().float().cpu().contiguous() for name, v in named.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write(file: Path, content: object) -> None:
    """Write JSON in the package's form."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_beside(student: Student, longest: int, folder: Path) -> str | None:
    """Write the modules beside a student's own files if it learns from sentence encoders; return a
    message about it, or None if it does not. ``longest``: as for ``write_modules``.
    """
    if (encoder := encoder_of(student, student.vectors)) is None:
        return None
    if reason := not_an_encoder(student):
        return f"sentence-transformers cannot load the student: {reason}"
    write_modules(encoder, width_of(student.model.config), longest, folder)
    return f"sentence-transformers loads the student: vectors of {encoder.description}"


def gives_vectors(heads: Mapping[str, HeadConfig]) -> bool:
    """Return whether one of a student's heads gives vectors."""
    return any(head.kind == "embedding" for head in heads.values())


def chosen_encoder(student: Student, name: str) -> Encoder | None:
    """Return the encoder that is exported as head ``name``, or ``own``; None for a head that gives
    no vectors. Raise InputError if it cannot have a folder.
    """
    head = student.head_configs.get(name)
    if head is not None and head.kind != "embedding":
        return None
    if reason := not_an_encoder(student):
        raise InputError(f"the vectors of {name!r} cannot be exported: {reason}")
    return encoder_of(student, name)


def plain_body(student: Student) -> PreTrainedModel:
    """Return only the student's body, in float32 on the CPU."""
    body: PreTrainedModel = student.model.base_model
    return body.to("cpu", torch.float32).eval()


@torch.no_grad()
def encoder_distance(student: Student, encoder: Encoder, folder: Path) -> float:
    """Return how far the vectors of ``folder`` are from the encoder's, on a few rows."""
    reloaded = load_encoder(read_encoder_folder(folder))
    inputs = sample_inputs(reloaded.config)
    with evaluating(student):
        expected = encoder.vectors(student.states(inputs), inputs["attention_mask"])
    return difference(reloaded(inputs), expected.float())
