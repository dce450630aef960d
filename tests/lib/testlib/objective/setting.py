"""A step of an objective, in any number of micro-batches and processes, and its reference."""

import functools
import threading

import numpy as np
import pytest
import torch

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.train.config import ObjectiveConfig, StudentConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.distributed import World
from rekindle.train.objective.objective import Objective
from rekindle.train.objective.ranking import with_groups
from rekindle.train.objective.ready import BatchPreparer
from rekindle.train.objective.selection import Counts
from rekindle.train.objective.vector_loss import with_vectors
from rekindle.train.student import build_student
from testlib.objective.reference import EPOCH, reference
from testlib.students import gradients, same_gradients

CPU = torch.device("cpu")


@functools.lru_cache(64)
def built(model, task, heads, vocabulary):
    """Return a student and its weights, built and checked once for all settings that use it."""
    config = StudentConfig(model=model, task=task)
    student = build_student(config, dict(heads), vocabulary, 0)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():  # biases and LayerNorms away from their initial values
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return student, {name: value.clone() for name, value in student.state_dict().items()}


@functools.lru_cache(8)
def opened(path):
    """Return the cache at a path, opened once: nothing writes into a world's cache."""
    return Cache.open(path)


class Setting:
    """A student, an objective and a batch of one world; ``task`` follows the world's student."""

    def __init__(self, world, objective, steps=10, batch=None, missing=()):
        self.cache = opened(world.path)
        self.task = "masked_lm" if any("masked" in v for v in self.cache.views) else "causal_lm"
        self.view = self.cache.masked_view().name if self.task == "masked_lm" else None
        config = parse_settings(ObjectiveConfig, objective)
        names = [name for term in config.distill for name in term.teachers]
        infos = {name: self.cache.teacher(name).info for name in names}
        self.objective = Objective(config, infos, self.task, steps)
        self.vocabulary = self.cache.corpus.info["tokenizer"]["size"]
        heads = tuple(sorted(self.objective.heads.items()))
        self.student, weights = built(str(world.student), self.task, heads, self.vocabulary)
        self.student.load_state_dict(weights)
        self.student.eval().zero_grad(set_to_none=True)
        self.index = np.arange(3, 20) if batch is None else np.asarray(batch)
        self.missing = missing

    def batch(self, step):
        found = self.cache.gather(
            self.index,
            self.objective.plan(step).teachers,
            epoch=EPOCH,
            masked_view=self.view,
            allow_missing=self.missing,
        )
        return self.objective.select_targets(found, self.objective.plan(step))

    def run(self, step=0, micro=None):
        """Return (loss, terms, gradients by parameter) of a step, in micro-batches."""
        batch = self.batch(step)
        counts = self.objective.counts(batch, self.objective.plan(step))
        parts = split_batch(batch, micro or len(batch.index))
        return self._sum(parts, self._centred(counts, parts, step, World.alone()), step)

    def run_ahead(self, copies, step=0, micro=None):
        """Return the same for a step whose batch was prepared and sent ahead."""
        batch = self.batch(step)
        counts = self.objective.counts(batch, self.objective.plan(step))
        parts = BatchPreparer(self.objective, micro, copies)(step, batch).parts
        return self._sum(parts, self._centred(counts, parts, step, World.alone()), step)

    def _centred(self, counts, parts, step, world):
        def run(work, *arguments):
            return work(self.student, *arguments)

        of_step = (parts, self.objective.plan(step), world, run)
        counts = with_groups(counts, self.task, *of_step)
        return with_vectors(counts, self.task, *of_step)

    def run_apart(self, processes, step=0):
        """Return the same for a step in which each process reads, selects and counts its
        own part.
        """
        index = self.index
        parts, counted = [], []
        for rank in range(processes):
            self.index = index[rank::processes]
            parts.append(self.batch(step))
            counted.append(self.objective.counts(parts[-1], self.objective.plan(step)))
        self.index = index
        counts = Counts(
            sum(c.labels for c in counted),
            {name: sum(c.rows[name] for c in counted) for name in counted[0].rows},
        )
        assert counts == self.objective.counts(self.batch(step), self.objective.plan(step))
        found = at_once(
            processes,
            lambda world, rank: self._centred(counts, split_batch(parts[rank], 2), step, world),
        )
        assert all(one == found[0] for one in found)
        return self._sum(parts, found[0], step)

    def passes(self, batch, step=0):
        """Return the forward passes of a micro-batch, and the parameters that get a gradient."""
        seen = []
        forward = self.student.forward

        def watch(inputs, select=None, sequence_heads=(), token_heads=None):
            heads = (tuple(sequence_heads), tuple(token_heads or {}))
            seen.append((select is None, "token_type_ids" in inputs, *heads))
            return forward(inputs, select, sequence_heads, token_heads)

        self.student.forward = watch
        try:
            counts = self.objective.counts(batch, self.objective.plan(step))
            found = self._sum([batch], self._centred(counts, [batch], step, World.alone()), step)[2]
        finally:
            self.student.forward = forward
        return seen, sorted(found)

    def _sum(self, parts, counts, step):
        self.student.zero_grad(set_to_none=True)
        loss, terms = 0.0, {}
        for part in parts:
            result = self.objective.loss(self.student, part, counts, self.objective.plan(step), CPU)
            result.total.backward()
            loss += float(result.total.detach())
            for name, value in result.terms.items():
                terms[name] = terms.get(name, 0.0) + float(value)
        return loss, terms, gradients(self.student)

    def reference(self, step=0):
        self.student.zero_grad(set_to_none=True)
        loss, terms = reference(self, step)
        loss.backward()
        return float(loss.detach()), terms, gradients(self.student)

    def check(self, step=0):
        """Check loss, reported terms and gradients against the reference; return the terms."""
        loss, terms, found = self.run(step)
        expected_loss, expected_terms, expected = self.reference(step)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert terms.keys() == expected_terms.keys()
        for name, value in expected_terms.items():
            assert terms[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        same_gradients(found, expected)
        return terms


class Threads(World):
    """Processes as threads of one."""

    meeting, table = None, None

    def gather(self, own):
        self.table[self.rank] = own
        self.meeting.wait()
        found = list(self.table)
        self.meeting.wait()
        return found

    def gather_rows(self, values, counts):
        by_rank = self.gather(values)
        assert [*map(len, by_rank)] == list(counts)
        return torch.cat(by_rank)

    def sum(self, values):
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]


def at_once(processes, work):
    """Return the results of ``work(world, rank)`` in each of some processes."""
    meeting, table = threading.Barrier(processes), [None] * processes
    found = [None] * processes

    def run(rank):
        world = Threads(rank, processes, CPU, CPU)
        object.__setattr__(world, "meeting", meeting)
        object.__setattr__(world, "table", table)
        try:
            found[rank] = work(world, rank)
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in found
    return found


def same_step(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-7)
    same_gradients(found[2], expected[2])
