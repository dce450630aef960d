"""Self-evolution: masks that are what a model finds hard, and lessons of what it says unmasked.

The reference is transformers' own ``model(**inputs).logits`` on one sequence at a time, without
padding; none of our helpers takes part in it.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheMismatchError, CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import open_store
from rekindle.data.targets.hard_masks import hard_tokens
from rekindle.data.views.masking import MaskConfig
from rekindle.pipeline.caching import run_teacher
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.inspect import inspect_cache, inspect_example
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.config import RunConfig, dump_config, load_config
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.train_student import student_view, train_from_config
from rekindle.train.config import ObjectiveConfig, StudentConfig, TrainConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.evaluate import EvaluationData, evaluate
from rekindle.train.loop import train_student
from rekindle.train.objective.objective import Objective
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import build_student

CPU = torch.device("cpu")
HARD = 0.1
STEP = 1 / 1024  # nats: losses are stored to the nearest multiple of it
NOISE = 2e-4  # float32, between a padded batch and a sequence alone


@pytest.fixture(scope="module")
def learn(tmp_path_factory, make_model, wordpiece, configure):
    """learn(seed) -> a model that has learnt to read every second word of those it sees."""

    def make(seed: int) -> Path:
        start = make_model("bert", "AutoModelForMaskedLM", wordpiece, seed, initializer_range=0.1)
        path = tmp_path_factory.mktemp("learnt")
        shutil.copytree(start, path, dirs_exist_ok=True)
        text = tmp_path_factory.mktemp("text")
        cache_teachers(configure(text, []))
        rows = [torch.tensor(e.input_ids.astype(np.int64))[None] for e in examples(text)]
        taught = torch.cat([row[0] for row in rows]) % 2 == 0
        model = transformers.AutoModelForMaskedLM.from_pretrained(str(path)).eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(200):
            logits = torch.cat([model(row).logits[0] for row in rows])
            losses = F.cross_entropy(logits, torch.cat([row[0] for row in rows]), reduction="none")
            if (losses < HARD).float().mean() > 0.3:
                break
            optimizer.zero_grad()
            losses[taught].mean().backward()
            optimizer.step()
        model.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="module")
def model(learn) -> Path:
    return learn(3)


@functools.cache
def _loaded(directory: Path) -> Any:
    found = transformers.AutoModelForMaskedLM.from_pretrained(str(directory), dtype=torch.float32)
    return found.eval()


@torch.no_grad()
def log_probs_of(directory: Path, ids: Any) -> torch.Tensor:
    """The model's own log-probabilities [S,V] of one sequence that it sees as it is."""
    logits = _loaded(directory)(input_ids=torch.tensor([list(map(int, ids))])).logits[0]
    return torch.log_softmax(logits.double(), -1)


def losses_of(directory: Path, ids: Any) -> np.ndarray:
    """−log p [S] of every token of a sequence."""
    places = torch.arange(len(ids))
    return -log_probs_of(directory, ids)[places, torch.tensor(list(map(int, ids)))].numpy()


def content_of(ids: np.ndarray) -> np.ndarray:
    """Positions of real tokens: [PAD], [UNK], [CLS], [SEP], [MASK] are the tokens 0 to 4."""
    return np.flatnonzero((ids > 4) | (ids == 1))


@pytest.fixture(scope="module")
def evolve(configure, model):
    """evolve(path, mask={…}, teachers=[…], …) -> the configuration of a cache."""

    def make(path: Path, mask: Any = None, teachers: Any = (), corpus: Any = None, **first: Any):
        targets = {"targets": {"kind": "topk", "k": 12}}
        reference = {"name": "reference", "model": str(model), "task": "masked_lm", "view": "clean"}
        chosen = {"policy": "hard", "teacher": "reference"} | (mask or {})
        return configure(path, [reference | targets | first, *teachers], corpus, {"mask": chosen})

    return make


