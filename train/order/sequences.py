"""Which sequences a student is trained on, step by step, and which it is evaluated on.

A step's batch is a pure function of (configuration, seed, step) and, where replay follows the loss,
of past evaluations. It is that of a single process: the ranks share it out (``stream.py``).
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
from rekindle.train.order.similar_lengths import WINDOWS, Windows, dealt, turns, window_of
from rekindle.train.schedules import USUAL_WARMUP

log = logging.getLogger("rekindle")


class Order:
    """What every step reads: ``sequences``, each once per epoch, in an order of each epoch's own.

    In the first ``first_steps`` steps ``first`` takes their place, in epochs of its own; the epochs
    of ``sequences`` begin after it, with a new one: masks and order go on changing. With ``replay``
    a part of every batch, at its end, is replayed instead; what a step of it replays may follow
    evaluations: ``replay`` is told of them, and a checkpoint holds its state besides the step.
    ``lengths`` of sequences: batches are of similar lengths (``similar_lengths.py``). ``groups``:
    they are of whole groups (``groups.py``), and about as large as ``batch_sequences`` says; there
    is no other first part then, and no replay. None of both: the order stays shuffled.
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
        self._lengths, self._windows = lengths, Windows(self._dealt)
        self.groups = groups
        self.replay = replay or Replay({}, 0, batch_sequences, seed)
        begin = 0 if first is None else self._place(first_steps)
        epoch = 0 if first is None else -(-begin // max(1, len(first)))
        self._phases = [] if first is None else [(0, first, 0)]
        self._phases.append((begin, sequences, epoch))  # from which place on, in which epoch

    def __len__(self) -> int:
        """Sequences of an epoch."""
        return len(self.sequences)

    def at(self, step: int) -> Ints:
        """The sequence numbers [batch_sequences] of ``step``; reads nothing but lengths. Where it
        reads whole groups they are a few less or more.
        """
        if self.groups is not None:
            return self.groups.read(self._place(step), self._place(step + 1))
        if self._lengths is not None:
            return self._windows.at(step, self._window)
        return np.concatenate([self._own(step, step + 1), self.replay.at(step)])

    def micro_batches(self, step: int, size: int, processes: int) -> int:
        """How many micro-batches of at most ``size`` sequences a process makes of its share of
        ``step``: as many as each other one, though whole groups cannot be shared out evenly.
        """
        if self.groups is None:
            return -(-(self.batch_sequences // processes) // size)
        count = len(self.at(step))
        return min(-(-count // (processes * size)), count // processes)

    def _own(self, step: int, stop: int) -> Ints:
        """What the steps of one phase read that is not replayed, in its shuffled order."""
        start, sequences, epoch = self._phase(step)
        end, size = start + self._place(stop) - self._place(step), len(sequences)
        places = stream_part(start, end, size, seed=self._seed, first_epoch=epoch)
        return sequences.select(places)

    def _dealt(self, window: range) -> list[Ints]:
        """What each step of a window reads, where batches are of similar lengths: its own part and
        the replayed one, each dealt out by length.
        """
        assert self._lengths is not None
        order = turns(window, self._seed)
        replayed = [self.replay.at(step) for step in window]
        slots = [len(part) for part in replayed]
        each = [
            (self._own(window.start, window.stop), [self.batch_sequences - n for n in slots]),
            (np.concatenate(replayed), slots),
        ]
        parts = [[n[i] for i in dealt(self._lengths(n), sizes, order)] for n, sizes in each]
        return [np.concatenate(both) for both in zip(*parts, strict=True)]

    def _window(self, step: int) -> range:
        """The window of ``step``: its steps are of one phase, begin in one epoch, and what they
        replay is decided at once.
        """
        here = self._stretch(step)
        stop = step + 1
        while self._stretch(stop) == here:
            stop += stop - step
        first = bisect_left(range(step), here, key=self._stretch)
        last = bisect_right(range(stop), here, lo=step, key=self._stretch)
        return window_of(step, first, last)

    def _stretch(self, step: int) -> tuple[int, int, int]:
        """What the steps of a window have in common; it ascends."""
        start = self._phase(step)[0]
        return self._place(step) - start, self.epoch(step), self.replay.interval(step)

    def epoch(self, step: int) -> int:
        """The epoch in which ``step`` begins: whose masks it sees, replayed sequences too."""
        start, sequences, epoch = self._phase(step)
        return epoch + start // len(sequences)

    def _place(self, step: int) -> int:
        """How many sequences that are not replayed are read before ``step``."""
        return step * self.batch_sequences - self.replay.slots_before(step)

    def _phase(self, step: int) -> tuple[int, Ranges, int]:
        """Where ``step`` begins in the stream of its phase, and of what and when that is."""
        place = self._place(step)
        found = next(phase for phase in reversed(self._phases) if phase[0] <= place)
        return place - found[0], *found[1:]


@dataclass(frozen=True)
class Chosen:
    """What a run trains on and what it is evaluated on."""

    order: Order
    held_out: Ints
    domains: dict[str, Ints]  # held out of each domain that is evaluated by itself


def choose_sequences(cache: Cache, config: TrainConfig) -> Chosen:
    """The sequences that ``config`` asks for.

    What is held out is the same for every run on a corpus: a run on one domain trains on what is
    not held out of it. Raises InputError for domains that the corpus has not, or has nothing of to
    train on or to evaluate where that is needed, and for a curriculum that cannot be had.
    """
    split, own, where = split_of(cache, config)
    train, held_out = own.train, own.held_out
    first, steps = None, 0
    if config.curriculum is not None:
        first = best_scored(cache, config.curriculum, train)
        _check_curriculum(config, len(first), len(train))
        steps = first_steps(config.curriculum, config.steps)
        log.info("curriculum: %d steps on %d of %d sequences", steps, len(first), len(train))
    replay, groups = _replay(config, split, where), whole_groups(cache, config, train)
    lengths = cache.lengths if config.batching == "similar_lengths" else None
    _tell(config, len(cache), len(train), len(held_out))
    if config.epochs is not None or config.tokens is not None:
        told = f"{counted(config.steps, 'step')} of {counted(config.batch_sequences, 'sequence')}"
        log.info("train: %s = %s; %s are trained on", config.length, told, f"{len(train):,}")
    return Chosen(
        Order(train, config.batch_sequences, config.seed, first, steps, replay, lengths, groups),
        spread_groups(cache, held_out, config.evaluate_sequences),
        _held_out_of(cache, config, split, {n: where[n] for n in evaluated_domains(cache, config)}),
    )


def split_of(cache: Cache, config: TrainConfig) -> tuple[Split, Split, dict[str, Ranges]]:
    """The whole corpus as it is split, what of it is of the run's own domains, and where the
    domains are that it names. Raises InputError for some that the corpus has not.
    """
    split = split_corpus(cache, config.held_out)
    own = config.domains
    replayed = config.replay.domains if config.replay is not None else ()
    check_domains(cache.corpus, own or (), "train.domains")
    check_domains(cache.corpus, replayed, "train.replay.domains")
    _check_apart(config)
    named = [*(own or ()), *replayed, *evaluated_domains(cache, config)]
    where = domain_ranges(cache.corpus, named)
    if own is None:
        return split, split, where
    within = _union([where[name] for name in dict.fromkeys(own)])
    sides = (side.intersection(within) for side in (split.train, split.held_out))
    return split, Split(*sides), where


def evaluated_domains(cache: Cache, config: TrainConfig) -> list[str]:
    """The domains whose held-out loss is reported by itself."""
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


def _check_curriculum(config: TrainConfig, kept: int, train: int) -> None:
    """Refuse one that keeps less than a batch: the same few sequences would fill all of them."""
    assert config.curriculum is not None
    replayed = 0.0 if config.replay is None else config.replay.fraction
    needed = math.ceil(config.batch_sequences * (1 - replayed) - 1e-9)
    if kept < needed:
        more = f"Keep at least {needed / train:.2g}, use" if needed <= train else "Use"
        raise InputError(
            f"train.curriculum.keep {config.curriculum.keep:g} of {train} sequences leaves {kept}, "
            f"fewer than the {needed} that a step reads: each batch would repeat them. {more} a "
            "smaller train.batch_sequences, or a longer corpus"
        )


def _tell(config: TrainConfig, sequences: int, train: int, held_out: int) -> None:
    """Say what follows silently from the sizes of a run and of its corpus."""
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
    for where, weight in config.objective.schedules():
        if weight.is_sudden(config.steps):
            log.info(
                "train.objective.%s.weight is %g for one step and %g from then on: over %g of %d "
                "steps is less than one",
                *(where, weight.start, weight.end, weight.over, config.steps),
            )
    for line in told_of_few(config, sequences, train):
        log.warning("%s", line)
    if config.batching == "similar_lengths" and train < 2 * WINDOWS * config.batch_sequences:
        log.info(
            "train.batching: similar_lengths has no effect on fewer than %d batches an epoch: "
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
            "and the run has %d: all domains are replayed alike",
            3 * config.evaluate_every,
            config.steps,
        )


def told_of_few(config: TrainConfig, sequences: int, train: int | None = None) -> list[str]:
    """Say, in a line, what happens where fewer of the ``sequences`` are trained on than a batch
    has. ``train``: how many those are, where it is known; else by ``held_out``.
    """
    if train is None:
        train = sequences - int(sequences * config.held_out)
    if not 0 < train < config.batch_sequences:
        return []
    return [
        f"train.batch_sequences is {config.batch_sequences}, and only {counted(train, 'sequence')} "
        f"of {sequences:,} {'is' if train == 1 else 'are'} trained on: every batch repeats some. "
        "Use a smaller train.batch_sequences, or more text"
    ]


def _check_apart(config: TrainConfig) -> None:
    if config.replay is None:
        return
    shared = [name for name in config.replay.domains if name in (config.domains or (name,))]
    if shared:
        raise InputError(
            f"train.replay.domains names {shared[0]!r}, which is trained on anyway: replay is of "
            "earlier domains. Give train.domains, without those that are replayed"
        )


def _replay(config: TrainConfig, split: Split, where: Mapping[str, Ranges]) -> Replay | None:
    if config.replay is None:
        return None
    memories = {
        name: split.train.intersection(where[name]) for name in dict.fromkeys(config.replay.domains)
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
    cache: Cache, config: TrainConfig, split: Split, where: Mapping[str, Ranges]
) -> dict[str, Ints]:
    """The held-out sequences of each domain: ``evaluate_sequences`` shared out among them."""
    found = {name: split.held_out.intersection(ranges) for name, ranges in where.items()}
    none = [name for name, ranges in found.items() if not len(ranges)]
    needed = set(config.replay.domains) if config.replay and config.replay.follows_loss else set()
    if needed & set(none):
        raise InputError(
            "train.replay.choose: loss_change needs the held-out loss of every replayed domain; "
            f"nothing of {min(needed & set(none))!r} is held out. Use a larger train.held_out, or "
            "choose: uniform"
        )
    if none:
        log.warning(
            "nothing of %s is held out: no loss of it is reported; a larger train.held_out helps",
            ", ".join(none),
        )
    share = max(1, config.evaluate_sequences // max(1, len(found)))
    return {n: spread_groups(cache, ranges, share) for n, ranges in found.items() if len(ranges)}


def _union(parts: list[Ranges]) -> Ranges:
    """Disjoint ranges together."""
    bounds = np.concatenate([part.bounds for part in parts])
    return Ranges(bounds[np.argsort(bounds[:, 0])])


def first_steps(config: CurriculumConfig, steps: int) -> int:
    """The number of steps of a curriculum: those at which a ``step`` schedule over the same
    fraction of ``steps`` has its first value.
    """
    return math.floor(config.until * steps * (1 - 1e-9)) + 1


def best_scored(cache: Cache, config: CurriculumConfig, sequences: Ranges) -> Ranges:
    """The share ``keep`` of ``sequences`` with the best scores, ties in corpus order.

    SALT ("small-LM guided training", 2024) scores a sequence by the median loss of a small LM over
    the tokens that are among its ten best guesses, and begins with the highest: hard, yet
    predictable.

    Sequences without a score (no token among the teacher's best guesses, or not of its domains) are
    never among them. Raises InputError for a teacher that is not complete, CacheMismatchError for
    one whose scalars are not all there.
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
