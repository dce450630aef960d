"""Asking a sentence encoder: how similar two texts are, or the vectors of single ones."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import InputError
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.judge import Judge, open_judge
from rekindle.train.embedding.folder import check_encoder_folder, is_encoder_folder
from rekindle.train.embedding.texts import TextEncoder, describe_encoder, describe_prompts
from rekindle.train.finetune.encoded import EncodedTexts
from rekindle.train.finetune.predictions import Answer, Answers
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.folder import resolve_model
from rekindle.train.outside.quiet import quiet_transformers
from rekindle.train.ranking.kinds import RANKING
from rekindle.train.student import ABOUT_FILE, saved_heads

log = logging.getLogger("rekindle")

# The prompts of a search, by sentence-transformers' names.
QUERY, DOCUMENT = ("query",), ("document", "passage", "corpus")


def open_text_judge(
    model: str, head: str | None, settings: AskConfig, pairs: bool, scored: str | None = None
) -> Judge:
    """Load what answers about texts, or ``pairs`` of them: a sentence encoder, or else what
    ``open_judge`` loads. ``scored``: the file with the right answers, if there is one.

    Raises InputError, before the model is loaded, for an encoder to be scored on single texts.
    """
    if head is None and gives_vectors(resolve_model(model, check_encoder_folder), settings):
        if scored is not None and not pairs:
            raise InputError(
                f"{scored} has single texts, and the sentence encoder {model!r} is scored by how "
                "near two texts are: name the two columns with --text-field, twice"
            )
        return EncoderJudge(model, settings, pairs)
    return open_judge(model, head)


def gives_vectors(directory: Path, settings: AskConfig) -> bool:
    """Return whether a model is asked for vectors: a folder of sentence-transformers, or a plain
    encoder with a pooling setting. A student with task heads is asked for one of those.
    """
    if (directory / ABOUT_FILE).is_file():
        heads = saved_heads(directory).values()
        if any(one.kind in ("sequence", "token") for one in heads):
            return False
    return is_encoder_folder(directory) or settings.pooling is not None


@dataclass(frozen=True)
class EncodedSides(EncodedTexts):
    """The distinct texts of some rows, and which of them each row has: [N], or [N,2] for pairs.

    ``skipped``: tokens of each text that pooling leaves out.
    """

    sides: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    skipped: Sequence[int] = ()


@dataclass(frozen=True)
class VectorAnswers(Answers):
    """An answer that is a vector."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of a line that it fills."""
        return ("vector",)

    def of(self, logits: np.ndarray) -> Answer:
        """Return one row's vector [D], with the fewest digits that identify a float32."""
        return {"vector": [float(str(value)) for value in logits.astype(np.float32)]}


class EncoderJudge(Judge):
    """Gives the cosine of a row's two texts as a score; for single texts their vectors."""

    head = None
    states_problem = True
    labels = ("cosine",)
    metric = "spearman"  # as STS is scored

    def __init__(self, model: str, settings: AskConfig, pairs: bool):
        self.subject = f"the sentence encoder {model!r}"
        # A cosine does not depend on the vectors' lengths.
        normalise = bool(settings.normalise) if pairs and settings.pooling else settings.normalise
        folder = describe_encoder(model, settings.pooling, normalise, settings.prompt)
        with quiet_transformers():
            self.encoder = TextEncoder.of(folder)
        self.prompt_setting = settings.prompt
        self.pairs = pairs
        self.answers: Answers = (Answers if pairs else VectorAnswers)("regression", self.labels)
        self.is_search = False  # whether the first texts are queries, the second documents
        if note := describe_prompts(folder, settings.prompt is not None):
            log.info("%s: %s", model, note)

    def check_task(self, data: TaskData) -> None:
        """Raise InputError for labels that are not scores."""
        super().check_task(data)
        self.is_search = data.problem == RANKING

    def read(self, data: TaskData, max_length: int | None) -> EncodedSides:
        """Return each distinct text once."""
        encoder, sides = self.encoder, [data.texts, *([data.pairs] if data.pairs else [])]
        numbers: dict[tuple[str, str], int] = {}
        prompts = self._prompts
        places = [
            [numbers.setdefault((prompt, text), len(numbers)) for text in side]
            for side, prompt in zip(sides, prompts, strict=False)
        ]
        longest = min(max_length or encoder.max_length, encoder.max_length)
        ids = [encoder.ids([text], prompt, longest)[0] for prompt, text in numbers]
        lengths = encoder.tokenizer.uncut_lengths([prompt + text for prompt, text in numbers])
        skipped = {prompt: encoder.skipped(prompt) for prompt in prompts}
        cut = int((lengths > longest).sum())
        limits = (longest, encoder.max_length, cut, int(max(lengths)))
        return EncodedSides(
            ids,
            None,
            0,
            *limits,
            sides=np.array(places, np.int64).T,
            skipped=[skipped[prompt] for prompt, _ in numbers],
        )

    @property
    def _prompts(self) -> tuple[str, str]:
        """Return the prompts of the first texts and of the second: for a search its own prompts."""
        folder = self.encoder.folder
        if self.prompt_setting is not None or not self.is_search:
            return folder.prompt, folder.prompt
        first, second = (
            next((folder.prompts[name] for name in names if name in folder.prompts), folder.prompt)
            for names in (QUERY, DOCUMENT)
        )
        return first, second

    def logits(self, encoded: EncodedTexts, batch_size: int) -> np.ndarray:
        """Return the cosines [N,1], or the vectors [N,D]."""
        assert isinstance(encoded, EncodedSides)
        vectors = self.encoder.vectors_of(encoded.input_ids, encoded.skipped)
        if not self.pairs:
            return vectors[encoded.sides[:, 0]]
        unit_vectors = vectors.astype(np.float64)
        unit_vectors /= np.maximum(np.linalg.norm(unit_vectors, axis=1, keepdims=True), 1e-30)
        first, second = (unit_vectors[encoded.sides[:, side]] for side in (0, 1))
        return (first * second).sum(axis=1, keepdims=True).astype(np.float32)