@pytest.fixture(scope="module")
def made(tmp_path_factory, evolve) -> tuple[Cache, RunConfig]:
    config = evolve(tmp_path_factory.mktemp("evolve") / "cache")
    cache_teachers(config)
    return Cache.open(config.cache.path), config


def masked_rows(cache: Cache, name: str | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """(masked positions, ids there) of every sequence, by the reader that students use."""
    batch = cache.gather(np.arange(len(cache)), [], masked_view=cache.masked_view(name).name)
    masked = batch.masked
    out = []
    for row in range(len(batch.index)):
        at = masked.positions[masked.rows == row]
        assert (masked.labels[masked.rows == row] == batch.input_ids[row, at]).all()
        out.append((at, masked.input_ids[row, at]))
    return out


# --- the clean pass -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["topk", "threshold", "random", "dense", "hidden"])
@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_every_kind_of_target_is_sound_and_audited(tmp_path, evolve, kind, packing):
    corpus = {"packing": packing, "limit_sequences": 6}
    targets = {"kind": kind} | ({} if kind in ("dense", "hidden") else {"k": 6})
    config = evolve(tmp_path, corpus=corpus, targets=targets)
    cache_teachers(config)
    assert verify_cache(str(tmp_path)).problems == []
    found = audit_cache(str(tmp_path), config, 6)["reference"]
    assert found["rows"] == sum(len(content_of(e.input_ids)) for e in examples(tmp_path))
    assert found.get("total_variation", found.get("kl")) < 1e-3


def examples(path: Path) -> list[Any]:
    cache = Cache.open(path)
    return [cache.example(index) for index in range(len(cache))]


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
    monkeypatch.setattr(run_teacher, "run_batches", None)  # no model may run
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


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of every committed file of views and targets, by unit."""
    store = open_store(path)
    folders = [f"views/{name}" for name in store.folders("views")]
    folders += [f"targets/{name}" for name in store.folders("targets")]
    return {
        f"{folder}/{unit}": (path / folder / commit.path).read_bytes()
        for folder in folders
        for unit, commit in ShardSet(store, folder).committed().items()
    }


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


def test_masked_teachers_see_the_hard_masks(tmp_path, evolve, model):
    second = {
        "name": "second",
        "model": str(model),
        "task": "masked_lm",
        "targets": {"kind": "topk", "k": 5},
    }
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


def test_masked_teachers_wait_for_the_masks(tmp_path, evolve, model):
    second = {
        "name": "second",
        "model": str(model),
        "task": "masked_lm",
        "targets": {"kind": "topk", "k": 5},
    }
    config = evolve(tmp_path, teachers=[second])
    with pytest.raises(InputError, match="--teacher reference first"):
        cache_teachers(config, only=["second"])
    cache_teachers(config, only=["reference"])
    cache_teachers(config, only=["second"])
    assert Cache.open(tmp_path).teacher("second").coverage == 1.0


def test_the_teacher_may_be_in_the_cache_alone(tmp_path, evolve, configure):
    config = evolve(tmp_path)
    cache_teachers(config)
    mask = {"policy": "hard", "teacher": "reference", "loss_above": 1.0}
    cache_teachers(configure(tmp_path, [], cache={"mask": mask}))
    assert len(Cache.open(tmp_path).views) == 2


BAD_MASKS = [
    ({"teacher": "nobody"}, {}, "there is no teacher 'nobody'"),
    ({}, {"view": None}, "give it view: clean"),
    ({}, {"view": "masked"}, "give it view: clean"),
    ({}, {"domains": ["odd"]}, "domains: null"),
]


@pytest.mark.parametrize(("mask", "first", "message"), BAD_MASKS)
def test_masks_that_cannot_be_made_are_refused(tmp_path, evolve, mask, first, message):
    with pytest.raises(InputError, match=message):
        cache_teachers(evolve(tmp_path, mask, **first))
    assert not (tmp_path / "targets").exists()


def test_experts_do_not_say_which_tokens_are_hard(tmp_path, configure, make_model, wordpiece):
    path = make_model("bert", "AutoModelForSequenceClassification", wordpiece)
    expert = {"name": "sense", "model": str(path), "task": "sequence_classification"}
    mask = {"mask": {"policy": "hard", "teacher": "sense"}}
    with pytest.raises(InputError, match="masked_lm teacher with view: clean"):
        cache_teachers(configure(tmp_path, [expert], cache=mask))


BAD_KEYS = [
    ({"mask": {"policy": "hard"}}, "needs teacher"),
    ({"mask": {"policy": "hard", "teacher": "a", "unit": "word"}}, "unit has no meaning"),
    ({"mask": {"policy": "hard", "teacher": "a", "probability": 0.3}}, "probability has no"),
    ({"mask": {"policy": "random", "teacher": "a"}}, "teacher has no meaning"),
    ({"mask": {"loss_above": 0.3}}, "loss_above has no meaning"),
    ({"mask": {"policy": "cover", "limit": 0.3}}, "limit has no meaning"),
]


@pytest.mark.parametrize(("cache", "message"), BAD_KEYS)
def test_keys_of_other_policies_are_refused(tmp_path, configure, cache, message):
    with pytest.raises(InputError, match=message):
        configure(tmp_path, [], cache=cache)


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification", "token_classification"])
def test_a_view_is_for_masked_lms(tmp_path, configure, task):
    with pytest.raises(InputError, match="view is for masked_lm teachers"):
        configure(tmp_path, [{"name": "a", "model": "m", "task": task, "view": "clean"}])


def test_a_dumped_configuration_is_the_same(tmp_path, evolve):
    for mask in ({}, {"mask_token": 0.7}, {"random_token": 0.1, "mask_token": 0.8}):
        config = evolve(tmp_path / "c", mask)
        (tmp_path / "run.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("values", "shares"),
    [
        ({}, (1.0, 0.0)),
        ({"mask_token": 1.0}, (1.0, 0.0)),
        ({"mask_token": 0.7}, (0.7, 0.0)),
        ({"random_token": 0.25}, (0.75, 0.25)),
        ({"mask_token": 0.8, "random_token": 0.1}, (0.8, 0.1)),
    ],
)
def test_what_is_not_given_of_the_replacements_is_as_described(values, shares):
    hard = {"policy": "hard", "teacher": "reference"}
    config = parse_settings(MaskConfig, hard | values)
    assert (config.mask_token, config.random_token) == shares


def test_another_view_under_the_same_name_is_refused(tmp_path, evolve, configure, model):
    cache_teachers(evolve(tmp_path))
    masked = {
        "name": "reference",
        "model": str(model),
        "task": "masked_lm",
        "targets": {"kind": "topk", "k": 12},
    }
    with pytest.raises(CacheMismatchError, match="view: 'clean' there"):
        cache_teachers(configure(tmp_path, [masked]))


# --- the plan -------------------------------------------------------------------------------------


def test_a_plan_bounds_what_is_not_known_yet(tmp_path, evolve, model):
    second = {
        "name": "second",
        "model": str(model),
        "task": "masked_lm",
        "targets": {"kind": "topk", "k": 5},
    }
    config = evolve(tmp_path, {"limit": 0.5}, teachers=[second])
    before = plan_run(config, probe=True)
    work = {teacher.name: teacher for teacher in before.teachers}
    assert not tmp_path.exists() or not any(tmp_path.iterdir())
    cache_teachers(config)
    cache = Cache.open(tmp_path)
    assert [view.units_to_make for view in before.views] == [3]
    assert before.views[0].name == cache.masked_view().name
    assert before.views[0].at_most
    assert "at most" in before.as_text()
    assert work["reference"].units_to_make == work["second"].units_to_make == 3
    assert work["reference"].positions == cache.teacher("reference").positions
    assert work["second"].positions >= cache.teacher("second").positions
    assert (work["reference"].replicas, work["second"].replicas) == (1, 1)
    assert all(teacher.seconds > 0 for teacher in before.teachers)
    after = plan_run(config, probe=False)
    assert [t.units_to_make for t in after.teachers] == [0, 0]
    assert after.views[0].units_present == 3


# --- the student ----------------------------------------------------------------------------------

SELF_EVOLUTION = {
    "hard": {"weight": 0.9},
    "distill": [{"teachers": ["reference"], "weight": 0.1}],
}


def with_student(config: RunConfig, **train: Any) -> RunConfig:
    values = config.model_dump(mode="json", by_alias=True)
    values["student"] = {"model": config.teachers[0].model}
    small = {"steps": 4, "batch_sequences": 3, "warmup_steps": 1, "held_out": 0.3}
    values["train"] = small | {"objective": SELF_EVOLUTION} | train
    return parse_settings(RunConfig, values)


class Step:
    """One step of a student over all sequences of a cache."""

    def __init__(self, cache: Cache, student: Path, objective: Any = SELF_EVOLUTION):
        self.cache = cache
        config = parse_settings(ObjectiveConfig, objective)
        infos = {name: cache.teacher(name).info for t in config.distill for name in t.teachers}
        self.objective = Objective(config, infos, "masked_lm", 10)
        size = cache.corpus.info["tokenizer"]["size"]
        self.student = build_student(StudentConfig(model=str(student)), {}, size, 0).eval()

    def run(self, index: np.ndarray, view: str | None = None, micro: int = 99):
        """(loss, terms, gradients) over the sequences ``index``."""
        name = self.cache.masked_view(view).name
        names = self.objective.teachers_at(0)
        batch = self.objective.select(self.cache.gather(index, names, masked_view=name), 0)
        counts = self.objective.counts(batch, 0)
        self.student.zero_grad(set_to_none=True)
        loss, terms = 0.0, {}
        for part in split_batch(batch, micro):
            result = self.objective.loss(self.student, part, counts, 0, CPU)
            result.total.backward()  # also of a micro-batch in which nothing is masked
            loss += float(result.total.detach())
            for key, value in result.terms.items():
                terms[key] = terms.get(key, 0.0) + float(value)
        return loss, terms, self.gradients()

    def gradients(self) -> dict[str, torch.Tensor]:
        named = self.student.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None}

    def masked_logits(self, index: np.ndarray, view: str | None = None):
        """Per sequence: the student's logits [P,V] where something is masked, labels, positions."""
        rows = masked_rows(self.cache, view)
        size = self.cache.corpus.info["tokenizer"]["size"]
        for number in index.tolist():
            ids = self.cache.example(number).input_ids.astype(np.int64)
            positions, shown = rows[number]
            seen = ids.copy()
            seen[positions] = shown
            logits = self.student.model(input_ids=torch.tensor(seen)[None]).logits[0, :, :size]
            yield number, logits[positions], torch.tensor(ids[positions]), positions


def same_gradients(found: Any, expected: Any) -> None:
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-4
    for name in found.keys() | expected.keys():
        zero = torch.zeros(())
        gap = (found.get(name, zero) - expected.get(name, zero)).abs().max()
        assert float(gap) <= 5e-5 * scale, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory, evolve) -> tuple[Cache, RunConfig]:
    """Every probability of the reference is kept: k = V."""
    config = evolve(tmp_path_factory.mktemp("whole") / "cache", targets={"kind": "dense"})
    cache_teachers(config)
    return Cache.open(config.cache.path), config


