"""SALT's choice of sequences, recomputed from each position; the steps it holds for."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train.config import CurriculumConfig, StudentConfig, TrainConfig
from rekindle.train.loop import train_student
from rekindle.train.order.held_out import Ranges, split_corpus
from rekindle.train.order.sequences import best_scored, first_steps
from rekindle.train.record.run_log import read_metrics
from rekindle.train.schedules import Schedule


def numbers_of(ranges):
    return ranges.select(np.arange(len(ranges), dtype=np.int64)).tolist()


def median(values):
    """By its definition, without NumPy's."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def salt_score(cache, index):
    """The median loss over the tokens that are among the teacher's ten best guesses."""
    (target,) = cache.example(index).targets["lm"]
    pairs = zip(target.gold_log_prob.tolist(), target.gold_rank.tolist(), strict=True)
    counted = [-log_prob for log_prob, rank in pairs if rank < 10]
    return median(counted) if counted else None


@pytest.mark.parametrize("highest", [True, False])
@pytest.mark.parametrize("keep", [0.01, 0.3, 1.0])
def test_the_kept_are_those_of_the_best_scores_of_salt(causal_world, keep, highest):
    cache = causal_world.open()
    train = split_corpus(cache, 0.1).train
    scores = {number: salt_score(cache, number) for number in numbers_of(train)}
    scored = {number: score for number, score in scores.items() if score is not None}
    assert len(scored) > 10
    config = CurriculumConfig(teacher="lm", keep=keep, highest=highest)
    kept = numbers_of(best_scored(cache, config, train))
    assert len(kept) == min(max(1, round(keep * len(scores))), len(scored))
    assert set(kept) <= set(scored)
    sign = 1 if highest else -1
    worst_kept = min(sign * scored[number] for number in kept)
    others = [sign * score for number, score in scored.items() if number not in set(kept)]
    assert all(score <= worst_kept for score in others)


def test_sequences_of_other_domains_than_the_teachers_are_not_kept(causal_world):
    cache = causal_world.open()
    everything = Ranges([(0, len(cache))])
    kept = numbers_of(best_scored(cache, CurriculumConfig(teacher="odd", keep=1.0), everything))
    assert 0 < len(kept) < len(cache)
    assert {cache.example(number).domain for number in kept} == {"odd"}
    even = [n for n in range(len(cache)) if cache.example(n).domain == "even"]
    with pytest.raises(InputError, match="no median_loss to any sequence"):
        best_scored(cache, CurriculumConfig(teacher="odd"), Ranges.of(np.array(even)))


def test_a_teacher_that_is_not_complete_is_refused(causal_world, tmp_path):
    shutil.copytree(causal_world.path, tmp_path / "cache")
    records = sorted((tmp_path / "cache/targets/lm/commits").glob("0*.json"))
    records[-1].unlink()
    cache = Cache.open(tmp_path / "cache")
    with pytest.raises(InputError, match=r"'lm' has targets for .*not scored"):
        best_scored(cache, CurriculumConfig(teacher="lm"), Ranges([(0, len(cache))]))


@given(st.integers(1, 5000), st.integers(1, 1000))
def test_it_ends_with_a_step_schedule_of_the_same_fraction(steps, thousandths):
    until = thousandths / 1000
    config = CurriculumConfig(teacher="lm", until=until)
    schedule = Schedule(schedule="step", start=1.0, end=0.0, over=until)
    first = first_steps(config, steps)
    assert first >= 1
    assert schedule.value(first - 1, steps) == 1.0
    assert first >= steps or schedule.value(first, steps) == 0.0
    assert math.isclose(first, until * steps, abs_tol=1.001)


# --- the whole method ---

W, UNTIL, STEPS, BATCH = 0.3, 0.17, 20, 4
GUIDED = 4  # steps 0..3 are those before 0.17 · 20 = 3.4


def salt(out, world, cache, **values):
    """Both stages of SALT, by the configuration alone."""
    first = {"schedule": "step", "over": UNTIL}
    objective = {
        "hard": {"weight": first | {"from": 1 - W, "to": 1.0}},
        "distill": [{"teachers": ["lm"], "weight": first | {"from": W, "to": 0.0}}],
    }
    quick = {
        "steps": STEPS,
        "batch_sequences": BATCH,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "evaluate_every": STEPS,
        "held_out": 0.1,
        "objective": objective,
        "curriculum": {"teacher": "lm", "keep": 0.25, "until": UNTIL},
    }
    student = StudentConfig(model=str(world.student), task="causal_lm")
    train_student(cache, student, parse_settings(TrainConfig, quick | values), out)
    return [record for record in read_metrics(out) if record["kind"] == "train"]


def test_loss_and_sequences_of_both_stages_are_those_of_salt(causal_world, tmp_path, monkeypatch):
    """L = (1 − w)·CE + w·KD on the hardest predictable quarter, then CE on all, no target read."""
    cache, read = causal_world.open(), []
    gather = cache.gather

    def watched(index, teachers, **options):
        read.append((index.tolist(), list(teachers)))
        return gather(index, teachers, **options)

    monkeypatch.setattr(cache, "gather", watched)
    records = salt(tmp_path / "run", causal_world, cache)
    for step, record in enumerate(records):
        guided = step < GUIDED
        assert ("kd/lm" in record) == guided
        loss = (1 - W) * record["ce"] + W * record["kd/lm"] if guided else record["ce"]
        assert record["loss"] == pytest.approx(loss, rel=1e-6)

    train = numbers_of(split_corpus(cache, 0.1).train)
    scores = {n: s for n in train if (s := salt_score(cache, n)) is not None}
    hardest = sorted(scores, key=scores.get, reverse=True)[: round(0.25 * len(train))]
    steps = [one for one in read if len(one[0]) == BATCH][:STEPS]
    assert [teachers for _, teachers in steps] == [["lm"]] * GUIDED + [[]] * (STEPS - GUIDED)
    guided = {number for index, _ in steps[:GUIDED] for number in index}
    assert guided <= set(hardest)
    after = [number for index, _ in steps[GUIDED:] for number in index]
    assert set(after) <= set(train)
    assert not set(after) <= set(hardest)
    assert len(set(after)) == len(after) <= len(train)  # within an epoch, each once


def test_the_scoring_teacher_is_a_part_of_what_a_run_is(causal_world, tmp_path):
    """Also where it teaches nothing."""
    objective = {"hard": {"weight": 1.0}}
    salt(tmp_path / "run", causal_world, causal_world.open(), steps=3, objective=objective)
    cache = json.loads((tmp_path / "run/run.json").read_text())["cache"]
    lm = causal_world.open().teacher("lm")
    assert cache["teachers"] == {"lm": lm.fingerprint}
    assert cache["teacher_seconds"] == {"lm": lm.seconds}
    assert lm.seconds > 0
