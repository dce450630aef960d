"""The loss of a loop of one's own: the objective's, from logits and from hidden states."""

import shutil

import numpy as np
import pytest
import torch

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.hf import collator
from rekindle.train.hf.collator import TARGETS
from rekindle.train.hf.dataset import CacheDataset, Place
from rekindle.train.hf.distillation import Distillation
from rekindle.train.to_device import to_device
from testlib.elsewhere import PROVENANCE, row_of
from testlib.objective.setting import EPOCH, Setting
from testlib.students import gradients, same_gradients

MASKED = [
    {"teachers": ["big"], "temperature": 2.0, "weight": 0.7},
    {"teachers": ["whole"], "temperature": 2.0, "weight": 0.5},
    {"teachers": ["odd.lm"], "temperature": 4.0},
]
CAUSAL = [
    {"teachers": ["lm"], "temperature": 2.0, "weight": 0.7},
    {"teachers": ["odd"], "weight": 1.5},
]


@pytest.fixture(params=["masked_world", "causal_world"])
def setting(request):
    terms = MASKED if request.param == "masked_world" else CAUSAL
    objective = {"hard": {"weight": 0.5}, "distill": terms}
    return Setting(request.getfixturevalue(request.param), objective)


@pytest.fixture
def teaching(setting):
    terms = setting.objective.config.distill
    return Distillation(
        setting.cache,
        [term.teachers[0] for term in terms],
        kd_weight={term.teachers[0]: term.weight for term in terms},
        temperature={term.teachers[0]: term.temperature for term in terms},
        ce_weight=0.5,
    )


def batch_of(setting, teaching, index=None):
    index = setting.index if index is None else index
    return teaching.collator()([Place(int(number), EPOCH) for number in index])


@pytest.mark.parametrize("road", ["logits", "hidden"])
def test_losses_and_gradients_are_the_objectives(setting, teaching, road):
    check_as_the_objective(setting, teaching, road)


def check_as_the_objective(setting, teaching, road):
    expected = setting.run()
    found = batch_of(setting, teaching)
    batch, labels = found.pop(TARGETS), found.pop("labels")
    student = setting.student
    student.zero_grad()
    if road == "logits":
        made = teaching.loss(student.model(**found).logits, batch, labels)
    else:
        every = torch.arange(labels.numel())
        hidden = student(found, every).hidden.view(*labels.shape, -1)
        head = student.output_head
        made = teaching.hidden_loss(hidden, head.weight, batch, labels, bias=head.bias)
    made.loss.backward()
    assert float(made.loss.detach()) == pytest.approx(float(expected[0]), rel=1e-5)
    assert float(made.ce) == pytest.approx(expected[1]["ce"], rel=1e-5)
    same_gradients(gradients(student), expected[2])


@pytest.mark.parametrize("road", ["logits", "hidden"])
def test_a_skew_and_a_temperature_between_are_those_of_the_run_file(masked_world, caplog, road):
    said = {"temperature": 3.0, "temperature_between": "interpolate"}
    said |= {"divergence": "skew_kl", "skew": 0.3}
    objective = {"hard": {"weight": 0.5}, "distill": [{"teachers": ["big"]} | said]}
    setting = Setting(masked_world, objective)
    with caplog.at_level("INFO", logger="rekindle"):
        teaching = Distillation(setting.cache, ["big"], ce_weight=0.5, **said)
    assert "teacher big: at temperature 3 the mass outside its top 8 is interpolated" in caplog.text
    check_as_the_objective(setting, teaching, road)
    other = Distillation(setting.cache, ["big"], ce_weight=0.5, **said | {"skew": 0.1})
    batch = batch_of(setting, teaching)
    shown = {name: v for name, v in batch.items() if name not in (TARGETS, "labels")}
    with torch.no_grad():
        logits = setting.student.model(**shown).logits
    one, two = (each.loss(logits, batch[TARGETS]).kd["big"] for each in (teaching, other))
    assert float(one) != pytest.approx(float(two), rel=1e-3)