@pytest.fixture(scope="module")
def student(make_model, wordpiece) -> Path:
    return make_model("bert", "AutoModelForMaskedLM", wordpiece, 9, initializer_range=0.2)


@pytest.mark.parametrize("micro", [99, 5, 1])
def test_the_loss_is_token_specific_smoothing(whole, student, model, micro):
    """0.9·CE + 0.1·KL, whose gradient is that of the cross-entropy with the smoothed target."""
    cache, _ = whole
    step, index = Step(cache, student), np.arange(1, 11)
    loss, terms, gradients = step.run(index, micro=micro)
    step.student.zero_grad(set_to_none=True)
    smoothed, ce, kl, rows = torch.zeros(()), 0.0, 0.0, 0
    for number, logits, labels, positions in step.masked_logits(index):
        reference = log_probs_of(model, cache.example(number).input_ids)[positions]
        own = torch.log_softmax(logits.double(), -1)
        one_hot = F.one_hot(labels, own.shape[1]).double()
        smoothed = smoothed - ((0.9 * one_hot + 0.1 * reference.exp()) * own).sum()
        ce += float(F.nll_loss(own.detach(), labels, reduction="sum"))
        kl += float((reference.exp() * (reference - own.detach())).sum())
        rows += len(labels)
    assert rows > 50
    (smoothed / rows).backward()
    same_gradients(gradients, step.gradients())
    assert terms["ce"] == pytest.approx(ce / rows, rel=1e-5)
    assert terms["kd/reference"] == pytest.approx(kl / rows, rel=1e-4)
    assert loss == pytest.approx(0.9 * ce / rows + 0.1 * kl / rows, rel=1e-5)


