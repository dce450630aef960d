"""Self-evolution: the clean pass of a model, and masks that are what it finds hard."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.storage.shards import ShardSet
from rekindle.data.targets.reading.hard_masks import hard_tokens
from rekindle.pipeline.caching import compute_unit
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.inspect import inspect_cache, inspect_example
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.text import format_plan
from rekindle.pipeline.train_student import student_view
from testlib.run_alone import NOISE
from testlib.self_evolution import (
    HARD,
    STEP,
    content_of,
    contents,
    examples,
    log_probs_of,
    losses_of,
    masked_rows,
    with_student,
)


def test_the_clean_pass_has_a_target_at_every_token(made, model):
    cache, _ = made
    teacher = cache.teacher("reference")
    assert (teacher.info.task, teacher.info.view) == ("masked_lm", "clean")
    assert (teacher.coverage, teacher.replicas, teacher.masked) == (1.0, 1, False)
    for example in (cache.example(i) for i in range(len(cache))):
        (target,) = example.targets["reference"]
        exact = log_probs_of(model, example.input_ids)
        content = content_of(example.input_ids)
        assert target.replica is None
        assert (target.input_ids == example.input_ids).all()
        assert target.positions.tolist() == content.tolist()
        # The target at a position is about the token that stands there.
        assert target.gold_ids.tolist() == example.input_ids[content].tolist()
        gold = exact[content, example.input_ids[content].astype(np.int64)].numpy()
        assert np.abs(target.gold_log_prob - gold).max() <= STEP / 2 + NOISE
        best = torch.topk(exact[content], 12).values.numpy()
        kept = np.take_along_axis(exact[content].numpy(), target.ids, axis=1)
        assert np.abs(kept - best).max() <= NOISE
        above = (exact[content].numpy() > gold[:, None] + NOISE).sum(axis=1)
        assert (target.gold_rank >= above).all()
        entropy = -(exact[content].exp() * exact[content]).sum(1).numpy()
        assert np.abs(target.entropy - entropy).max() <= STEP / 2 + NOISE


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["topk", "threshold", "random", "dense", "hidden"])
@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_every_kind_of_target_is_sound_and_audited(tmp_path, evolve, kind, packing):
    corpus = {"packing": packing, "limit_sequences": 6}
    targets = {"kind": kind} | ({} if kind in ("dense", "hidden") else {"k": 6})
    config = evolve(tmp_path, corpus=corpus, targets=targets)
    cache_teachers(config)
    assert verify_cache(str(tmp_path)).problems == []
    found = audit_cache(str(tmp_path), config, 6).values["reference"]
    assert found["rows"] == sum(len(content_of(e.input_ids)) for e in examples(tmp_path))
    assert found.get("total_variation", found.get("kl")) < 1e-3


def test_the_audit_knows_another_view(made):
    _, config = made
    teachers = [config.teachers[0].model_copy(update={"view": "masked"})]
    other = config.model_copy(update={"teachers": tuple(teachers)})
    with pytest.raises(InputError, match="its view differs"):
        audit_cache(config.cache.path, other, 2)


def test_a_compact_cache_gives_the_same_masks(tmp_path, evolve, made):
    """Its record batches are of other sizes than the corpus's."""
    config = evolve(tmp_path, targets={"kind": "topk", "k": 12, "codec": "compact"})
    cache_teachers(config)
    found = Cache.open(tmp_path)
    assert found.teacher("reference").info.rows_per_batch == 128
    for (a, _), (b, _) in zip(masked_rows(found), masked_rows(made[0]), strict=True):
        assert a.tolist() == b.tolist()


def test_inspect_shows_both_views(made):
    cache, config = made
    facts = json.loads(inspect_cache(config.cache.path, as_json=True))
    assert facts["teachers"]["reference"]["view"] == "clean"
    assert facts["corpus"]["views"] == {cache.masked_view().name: 1}
    assert "reference: " in inspect_example(config.cache.path, 0, None)
    assert (
        json.loads((Path(config.cache.path) / "cache.json").read_text())["teachers"]["reference"][
            "view"
        ]
        == "clean"
    )


# --- the masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", [HARD, 1.0, 4.0])
def test_masks_are_exactly_what_the_model_finds_hard(tmp_path, evolve, model, above):
    config = evolve(tmp_path, {"loss_above": above})
    cache_teachers(config)
    cache = Cache.open(tmp_path)
    hard = easy = 0
    for example, (positions, ids) in zip(examples(tmp_path), masked_rows(cache), strict=True):
        losses = losses_of(model, example.input_ids)
        for place in range(len(losses)):
            if place not in content_of(example.input_ids):
                assert place not in positions
            elif abs(losses[place] - above) > STEP / 2 + NOISE:
                assert (place in positions) == (losses[place] > above), (example.index, place)
                hard, easy = hard + (losses[place] > above), easy + (losses[place] <= above)
        assert (ids == cache.corpus.info["tokenizer"]["mask_id"]).all()
    assert min(hard, easy) > 10


