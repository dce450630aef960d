"""Families of models in each role, held against transformers' own forward pass; and their page."""

import copy
import operator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train.config import ObjectiveConfig, StudentConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.finetune.classifier import classifier_config, load_trained, predict
from rekindle.train.finetune.encoded import EncodedTexts, padding_id_of
from rekindle.train.model.sight import padding_influence
from rekindle.train.objective.objective import Objective
from rekindle.train.student import build_student
from testlib.caches import examples
from testlib.families.grid import TARGETS, Grid, name_of
from testlib.families.kinds import EXPERT, STUDENT, TEACHER, TOKENS, Family
from testlib.families.page import DOCS, PRECISION, page
from testlib.families.rows import FAMILIES, NO_CLASS
from testlib.models import AUTO
from testlib.objective.reference import EPOCH, reference
from testlib.run_alone import CLASSIFIER, check_distribution, logits_of, model_of
from testlib.students import gradients, same_gradients

CASES = [
    pytest.param(family, id=family.title, marks=[] if family.quick else [pytest.mark.slow])
    for family in FAMILIES
]
TITLE = operator.attrgetter("title")
# Not in bfloat16: torch has no Fourier transform of it, which is FNet's mixing, and transformers
# leaves two of DeBERTa's biases in float32, on which its forward pass fails.
HALVES = [f for f in FAMILIES if TEACHER not in f.refused and f.kind not in ("fnet", "deberta")]
GUIDES = {family.task: family for family in FAMILIES if family.title in ("BERT", "GPT-2")}
OF_STATES = 1e-3  # hidden states are kept in 16 bits
RATE = 0.01  # of the step that a student takes


@pytest.fixture(scope="module")
def grid(tmp_path_factory, one_thread) -> Grid:
    return Grid(tmp_path_factory.mktemp("families"))


def same(found, expected, precision=PRECISION):
    if len(expected):
        assert float((torch.as_tensor(found) - expected).abs().max()) <= precision


@pytest.mark.parametrize("family", CASES)
def test_as_a_teacher(grid, family):
    if refused(family, TEACHER, lambda: grid.cache(family, TEACHER)):
        return
    cache, model = grid.cache(family, TEACHER), grid.model(family, TEACHER)
    assert (padding_influence(model_of(model, AUTO[family.task])) > 0) == family.moved_by_padding
    name, ahead, checked = name_of(family), family.task == "causal_lm", 0
    for example in examples(cache):
        found = [example.targets[f"{name}-{kind}"] for kind in TARGETS]
        for topk, dense, hidden in zip(*found, strict=True):
            logits = logits_of(model, AUTO[family.task], input_ids=dense.input_ids)[:, :TOKENS]
            expected = torch.log_softmax(logits, -1)
            for row, position in enumerate(dense.positions.tolist()):
                gold = int(example.input_ids[position + ahead])
                check_distribution(topk, row, logits[position], gold)
            same(dense.log_probs, expected[dense.positions])
            same(hidden.log_probs, expected[hidden.positions], OF_STATES)
        places = np.concatenate([target.positions for target in found[1]])
        # Every token but the first and last of an encoder's, which are none of the text.
        own = range(not ahead, len(example.input_ids) - 1)
        assert sorted(places.tolist()) == [*own]
        checked += len(places)
    assert checked > 90


@pytest.mark.slow
@pytest.mark.parametrize("family", HALVES, ids=TITLE)
def test_as_a_teacher_in_half_precision(tmp_path, one_thread, family):
    """As near to float32 as transformers' own bfloat16 is, and no further from that."""
    grid = Grid(tmp_path, {"dense": TARGETS["dense"]}, precision="bf16")
    model = grid.model(family, TEACHER)
    half = getattr(transformers, AUTO[family.task]).from_pretrained(model, dtype=torch.bfloat16)
    cached, own, exact = [], [], []
    for example in examples(grid.cache(family, TEACHER)):
        for target in example.targets[f"{name_of(family)}-dense"]:
            inputs = {"input_ids": torch.as_tensor(target.input_ids).long()[None]}
            with torch.no_grad():
                rounded = half.eval()(**inputs).logits[0]
            logits = logits_of(model, AUTO[family.task], input_ids=target.input_ids)
            for values, found in ((own, rounded), (exact, logits)):
                log_probs = torch.log_softmax(found[:, :TOKENS].float(), -1)
                values.append(log_probs[target.positions])
            cached.append(torch.as_tensor(target.log_probs))
    found, rounded, precise = map(torch.cat, (cached, own, exact))
    rounding = float((rounded - precise).abs().mean())
    assert rounding > 1e-4
    assert float((found - rounded).abs().mean()) < 1.2 * rounding
    assert float((found - precise).abs().mean()) < 1.2 * rounding