def test_top_k_with_its_tail_is_the_loss_of_a_sparse_reference(made, student):
    cache, _ = made
    step, index = Step(cache, student), np.arange(12)
    loss, terms, _ = step.run(index)
    ce, kl, rows = 0.0, 0.0, 0
    for number, logits, labels, positions in step.masked_logits(index):
        (target,) = cache.example(number).targets["reference"]
        place = np.searchsorted(target.positions, positions)
        own = torch.log_softmax(logits.double(), -1).detach()
        q = torch.tensor(np.exp(target.log_probs[place].astype(np.float64)))
        tail = torch.tensor(np.exp(target.log_tail[1.0][place].astype(np.float64)))
        q = q / q.sum(1, keepdim=True) * (1 - tail)[:, None]
        p = own.gather(1, torch.tensor(target.ids[place]))
        rest = 1 - p.exp().sum(1)
        kl += float((q * (q.log() - p)).sum() + (tail * (tail.log() - rest.log())).sum())
        ce += float(F.nll_loss(own, labels, reduction="sum"))
        rows += len(labels)
    assert terms["kd/reference"] == pytest.approx(kl / rows, rel=1e-3)
    assert loss == pytest.approx(0.9 * ce / rows + 0.1 * kl / rows, rel=1e-3)


def test_clean_targets_teach_under_random_masks_too(tmp_path, configure, model, student):
    """Only where something is masked: elsewhere the student has no loss."""
    reference = {"name": "reference", "model": str(model), "task": "masked_lm", "view": "clean"}
    config = configure(tmp_path, [reference | {"targets": {"kind": "dense"}}])
    config = parse_settings(
        RunConfig, config.model_dump(mode="json") | {"student": {"model": str(student)}}
    )
    cache_teachers(config)
    cache = Cache.open(tmp_path)
    assert cache.masked_view().replicas == 2
    objective = {"hard": {"weight": 0}, "distill": [{"teachers": ["reference"]}]}
    step, index = Step(cache, student, objective), np.arange(12)
    loss, _, _ = step.run(index)
    kl, rows = 0.0, 0
    for number, logits, _, positions in step.masked_logits(index):
        reference = log_probs_of(model, cache.example(number).input_ids)[positions]
        own = torch.log_softmax(logits.double(), -1).detach()
        kl, rows = kl + float((reference.exp() * (reference - own)).sum()), rows + len(positions)
    assert loss == pytest.approx(kl / rows, rel=1e-4)