def test_the_masks_are_hard_positions_of_the_cache(made):
    cache, _ = made
    found = [hard.positions.tolist() for hard in cache.hard_positions("reference", HARD)]
    assert found == [positions.tolist() for positions, _ in masked_rows(cache)]


@given(
    st.lists(st.floats(0, 64, width=32), max_size=40),
    st.floats(0, 8, width=32),
    st.none() | st.floats(0.01, 1),
)
def test_hard_tokens_are_those_of_plain_loops(losses, above, limit):
    found = hard_tokens(np.array(losses, np.float32), above, limit).tolist()
    hard = [place for place, loss in enumerate(losses) if loss > above]
    if limit is not None:
        hard = sorted(hard, key=lambda place: (-losses[place], place))
        while len(hard) > max(1, limit * len(losses) + 1e-9):
            hard.pop()
    assert found == sorted(hard)


def test_a_limit_takes_the_hardest_first(tmp_path, evolve, model):
    cache_teachers(evolve(tmp_path, {"limit": 0.25}))
    for example, (positions, _) in zip(
        examples(tmp_path), masked_rows(Cache.open(tmp_path)), strict=True
    ):
        content = content_of(example.input_ids)
        losses = losses_of(model, example.input_ids)
        assert len(positions) == min((losses[content] > HARD).sum(), max(1, len(content) // 4))
        left = np.setdiff1d(content, positions)
        least = losses[positions].min(initial=np.inf)
        assert least > losses[left].max(initial=0) - STEP - NOISE


def test_shares_of_other_replacements_apply(tmp_path, evolve):
    cache_teachers(evolve(tmp_path, {"mask_token": 0.5, "random_token": 0.2}))
    cache = Cache.open(tmp_path)
    mask = cache.corpus.info["tokenizer"]["mask_id"]
    kept = swapped = hidden = 0
    for example, (positions, ids) in zip(examples(tmp_path), masked_rows(cache), strict=True):
        same = ids == example.input_ids[positions]
        hidden += int((ids == mask).sum())
        kept, swapped = kept + int(same.sum()), swapped + int((~same & (ids != mask)).sum())
    total = hidden + kept + swapped
    assert abs(hidden / total - 0.5) < 0.15
    assert abs(kept / total - 0.3) < 0.15
    assert swapped > 0


def test_what_decides_the_masks_is_in_the_name(tmp_path, evolve, make_model, wordpiece):
    another = str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 4))
    changes: list[tuple[Any, Any]] = [
        ({}, {}),
        ({"loss_above": 0.2}, {}),
        ({"limit": 0.5}, {}),
        ({"mask_token": 0.8, "random_token": 0.0}, {}),
        ({}, {"model": another}),
    ]
    names = set()
    for number, (mask, teacher) in enumerate(changes):
        config = evolve(tmp_path / str(number), mask, corpus={"limit_sequences": 2}, **teacher)
        cache_teachers(config)
        names.add(Cache.open(config.cache.path).masked_view().name)
    assert len(names) == len(changes)


def test_another_threshold_is_another_view_of_one_pass(tmp_path, evolve, monkeypatch):
    cache_teachers(evolve(tmp_path))
    before = contents(tmp_path)
    monkeypatch.setattr(compute_unit, "run_batches", None)  # no model may run
    again = evolve(tmp_path, {"loss_above": 2.0})
    done = cache_teachers(again)
    assert done.units_done == 0
    after = contents(tmp_path)
    assert before.items() <= after.items()
    cache = Cache.open(tmp_path)
    views = [student_view(cache, with_student(c)) for c in (evolve(tmp_path), again)]
    assert len(set(views)) == 2
    counts = [sum(len(p) for p, _ in masked_rows(cache, view)) for view in views]
    assert counts[0] > counts[1] > 0


def test_killed_while_the_masks_are_made_and_resumed_gives_the_same_bytes(
    tmp_path, evolve, made, monkeypatch
):
    expected = contents(Path(made[1].cache.path))
    config, write = evolve(tmp_path), ShardSet.write
    written: list[str] = []

    def once(self, unit, *arguments, **options):
        if self.folder.startswith(("views", "targets")):
            if written:
                raise KeyboardInterrupt
            written.append(unit)
        return write(self, unit, *arguments, **options)

    monkeypatch.setattr(ShardSet, "write", once)
    for count in range(1, len(expected)):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            cache_teachers(config)
        found = contents(tmp_path)
        assert len(found) == count
        # The teacher's three shards come first, and then the masks'.
        assert sum(name.startswith("views") for name in found) == max(0, count - 3)
    written.clear()
    cache_teachers(config)
    assert contents(tmp_path) == expected


