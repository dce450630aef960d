"""Convert a run's length in epochs or tokens to steps, using the cache as it is opened."""

from rekindle.data.cache import Cache
from rekindle.train.config import TrainConfig
from rekindle.train.order.sequences import split_of
from rekindle.train.step_config import steps_of


def in_steps(cache: Cache, config: TrainConfig, recorded: int | None = None) -> TrainConfig:
    """Return ``config`` with the number of its steps.

    An epoch is all training sequences: without those held out, of other domains, or replayed; those
    a curriculum begins with count as read. A sequence counts with the corpus's average number of
    tokens. ``recorded``: the steps that the run was begun with, which it keeps: they are counted
    once. Raises InputError if there are too few.
    """
    if config.steps:
        return config
    _, split, _ = split_of(cache, config)
    tokens_per_sequence = cache.corpus.tokens / max(len(cache.corpus), 1)
    replayed_fraction = 0.0 if config.replay is None else config.replay.fraction
    steps = recorded or steps_of(config, len(split.train), tokens_per_sequence, replayed_fraction)
    return config.of_steps(steps)