@pytest.fixture(scope="module")
def two(tmp_path_factory, configure, model, make_model, wordpiece) -> tuple[Cache, RunConfig]:
    """Two references that see the text as it is, and random masks."""
    other = make_model("bert", "AutoModelForMaskedLM", wordpiece, 6, initializer_range=0.3)
    shared = {"task": "masked_lm", "view": "clean", "targets": {"kind": "dense"}}
    config = configure(
        tmp_path_factory.mktemp("two") / "cache",
        [
            {"name": "one", "model": str(model), **shared},
            {"name": "two", "model": str(other), **shared},
        ],
        cache={"mask": {"policy": "random", "probability": 0.3}},
    )
    values = config.model_dump(mode="json") | {"student": {"model": str(model)}}
    config = parse_settings(RunConfig, values)
    cache_teachers(config)
    return Cache.open(config.cache.path), config


COMBINED = [
    {"combine": "mixture"},
    {"combine": "route"},
    {"positions": "masked"},
    {"entropy_fraction": 0.5},
    {"divergence": "reverse_kl"},
]


@pytest.mark.parametrize("settings", COMBINED, ids=str)
def test_clean_references_combine_as_others_do(two, student, settings):
    cache, config = two
    objective = {"hard": {"weight": 0}, "distill": [{"teachers": ["one", "two"], **settings}]}
    step, index = Step(cache, student, objective), np.arange(12)
    loss, _, _ = step.run(index)
    sums, rows = [0.0, 0.0], 0
    for number, logits, _, positions in step.masked_logits(index):
        ids = cache.example(number).input_ids
        q = [log_probs_of(Path(t.model), ids)[positions].exp() for t in config.teachers]
        q = [(q[0] + q[1]) / 2] if settings.get("combine") == "mixture" else q
        q = q[:1] if settings.get("combine") == "route" else q
        log_p = torch.log_softmax(logits.detach().double(), -1)
        kept = torch.arange(len(positions))
        if "entropy_fraction" in settings:
            entropy = -(log_p.exp() * log_p).sum(1)
            kept = entropy.argsort(descending=True)[: -(-len(positions) // 2)]
        for place, one in enumerate(q):
            reverse = settings.get("divergence") == "reverse_kl"
            d = log_p.exp() * (log_p - one.log()) if reverse else one * (one.log() - log_p)
            sums[place] += float(d.sum(1)[kept].sum())
        rows += len(kept)
    assert loss == pytest.approx(sum(sums) / rows, rel=1e-4)


def test_an_evaluation_compares_at_the_masked_positions(two, student):
    cache, _ = two
    step, index = Step(cache, student, {}), np.arange(3, 12)
    name = cache.masked_view().name
    data = EvaluationData(cache, index, ("one", "two"), name, batch_sequences=4)
    found = evaluate(step.student, data, CPU)
    sums, agree, rows = 0.0, 0, 0
    for number, logits, _, positions in step.masked_logits(index):
        (target,) = cache.example(number).targets["one"]
        q = torch.tensor(target.log_probs[np.searchsorted(target.positions, positions)]).double()
        log_p = torch.log_softmax(logits.detach().double(), -1)
        sums += float((q.exp() * (q - log_p)).sum())
        agree += int((q.argmax(1) == log_p.argmax(1)).sum())
        rows += len(positions)
    assert found["kl/one"] == pytest.approx(sums / rows, rel=1e-4)
    assert found["agreement/one"] == pytest.approx(agree / rows)


@pytest.fixture(scope="module")
def rarely(tmp_path_factory, evolve) -> tuple[Cache, RunConfig]:
    """Few tokens are hard, and in half of the sequences none."""
    path = tmp_path_factory.mktemp("rarely") / "cache"
    cache_teachers(evolve(path))
    hardest = [hard.losses.max() for hard in Cache.open(path).hard_positions("reference")]
    config = evolve(path, {"loss_above": float(np.median(hardest))})
    cache_teachers(config)
    return Cache.open(path), config


def test_a_sequence_without_a_hard_token_weighs_nothing(rarely, student):
    cache, config = rarely
    view = student_view(cache, with_student(config))
    counts = np.array([len(positions) for positions, _ in masked_rows(cache, view)])
    without, some = np.flatnonzero(counts == 0), np.flatnonzero(counts)
    assert min(len(without), len(some)) >= 2
    step, every = Step(cache, student), np.concatenate([without, some])
    alone, both = step.run(some, view), step.run(every, view, micro=1)
    assert both[0] == pytest.approx(alone[0], rel=1e-5)
    same_gradients(both[2], alone[2])
    loss, terms, gradients = step.run(without, view)
    assert loss == 0
    assert all(value == 0 for value in terms.values())
    assert all(not g.any() for g in gradients.values())


def test_a_whole_run_survives_steps_without_a_hard_token(rarely, tmp_path):
    config = with_student(
        rarely[1], batch_sequences=1, steps=8, evaluate_every=4, checkpoint_every=4
    )
    train_from_config(config, tmp_path / "run")
    covered = json.loads((tmp_path / "run" / "summary.json").read_text())["coverage"]
    assert covered["positions_ce_only"] == covered["positions_neither"] == 0
    assert covered["sequences_ce_only"] > 0
    assert covered["sequences_with_kd"] + covered["sequences_ce_only"] == 8


def test_a_run_counts_what_it_taught_and_says_what_was_seen(made, tmp_path):
    cache, config = made
    config = with_student(config, evaluate_every=2)
    train_from_config(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    covered = summary["coverage"]
    assert covered["positions_with_kd"] > 0
    assert covered["positions_ce_only"] == covered["positions_neither"] == 0
    made_by = json.loads((tmp_path / "run" / "run.json").read_text())["cache"]
    assert made_by["masked_view"] == cache.masked_view().name
    assert made_by["teacher_views"] == {"reference": "clean"}
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "kl/reference" in metrics


def test_other_masks_are_another_run(made, tmp_path):
    _, config = made
    first = with_student(config)
    cache_teachers(with_mask(first, loss_above=2.0))
    train_from_config(first, tmp_path / "run")
    with pytest.raises(CheckpointError, match="masked_view"):
        train_from_config(with_mask(first, loss_above=2.0), tmp_path / "run", resume=True)


def with_mask(config: RunConfig, **mask: Any) -> RunConfig:
    changed = config.cache.mask.model_copy(update=mask)
    return config.model_copy(update={"cache": config.cache.model_copy(update={"mask": changed})})


def test_masks_that_were_not_made_are_named(made):
    _, config = made
    with pytest.raises(InputError, match="pipeline cache-teachers"):
        student_view(Cache.open(config.cache.path), with_student(with_mask(config, limit=0.123)))


BAD_TERMS = [
    (
        [{"teachers": ["reference", "second"], "combine": "mixture"}],
        "saw different views",
    ),
    ([{"teachers": ["reference"], "temperature": 7.0}], "stores the temperatures"),
]


@pytest.mark.parametrize(("terms", "message"), BAD_TERMS)
def test_lessons_that_make_no_sense_are_refused(tmp_path, evolve, model, student, terms, message):
    second = {
        "name": "second",
        "model": str(model),
        "task": "masked_lm",
        "targets": {"kind": "topk", "k": 5},
    }
    config = evolve(tmp_path, teachers=[second], corpus={"limit_sequences": 2})
    cache_teachers(config)
    with pytest.raises(InputError, match=message):
        Step(Cache.open(tmp_path), student, {"distill": terms})


def test_a_run_teaches_the_next_generation(made, tmp_path, evolve):
    """The reference may be an earlier student: its directory is a model like any other."""
    _, config = made
    train_from_config(with_student(config), tmp_path / "run")
    second = evolve(tmp_path / "second", model=str(tmp_path / "run"), corpus={"limit_sequences": 4})
    cache_teachers(second)
    cache = Cache.open(tmp_path / "second")
    for example in (cache.example(index) for index in range(4)):
        (target,) = example.targets["reference"]
        losses = losses_of(tmp_path / "run", example.input_ids)[target.positions]
        assert np.abs(-target.gold_log_prob - losses).max() <= STEP / 2 + NOISE


# --- the recipe -----------------------------------------------------------------------------------


def test_the_recipe_masks_and_teaches_as_published(tmp_path, corpus_file, wordpiece, model):
    recipe = Path(run_teacher.__file__).parents[1] / "recipes" / "self-evolution.yaml"
    small = [f"corpus.source=[{corpus_file}]", f"corpus.tokenizer={wordpiece}"]
    small += [f"teachers.reference.model={model}", f"student.model={model}"]
    small += [f"cache.path={tmp_path / 'cache'}", "corpus.limit_sequences=40"]
    small += ["train.steps=3", "train.batch_sequences=4"]
    config = load_config(recipe, [*small, "cache.mask.limit=null"])
    assert (config.cache.mask.loss_above, config.teachers[0].view) == (HARD, "clean")
    hard, (distill,) = config.train.objective.hard, config.train.objective.distill
    assert (hard.weight, distill.weight, distill.temperature) == (0.9, 0.1, 1.0)
    cache_teachers(config)
    cache = Cache.open(tmp_path / "cache")
    for example, (positions, _) in zip(
        examples(tmp_path / "cache"), masked_rows(cache), strict=True
    ):
        content = content_of(example.input_ids)
        losses = losses_of(model, example.input_ids)[content]
        unclear = int((np.abs(losses - HARD) <= STEP / 2 + NOISE).sum())
        assert abs(len(positions) - int((losses > HARD).sum())) <= unclear
    train_from_config(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["coverage"]["positions_with_kd"] > 0
    assert summary["coverage"]["positions_ce_only"] == 0


# --- with other methods ---------------------------------------------------------------------------


def test_hard_masks_and_clean_targets_serve_other_methods(tmp_path, evolve, model):
    """Routing, the least certain positions, a curriculum by the clean teacher's losses, and
    replacements by a teacher that was shown the hard masks: in one run, in micro-batches as whole.
    """
    masked_lm = {"model": str(model), "task": "masked_lm", "targets": {"k": 12}}
    teachers = [masked_lm | {"name": "again", "view": "clean"}, masked_lm | {"name": "masked"}]
    config = evolve(tmp_path / "cache", {"limit": 0.3}, teachers)
    cache_teachers(config)
    quiet = shutil.copytree(model, tmp_path / "without-dropout")
    about = json.loads((quiet / "config.json").read_text())
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (quiet / "config.json").write_text(json.dumps(about | dropout))
    student = StudentConfig(model=str(quiet), task="replaced_token_detection")
    cache = Cache.open(config.cache.path)
    view = student_view(cache, config.model_copy(update={"student": student}))
    term = {"teachers": ["reference", "again"], "combine": "route", "entropy_fraction": 0.5}
    values = {
        **{"steps": 4, "batch_sequences": 4, "warmup_steps": 1, "held_out": 0.2},
        **{"evaluate_every": 2, "checkpoint_every": 4},
        "curriculum": {"teacher": "reference", "score": "hard_share", "until": 0.5},
        "objective": {
            "hard": {"weight": 0.9},
            "distill": [term | {"weight": 0.1}],
            "methods": [{"method": "replaced_tokens", "teacher": "masked"}],
        },
    }
    losses = []
    for size in (None, 1):
        train = parse_settings(TrainConfig, values | {"micro_batch_sequences": size})
        out = tmp_path / f"run-{size}"
        result = train_student(cache, student, train, out, masked_view=view)
        assert {"kl/reference", "kl/again", "replaced_tokens/f1"} <= result.evaluation.keys()
        steps = [r for r in read_metrics(out) if r["kind"] == "train"]
        losses.append([(r["kd/reference+again"], r["replaced_tokens/loss"]) for r in steps])
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), rel=1e-3)