def test_a_growing_corpus_extends_the_masks(tmp_path, evolve, made):
    cache_teachers(evolve(tmp_path, corpus={"limit_sequences": 5}))
    before = contents(tmp_path)
    name = Cache.open(tmp_path).masked_view().name
    cache_teachers(evolve(tmp_path))
    assert before.items() <= contents(tmp_path).items()
    assert Cache.open(tmp_path).masked_view().name == name
    found, expected = masked_rows(Cache.open(tmp_path)), masked_rows(made[0])
    assert len(found) == 12
    for (a, b), (c, d) in zip(found, expected, strict=True):
        assert (a.tolist(), b.tolist()) == (c.tolist(), d.tolist())


def test_masks_of_a_teacher_whose_k_has_grown(tmp_path, evolve):
    cache_teachers(
        evolve(tmp_path, corpus={"limit_sequences": 5}, targets={"kind": "topk", "k": 4})
    )
    cache_teachers(evolve(tmp_path, targets={"kind": "topk", "k": 8}))
    cache = Cache.open(tmp_path)
    assert cache.teacher("reference").info.k == 8
    assert len(masked_rows(cache)) == 12
    assert verify_cache(str(tmp_path)).problems == []


def test_a_lost_shard_of_masks_is_made_again(tmp_path, evolve, made):
    shutil.copytree(made[1].cache.path, tmp_path / "c")
    before = contents(tmp_path / "c")
    victim = next((tmp_path / "c" / "views").rglob("*.arrow"))
    victim.write_bytes(victim.read_bytes()[:-9])
    cache_teachers(evolve(tmp_path / "c"))
    assert contents(tmp_path / "c") == before


# --- other teachers of the same file --------------------------------------------------------------


def test_masked_teachers_see_the_hard_masks(tmp_path, evolve, model, second):
    config = evolve(tmp_path, teachers=[second])
    # Whatever their order in the file: masks are made in between.
    config = config.model_copy(update={"teachers": config.teachers[::-1]})
    cache_teachers(config)
    cache = Cache.open(tmp_path)
    assert cache.teacher("second").info.view == cache.masked_view().name
    assert cache.teacher("second").coverage == 1.0
    assert verify_cache(str(tmp_path)).problems == []
    for example, (positions, ids) in zip(examples(tmp_path), masked_rows(cache), strict=True):
        (target,) = example.targets["second"]
        assert target.positions.tolist() == positions.tolist()
        seen = example.input_ids.copy()
        seen[positions] = ids
        exact = log_probs_of(model, seen)[positions, example.input_ids[positions].astype(int)]
        assert np.abs(target.gold_log_prob - exact.numpy()).max(initial=0) <= STEP / 2 + NOISE
    assert cache_teachers(config).units_done == 0


def test_masked_teachers_wait_for_the_masks(tmp_path, evolve, second):
    config = evolve(tmp_path, teachers=[second])
    with pytest.raises(InputError, match="--teacher reference first"):
        cache_teachers(config, only=["second"])
    cache_teachers(config, only=["reference"])
    cache_teachers(config, only=["second"])
    assert Cache.open(tmp_path).teacher("second").coverage == 1.0


# --- the plan -------------------------------------------------------------------------------------


def test_a_plan_bounds_what_is_not_known_yet(tmp_path, evolve, second):
    config = evolve(tmp_path, {"limit": 0.5}, teachers=[second])
    before = plan_run(config, probe=True)
    work = {teacher.name: teacher for teacher in before.teachers}
    assert not tmp_path.exists() or not any(tmp_path.iterdir())
    cache_teachers(config)
    cache = Cache.open(tmp_path)
    assert [view.units_to_make for view in before.views] == [3]
    assert before.views[0].name == cache.masked_view().name
    assert before.views[0].at_most
    assert "at most" in format_plan(before)
    assert work["reference"].units_to_make == work["second"].units_to_make == 3
    assert work["reference"].positions == cache.teacher("reference").positions
    assert work["second"].positions >= cache.teacher("second").positions
    assert (work["reference"].replicas, work["second"].replicas) == (1, 1)
    assert all(teacher.seconds > 0 for teacher in before.teachers)
    after = plan_run(config, probe=False)
    assert [t.units_to_make for t in after.teachers] == [0, 0]
    assert after.views[0].units_present == 3