def test_micro_batches_sum_up_to_the_batch(setting, teaching):
    """One of them may be a sequence that only fills up a share."""
    parts = [batch_of(setting, teaching, part) for part in np.split(setting.index[:16], [5, 6])]
    parts.append(teaching.collator()([Place(3, EPOCH, counts=False)]))
    counts = teaching.counts([(part[TARGETS], part["labels"]) for part in parts])

    def loss(found, counts=None):
        shown = {name: v for name, v in found.items() if name not in (TARGETS, "labels")}
        logits = setting.student.model(**shown).logits
        made = teaching.loss(logits, found[TARGETS], found["labels"], counts).loss
        assert made.requires_grad
        return float(made.detach())

    shares = [loss(part, counts) for part in parts]
    assert shares[-1] == 0
    assert sum(shares) == pytest.approx(loss(batch_of(setting, teaching, setting.index[:16])))


def test_labels_are_those_of_transformers(setting, teaching):
    """The cross-entropy of the collator's labels is that of a model that is given them."""
    found = batch_of(setting, teaching)
    model, tokens = setting.student.model, teaching.vocabulary_size
    alone = Distillation(setting.cache, list(teaching.infos), kd_weight=0)
    assert not alone.terms
    batch, labels = found.pop(TARGETS), found["labels"]
    with torch.no_grad():
        logits = model(**found).logits
        own = model.loss_function(logits[..., :tokens], labels, vocab_size=tokens)
    assert float(alone.loss(logits, batch, labels).loss) == pytest.approx(float(own), rel=1e-5)
    labels[:4] = -100  # no cross-entropy of what a loop leaves out
    with torch.no_grad():
        own = model.loss_function(logits[..., :tokens], labels, vocab_size=tokens)
    assert float(alone.loss(logits, batch, labels).loss) == pytest.approx(float(own), rel=1e-5)


def test_what_cannot_be_learnt_is_refused(masked_world):
    cache = masked_world.open()

    def refused(message, teachers=("big",), **more):
        with pytest.raises(InputError, match=message):
            Distillation(cache, teachers, **more)

    refused(r"'big' stores the temperatures \[1.0, 2.0, 4.0\], not 3", temperature=3.0)
    refused("'sense' is a sequence_classification expert: its logits need a head", ["sense"])
    refused("'big' is a masked_lm; a causal_lm student has no loss", task="causal_lm")
    refused(r"temperature: .* greater than 0 \(given: 0\)", temperature=0)
    refused("has no teacher 'none'", ["none"])
    refused("k = 9 is not cached", k=9)
    refused("skew is for divergence: skew_kl, not jsd", divergence="jsd", skew=0.2)
    refused("temperature_between", temperature_between="guess")
    refused("has the masked views", masked_view="masked-other")
    refused("nothing is trained", kd_weight=0, ce_weight=0)
    refused("kd_weight names 'wide'; the teachers are", kd_weight={"wide": 1.0})
    partial = {"kd_weight": {"big": 0.7}}
    refused(r"kd_weight is .* leaves out \['wide'\]", ["big", "wide"], **partial)
    refused("teachers is 'big'; give a list", "big")
    refused("teachers names 'big' twice", ["big", "wide", "big"])
    refused(r"allow_missing is \['none'\]; give a list of teachers", allow_missing=["none"])
    refused("allow_missing is 'big'", allow_missing="big")
    refused("ce_weight is nan", ce_weight=float("nan"))
    with pytest.raises(InputError, match=r"cache is 'runs/cache'; give an open one: Cache.open"):
        Distillation("runs/cache", ["big"])
    with pytest.raises(InputError, match="made from items that are dict"):
        Distillation(cache, ["big"]).collator()([{"input_ids": [1]}])


def test_outputs_that_do_not_fit_are_refused(causal_world):
    """Rows of other tokens would be taught in silence."""
    cache = causal_world.open()
    teaching = Distillation(cache, ["lm"], temperature=2.0)
    batch = teaching.collator()([Place(number, 0) for number in range(3)])
    targets, labels, size = batch[TARGETS], batch["labels"], teaching.vocabulary_size
    logits = torch.zeros(*labels.shape, size)

    def refused(message, logits=logits, targets=targets, labels=labels):
        with pytest.raises(InputError, match=message):
            teaching.loss(logits, targets, labels)

    front = r"output is \(3, \d+, \d+\), but the batch has 3 .* prompt tuning"
    refused(front, logits=torch.cat([logits[:, :2], logits], 1))
    refused("but the batch has 3 sequences of", logits=torch.cat([logits, logits]))
    refused("but the batch has 3 sequences of", logits=logits.flatten(0, 1))
    refused(f"has {size - 1} ids; the cache has {size}", logits=logits[..., 1:])
    refused(r"labels are \(2, ", labels=labels[1:])
    refused("batch is a dict; give the collator's entry 'distillation'", targets=batch)
    cold = to_device(targets, "cpu", temperature=1.0)
    refused("sent with 'lm' at temperature 1, but it is taught at 2", targets=cold)
    with pytest.raises(InputError, match="but the batch has 3 sequences of"):
        teaching.hidden_loss(logits[:, 1:], torch.zeros(size, size), targets, labels)
    with pytest.raises(InputError, match="masked_view is 'm', but a causal_lm student is shown no"):
        Distillation(cache, ["lm"], masked_view="m")


