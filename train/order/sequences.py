"""The sequences that a student is trained on, step by step, and those that it is evaluated on.

A step's batch is a pure function of (configuration, seed, step) and, if replay follows the loss, of
past evaluations. It is the batch of a single process: the ranks divide it (``stream.py``).
"""

import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rekindle.data.batch import Ints
from rekindle.data.cache import Cache
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.permutation import stream_part
from rekindle.train.config import CurriculumConfig, TrainConfig
from rekindle.train.order.domains import check_domains, domain_ranges
from rekindle.train.order.groups import WholeGroups, spread_groups, whole_groups
from rekindle.train.order.held_out import Ranges, Split, split_corpus
from rekindle.train.order.replay import Replay
from rekindle.train.order.similar_lengths import (
    WINDOWS,
    Windows,
    batch_turns,
    deal_batches,
    window_of,
)
from rekindle.train.schedules import USUAL_WARMUP

log = logging.getLogger("rekindle")


class Order:
    """The sequences of every step: ``sequences``, each once per epoch, shuffled anew in each epoch.

    In the first ``first_steps`` steps ``first`` takes their place, in epochs of its own; the epochs
    of ``sequences`` begin after it with a new number: masks and order go on changing. With
    ``replay`` a part at the end of every batch is replayed instead; what it replays may depend on
    evaluations: ``replay`` gets them, and a checkpoint holds its state besides the step.
    ``lengths`` of sequences: batches have similar lengths (``similar_lengths.py``). ``groups``:
    batches consist of whole groups (``groups.py``) and have about ``batch_sequences``; then there
    is no ``first`` and no replay. Without either the order stays shuffled.
    """

    def __init__(
        self,
        sequences: Ranges,
        batch_sequences: int,
        seed: int,
        first: Ranges | None = None,
        first_steps: int = 0,
        replay: Replay | None = None,
        lengths: Callable[[Ints], Ints] | None = None,
        groups: WholeGroups | None = None,
    ):
        self.sequences, self.batch_sequences, self._seed = sequences, batch_sequences, seed
        self._lengths, self._windows = lengths, Windows(self._deal_window)
        self.groups = groups
        self.replay = replay or Replay({}, 0, batch_sequences, seed)
        begin = 0 if first is None else self._place(first_steps)
        epoch = 0 if first is None else -(-begin // max(1, len(first)))
        self._phases = [] if first is None else [(0, first, 0)]
        self._phases.append((begin, sequences, epoch))  # from which place on, in which epoch

    def __len__(self) -> int:
        """Return the number of sequences in an epoch."""
        return len(self.sequences)

    def at(self, step: int) -> Ints:
        """Return the sequence numbers [batch_sequences] of ``step``; reads only lengths. With whole
        groups they may be a few less or more.
        """
        if self.groups is not None:
            return self.groups.read(self._place(step), self._place(step + 1))
        if self._lengths is not None:
            return self._windows.at(step, self._window)
        return np.concatenate([self._shuffled(step, step + 1), self.replay.at(step)])

    def micro_batches(self, step: int, size: int, processes: int) -> int:
        """Return how many micro-batches of at most ``size`` sequences each process makes of its
        share of ``step``: the same number in all, though whole groups cannot be divided evenly.

        None is empty: if ``size`` is 1 and some share has one sequence more than another, a
        micro-batch has 2.
        """
        if self.groups is None:
            return -(-(self.batch_sequences // processes) // size)
        count = len(self.at(step))
        return min(-(-count // (processes * size)), count // processes)

    def _shuffled(self, step: int, stop: int) -> Ints:
        """Return the sequences that steps of one phase read and do not replay, in
        shuffled order.
        """
        start, sequences, epoch = self._phase(step)
        end, size = start + self._place(stop) - self._place(step), len(sequences)
        places = stream_part(start, end, size, seed=self._seed, first_epoch=epoch)
        return sequences.select(places)

    def _deal_window(self, window: range) -> list[Ints]:
        """Return the sequences of each step of a window if batches have similar lengths: its own
        part and the replayed one, each dealt out by length.
        """
        assert self._lengths is not None
        batch_order = batch_turns(window, self._seed)
        replayed = [self.replay.at(step) for step in window]
        replayed_counts = [len(part) for part in replayed]
        streams = [
            (
                self._shuffled(window.start, window.stop),
                [self.batch_sequences - n for n in replayed_counts],
            ),
            (np.concatenate(replayed), replayed_counts),
        ]
        parts = [
            [n[i] for i in deal_batches(self._lengths(n), sizes, batch_order)]
            for n, sizes in streams
        ]
        return [np.concatenate(both) for both in zip(*parts, strict=True)]

    def _window(self, step: int) -> range:
        """Return the window of ``step``: its steps are in one phase, begin in one epoch, and what
        they replay is decided at once.
        """
        stretch = self._stretch_key(step)
        stop = step + 1
        while self._stretch_key(stop) == stretch:
            stop += stop - step
        first = bisect_left(range(step), stretch, key=self._stretch_key)
        last = bisect_right(range(stop), stretch, lo=step, key=self._stretch_key)
        return window_of(step, first, last)

    def _stretch_key(self, step: int) -> tuple[int, int, int]:
        """Return what the steps of a window have in common; it ascends."""
        start = self._phase(step)[0]
        return self._place(step) - start, self.epoch(step), self.replay.interval(step)

    def epoch(self, step: int) -> int:
        """Return the epoch in which ``step`` begins; its masks apply to replayed sequences too."""
        start, sequences, epoch = self._phase(step)
        return epoch + start // len(sequences)

    def _place(self, step: int) -> int:
        """Return how many sequences are read, not counting replayed ones, before ``step``."""
        return step * self.batch_sequences - self.replay.slots_before(step)

    def _phase(self, step: int) -> tuple[int, Ranges, int]:
        """Return where ``step`` begins in its phase, and the phase's sequences and first epoch."""
        place = self._place(step)
        phase = next(phase for phase in reversed(self._phases) if phase[0] <= place)
        return place - phase[0], *phase[1:]


@dataclass(frozen=True)
class Chosen:
    """The sequences that a run trains on and those it is evaluated on."""

    order: Order
    held_out: Ints
    domains: dict[str, Ints]  # held out from each domain that is evaluated separately


def choose_sequences(cache: Cache, config: TrainConfig) -> Chosen:
    """Return the sequences that ``config`` asks for.

    Every run on a corpus has the same held-out ones: a run on one domain trains on the rest of it.
    Raises InputError for domains that the corpus lacks, or that lack sequences to train on or to
    evaluate on if those are needed, and for an impossible curriculum.
    """
    split, own_split, ranges = split_of(cache, config)
    train, held_out = own_split.train, own_split.held_out
    first, steps = None, 0
    if config.curriculum is not None:
        first = best_scored(cache, config.curriculum, train)
        _check_curriculum(config, len(first), len(train))
        steps = first_steps(config.curriculum, config.steps)
        log.info("curriculum: %d steps on %d of %d sequences", steps, len(first), len(train))
    replay, groups = _build_replay(config, split, ranges), whole_groups(cache, config, train)
    lengths = cache.lengths if config.batching == "similar_lengths" else None
    _log_sizes(config, len(cache), len(train), len(held_out))
    if config.epochs is not None or config.tokens is not None:
        length = f"{counted(config.steps, 'step')} of {counted(config.batch_sequences, 'sequence')}"
        log.info("train: %s = %s; %s are trained on", config.length, length, f"{len(train):,}")
    return Chosen(
        Order(train, config.batch_sequences, config.seed, first, steps, replay, lengths, groups),
        spread_groups(cache, held_out, config.evaluate_sequences),
        _held_out_of(
            cache, config, split, {n: ranges[n] for n in evaluated_domains(cache, config)}
        ),
    )


def split_of(cache: Cache, config: TrainConfig) -> tuple[Split, Split, dict[str, Ranges]]:
    """Return the split of the whole corpus, its part in the run's own domains, and the ranges of
    the domains named. Raises InputError for domains that the corpus lacks.
    """
    split = split_corpus(cache, config.held_out)
    own_domains = config.domains
    replayed = config.replay.domains if config.replay is not None else ()
    check_domains(cache.corpus, own_domains or (), "train.domains")
    check_domains(cache.corpus, replayed, "train.replay.domains")
    _check_replay_domains(config)
    names = [*(own_domains or ()), *replayed, *evaluated_domains(cache, config)]
    ranges = domain_ranges(cache.corpus, names)
    if own_domains is None:
        return split, split, ranges
    own_ranges = _union([ranges[name] for name in dict.fromkeys(own_domains)])
    sides = (side.intersection(own_ranges) for side in (split.train, split.held_out))
    return split, Split(*sides), ranges


def evaluated_domains(cache: Cache, config: TrainConfig) -> list[str]:
    """Return the domains whose held-out loss is reported separately."""
    if config.evaluate_domains:
        if not cache.corpus.domains:
            raise InputError(
                f"train.evaluate_domains: the sequences of {cache.store.location} have no domains: "
                "set corpus.domain_field, and cache the corpus again"
            )
        return sorted(cache.corpus.domains)
    if config.replay is not None and config.replay.follows_loss:
        return sorted(set(config.replay.domains))
    return []


def _check_curriculum(config: TrainConfig, kept_count: int, train: int) -> None:
    """Refuse a curriculum that keeps less than a batch: the same few sequences would fill all
    batches.
    """
    assert config.curriculum is not None
    replayed = 0.0 if config.replay is None else config.replay.fraction
    needed = math.ceil(config.batch_sequences * (1 - replayed) - 1e-9)
    if kept_count < needed:
        advice = f"Keep at least {needed / train:.2g}, use" if needed <= train else "Use"
        raise InputError(
            f"train.curriculum.keep {config.curriculum.keep:g} of {train} sequences leaves "
            f"{kept_count}, fewer than the {needed} that a step reads: each batch would repeat "
            f"them. {advice} a smaller train.batch_sequences, or a longer corpus"
        )


def _log_sizes(config: TrainConfig, sequences: int, train: int, held_out: int) -> None:
    """Log the consequences of the sizes of a run and of its corpus."""
    log.info(
        "corpus: %s, of which %s trained on and %s held out for evaluation",
        *(counted(sequences, "sequence"), f"{train:,} are", f"{held_out:,}"),
    )
    if "warmup_steps" not in config.model_fields_set and config.steps < 10 * USUAL_WARMUP:
        log.info(
            "train.warmup_steps is not given: %d of %d steps, a tenth",
            config.warmup_steps,
            config.steps,
        )
    for key, weight in config.objective.schedules():
        if weight.is_sudden(config.steps):
            log.info(
                "train.objective.%s.weight is %g for one step and %g from then on: over %g of %d "
                "steps is less than one",
                *(key, weight.start, weight.end, weight.over, config.steps),
            )
    for line in describe_too_few(config, sequences, train):
        log.warning("%s", line)
    if config.batching == "similar_lengths" and train < 2 * WINDOWS * config.batch_sequences:
        log.info(
            "train.batching: similar_lengths has no effect with fewer than %d batches an epoch: "
            "%s are trained on, %d a step",
            *(2 * WINDOWS, counted(train, "sequence"), config.batch_sequences),
        )
    if not held_out:
        log.info(
            "nothing is held out (train.held_out %g): nothing is evaluated, and no checkpoint is "
            "the best",
            config.held_out,
        )
    follows = config.replay is not None and config.replay.follows_loss
    if follows and config.steps <= 3 * config.evaluate_every:
        log.info(
            "train.replay.choose: loss_change acts from step %d on (three times evaluate_every), "
            "and the run has %d: all domains are replayed equally",
            3 * config.evaluate_every,
            config.steps,
        )


def describe_too_few(config: TrainConfig, sequences: int, train: int | None = None) -> list[str]:
    """Return a line on what happens if fewer of the ``sequences`` are trained on than a batch has.
    ``train``: how many those are, if known; otherwise estimated from ``held_out``.
    """
    if train is None:
        train = sequences - int(sequences * config.held_out)
    if not 0 < train < config.batch_sequences:
        return []
    return [
        f"train.batch_sequences is {config.batch_sequences}, but only "
        f"{counted(train, 'sequence')} "
        f"of {sequences:,} {'is' if train == 1 else 'are'} trained on: every batch repeats some. "
        "Use a smaller train.batch_sequences, or more text"
    ]


def _check_replay_domains(config: TrainConfig) -> None:
    if config.replay is None:
        return
    shared = [name for name in config.replay.domains if name in (config.domains or (name,))]
    if shared:
        raise InputError(
            f"train.replay.domains names {shared[0]!r}, which is trained on anyway: replay is for "
            "earlier domains. Set train.domains, without those that are replayed"
        )


def _build_replay(config: TrainConfig, split: Split, ranges: Mapping[str, Ranges]) -> Replay | None:
    if config.replay is None:
        return None
    memories = {
        name: split.train.intersection(ranges[name])
        for name in dict.fromkeys(config.replay.domains)
    }
    for name, memory in memories.items():
        if not len(memory):
            raise InputError(
                f"train.replay.domains: all sequences of {name!r} are held out. Use a smaller "
                "train.held_out, or leave the domain out"
            )
    every = config.evaluate_every if config.replay.follows_loss else None
    size, seed = config.batch_sequences, config.seed
    return Replay(memories, config.replay.fraction, size, seed, every, config.steps)


def _held_out_of(
    cache: Cache, config: TrainConfig, split: Split, domain_ranges: Mapping[str, Ranges]
) -> dict[str, Ints]:
    """Return the held-out sequences of each domain: ``evaluate_sequences`` divided among them."""
    held_out = {name: split.held_out.intersection(ranges) for name, ranges in domain_ranges.items()}
    missing = [name for name, ranges in held_out.items() if not len(ranges)]
    needed = set(config.replay.domains) if config.replay and config.replay.follows_loss else set()
    if needed & set(missing):
        raise InputError(
            "train.replay.choose: loss_change needs the held-out loss of every replayed domain; "
            f"nothing of {min(needed & set(missing))!r} is held out. Use a larger "
            "train.held_out, or choose: uniform"
        )
    if missing:
        log.warning(
            "nothing of %s is held out: no loss of it is reported; a larger train.held_out helps",
            ", ".join(missing),
        )
    share = max(1, config.evaluate_sequences // max(1, len(held_out)))
    return {n: spread_groups(cache, ranges, share) for n, ranges in held_out.items() if len(ranges)}


def _union(parts: list[Ranges]) -> Ranges:
    """Return disjoint ranges together."""
    bounds = np.concatenate([part.bounds for part in parts])
    return Ranges(bounds[np.argsort(bounds[:, 0])])


def first_steps(config: CurriculumConfig, steps: int) -> int:
    """Return the number of steps of a curriculum: those at which a ``step`` schedule over the same
    fraction of ``steps`` has its first value.
    """
    return math.floor(config.until * steps * (1 - 1e-9)) + 1


def best_scored(cache: Cache, config: CurriculumConfig, sequences: Ranges) -> Ranges:
    """Return the share ``keep`` of ``sequences`` with the best scores, ties in corpus order.

    SALT ("small-LM guided training", 2024) scores a sequence by the median loss of a small LM over
    the tokens among its ten best guesses, and begins with the highest: hard, yet predictable.

    Sequences without a score (no token among the teacher's best guesses, or outside its domains)
    are never included. Raises InputError for an incomplete teacher, CacheMismatchError for one that
    lacks scalars.
    """
    teacher = cache.teacher(config.teacher)
    if teacher.coverage < 1:
        raise InputError(
            f"train.curriculum.teacher {config.teacher!r} has targets for {teacher.coverage:.1%} "
            "of the cache: a sequence that was not scored cannot be ranked. Finish it with "
            "`pipeline cache-teachers`"
        )
    scores = cache.scores(config.teacher, config.score)
    numbers = sequences.select(np.arange(len(sequences), dtype=np.int64))
    scored = numbers[~np.isnan(scores[numbers])]
    if not len(scored):
        raise InputError(
            f"train.curriculum: teacher {config.teacher!r} gives no {config.score} to any sequence "
            "that is trained on. Use another score, or a teacher of these domains"
        )
    sign = -1.0 if config.highest else 1.0
    best = scored[np.argsort(sign * scores[scored], kind="stable")]
    return Ranges.of(np.sort(best[: max(1, round(len(numbers) * config.keep))]))