@pytest.mark.parametrize("family", CASES)
def test_as_a_student(grid, family, tmp_path):
    model, guide = grid.model(family, STUDENT), GUIDES[family.task]

    def build(heads=None):
        config = StudentConfig(model=str(model), task=family.task)
        return build_student(config, heads or {}, TOKENS, 0, 24)

    if refused(family, STUDENT, build):
        return
    objective = objective_of(grid, guide)
    student = build(objective.heads).train()
    student.heads.eval()  # the family may name no rate of dropout for heads
    assert student.has_fresh_head == family.fresh_head
    if family.fresh_head:
        student.save_pretrained(model := tmp_path / "begun")
    cache, load = grid.cache(guide, TEACHER), getattr(transformers, AUTO[family.task])
    plain = load.from_pretrained(model, dtype=torch.float32).train()
    heads = copy.deepcopy(student.heads)
    setting = SimpleNamespace(
        cache=cache,
        task=family.task,
        view=cache.masked_view().name if family.task == "masked_lm" else None,
        objective=objective,
        vocabulary=TOKENS,
        index=np.arange(len(cache)),
        student=SimpleNamespace(model=plain, heads=heads),
    )
    loss = loss_of(student, setting)
    expected, _ = reference(setting, 0)
    assert loss == pytest.approx(float(expected.detach()), rel=PRECISION)
    expected.backward()
    both = torch.nn.ModuleDict({"model": plain, "heads": heads})
    same_gradients(gradients(student), gradients(both), PRECISION)
    for each in (student, both):
        torch.optim.SGD(each.parameters(), lr=RATE).step()
    student.eval().save_pretrained(tmp_path / "after")
    again = load.from_pretrained(tmp_path / "after", dtype=torch.float32).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        same(again(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)


def objective_of(grid, guide):
    """Cross-entropy, KD from a language model, and KD from a classifier into a head."""
    names = [f"{name_of(guide)}-topk", name_of(guide)]
    caches = [grid.cache(guide, role) for role in (TEACHER, EXPERT)]
    terms = [{"teachers": [name], "temperature": 2.0} for name in names]
    config = parse_settings(ObjectiveConfig, {"hard": {"weight": 1.0}, "distill": terms})
    infos = {n: cache.teacher(n).info for n, cache in zip(names, caches, strict=True)}
    return Objective(config, infos, guide.task, 10)


def loss_of(student, setting):
    """The loss of a step in padded micro-batches of three; its gradients are left behind."""
    objective, plan = setting.objective, setting.objective.plan(0)
    batch = setting.cache.gather(
        setting.index, plan.teachers, epoch=EPOCH, masked_view=setting.view
    )
    batch = objective.select_targets(batch, plan)
    counts, loss = objective.counts(batch, plan), 0.0
    for part in split_batch(batch, 3):
        made = objective.loss(student, part, counts, plan, torch.device("cpu"))
        made.total.backward()
        loss += float(made.total.detach())
    return loss


@pytest.mark.parametrize("family", CASES)
def test_as_an_expert(grid, family):
    model = grid.model(family, EXPERT)
    if refused(family, EXPERT, lambda: grid.cache(family, EXPERT)):
        if family.refused[EXPERT] == NO_CLASS:
            refused(family, EXPERT, lambda: classifier_config(str(model)))  # as `finetune` asks
        return
    assert (padding_influence(model_of(model, CLASSIFIER)) > 0) == family.moved_by_padding
    tokenizer, name = transformers.AutoTokenizer.from_pretrained(model), name_of(family)
    rows, expected = [], []
    for example in examples(grid.cache(family, EXPERT)):
        rows.append(tokenizer(example.text)["input_ids"])
        expected.append(logits_of(model, CLASSIFIER, input_ids=rows[-1]))
        same(example.targets[name][0].logits, expected[-1])
    assert len({len(row) for row in rows}) > 4
    assert float(torch.stack(expected).std(0).max()) > 1e3 * PRECISION
    loaded, own = load_trained(str(model))  # as `evaluate` and `predict` do
    found = predict(loaded, EncodedTexts(rows, None, padding_id_of(loaded.config, own)), 4)
    same(found, torch.stack(expected))


def refused(family: Family, role: str, work) -> bool:
    """Whether the row says that ``work`` is refused, with these words."""
    if role not in family.refused:
        return False
    with pytest.raises(InputError) as error:
        work()
    assert family.refused[role] in str(error.value)
    return True


def test_the_page_says_what_the_rows_say():
    """`PYTHONPATH=tests/lib python -m testlib.families.page` writes it."""
    assert DOCS.read_text(encoding="utf-8") == page(FAMILIES)
