"""Finds a teacher's model and, for a sentence encoder, how it makes vectors."""

from collections.abc import Callable
from pathlib import Path

from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.embedding.folder import EncoderFolder, check_encoder_folder
from rekindle.train.embedding.texts import describe_encoder_in
from rekindle.train.model.folder import resolve_model


def check_of(config: TeacherConfig) -> Callable[[Path], None] | None:
    """Return the check that raises InputError for an unsuitable folder; None: as for any model."""
    return check_encoder_folder if config.task == "embedding" else None


def find_teacher(
    config: TeacherConfig, directory: Path | None = None
) -> tuple[Path, EncoderFolder | None]:
    """Return the folder of a teacher's model and, for a sentence encoder, how it makes vectors.

    ``directory``: its place, if known. Raises InputError if the folder is unsuitable.
    """
    directory = directory or resolve_model(config.model, check_of(config))
    if config.task != "embedding":
        return directory, None
    settings = (config.pooling, config.normalise, config.prompt)
    encoder = describe_encoder_in(directory, config.model, *settings)
    return encoder.transformer, encoder