def test_sequences_of_another_cache_are_refused(masked_world, causal_world):
    collate = Distillation(causal_world.open(), ["lm"]).collator()
    collate([CacheDataset(causal_world.open())[0]])
    with pytest.raises(InputError, match="of another cache's sequences than the targets"):
        collate([CacheDataset(masked_world.open())[0]])


@pytest.mark.parametrize("asked", [True, False])
def test_targets_that_teach_nobody_are_told_of_once(causal_world, monkeypatch, caplog, asked):
    """As those of a Trainer without the mixin; not once a loss was asked for."""
    monkeypatch.setattr(collator, "WARN_UNUSED_AFTER", 3)
    teaching = Distillation(causal_world.open(), ["lm"])
    collate = teaching.collator()
    batch = collate([Place(0, 0)])[TARGETS]
    if asked:
        size = teaching.vocabulary_size
        teaching.loss(torch.zeros(*batch.input_ids.shape, size), batch)
    for _ in range(7):
        collate([Place(0, 0)])
    told = [line for line in caplog.messages if "3 batches of cached targets were made" in line]
    assert len(told) == (not asked)


def test_a_teacher_that_lacks_targets_is_named(causal_world, tmp_path):
    """Holes within a unit, and a unit that is not there: trained without it where that is said."""
    shutil.copytree(causal_world.path, tmp_path / "cache")
    (tmp_path / "cache/targets/lm/commits/00000.json").unlink()
    cache = Cache.open(tmp_path / "cache")
    rows = [row_of(cache, index) for index in range(1, len(cache), 2)]
    cache.import_targets("holed", rows, PROVENANCE, allow_missing=True)
    for name in ("lm", "holed"):
        with pytest.raises(InputError, match=f"'{name}' has targets for .* name it in allow_missi"):
            Distillation(cache, [name])
        Distillation(cache, [name], kd_weight=0)  # not read
    both = Distillation(cache, ["lm", "holed"], allow_missing=["lm", "holed"])
    found = both.collator()([Place(number, 0) for number in range(4)])[TARGETS].targets
    assert len(found["lm"].rows) == 0
    assert {*found["holed"].rows.tolist()} == {1, 3}


def test_a_teacher_of_other_masks_is_refused(masked_world, monkeypatch):
    """Where a cache has several masked views."""
    cache = masked_world.open()
    view = cache.masked_view()
    other = type("Other", (), {"name": "masked-other", "kind": view.kind})()
    monkeypatch.setitem(cache.views, "masked-other", other)
    with pytest.raises(
        InputError, match=r"'big' saw the masks .*, but the student would see masked-o"
    ):
        Distillation(cache, ["big"], masked_view="masked-other")


def test_a_student_of_another_task_is_refused(masked_world, causal_world):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(str(masked_world.student))
    Distillation(masked_world.open(), ["big"]).check_student(model)
    with pytest.raises(InputError, match=r"is a BertModel, .* with AutoModelForMaskedLM"):
        Distillation(masked_world.open(), ["big"]).check_student(model.bert)
    with pytest.raises(InputError, match="the student is a BertForMaskedLM, a masked_lm; the"):
        Distillation(causal_world.open(), ["lm"]).check_student(model)


def test_a_student_whose_tokenizer_is_not_known_is_told_of(causal_world, caplog):
    """Once it was held against the cache's, another call needs it no more."""
    from transformers import AutoModelForCausalLM

    teaching = Distillation(causal_world.open(), ["lm"])
    model = AutoModelForCausalLM.from_pretrained(str(causal_world.student))
    teaching.check_student(model)
    assert "so it is not checked that its ids mean what the cache's do" in caplog.text
    caplog.clear()
    teaching.check_student(model, teaching.cache.corpus.tokenizer.hf)
    teaching.check_student(model)
    assert "is not checked" not in caplog.text
