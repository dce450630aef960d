"""Our head as a family's own: equal logits where the family has a place for it, else a reason."""

import pytest
import torch

from rekindle.data.errors import InputError
from rekindle.train.export.plain import not_exportable, plain_labels, plain_model, problem_of
from rekindle.train.model.family_head import sample_inputs
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import Student
from testlib.families.language import CAUSAL, language_model

SENSE = HeadConfig(kind="sequence", num_labels=3, label_names=("a", "b", "c"))
TAGS = HeadConfig(kind="token", num_labels=5)
FITTING = ("bert", "roberta", "albert", "mpnet", "deberta", "deberta-v2", "squeezebert", "luke")
# GELU, ReLU, a norm, one matrix: none is a dense layer, tanh and a linear layer.
OTHERS = ("electra", "distilbert", "modernbert", "gpt2", "bert causal")


def student_of(family, form="ours"):
    heads = {
        name: head.model_copy(update={"form": form, "padding": 7})
        for name, head in (("sense", SENSE), ("tags", TAGS))
    }
    task = "causal_lm" if family in CAUSAL else "masked_lm"
    student = Student(language_model(family), task, heads).eval()
    for head in student.heads.values():  # logits that a difference of 1e-5 is small beside
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)
    return student


@torch.no_grad()
def apart(student, name, model):
    """The largest difference of logits on texts of several lengths."""
    inputs = sample_inputs(model.config)
    found = model(**inputs).logits
    if student.head_configs[name].kind == "sequence":
        expected = student(inputs, sequence_heads=[name]).logits[name]
    else:
        places = inputs["attention_mask"].flatten().nonzero()[:, 0]
        expected = student(inputs, token_heads={name: places}).logits[name]
        found = found.flatten(0, 1)[places]
    assert expected.std() > 0.1
    return float((found - expected).abs().max())


@pytest.mark.parametrize("family", FITTING)
def test_our_head_fits(family):
    student = student_of(family)
    model = plain_model(student, "sense")
    assert apart(student, "sense", model) <= 1e-5
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("family", OTHERS)
def test_elsewhere_the_reason_and_the_key_are_named(family):
    student = student_of(family)
    where = "last" if family in CAUSAL else "first"
    with pytest.raises(InputError, match=f"no place for a dense layer, .* on the {where}") as told:
        plain_model(student, "sense")
    # What a message advises must work.
    assert ("student.head=family" in str(told.value)) == (family != "bert causal")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_that_names_no_padding_is_tried_all_the_same(family):
    model = language_model(family)
    model.config.pad_token_id = None
    student = Student(model, "causal_lm", {"sense": SENSE}).eval()
    assert "student.head: family" in not_exportable(student, "sense")


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2"])
def test_tags_need_a_head_of_the_family(family):
    assert "student.head=family" in (not_exportable(student_of(family), "tags") or "")


@pytest.mark.parametrize("family", ["bert", "electra", "modernbert", "gpt2", "llama"])
@pytest.mark.parametrize("name", ["sense", "tags"])
def test_every_head_of_a_family_is_exported(family, name):
    student = student_of(family, "family")
    assert apart(student, name, plain_model(student, name)) <= 1e-5


def test_a_head_with_other_weights_than_it_should_have_is_not_written(monkeypatch):
    """What the table of facts says is believed only as far as logits agree."""
    from rekindle.train.export import plain

    student = student_of("bert")
    monkeypatch.setattr(plain, "fill_family_head", lambda made, ours, place: None)
    with pytest.raises(InputError, match=r"no place for|differ from its own by"):
        plain_model(student, "sense")


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("sense", (), ("LABEL_0", "LABEL_1")),
        ("a+b", ("a/x", "b/y"), ("x", "y")),
        ("a+b", ("a/x", "b/x"), ("a/x", "b/x")),  # apart, or two would have one name
        ("a+b", ("x", "y"), ("x", "y")),
    ],
)
def test_labels_have_the_names_of_the_task(name, given, expected):
    head = HeadConfig(kind="sequence", num_labels=2, label_names=given)
    assert plain_labels(name, head) == expected


@pytest.mark.parametrize("says", [None, "regression"])
def test_one_output_is_a_score_where_nothing_else_is_said(says):
    """evaluate reads it by the same function; transformers makes no choice of one class."""
    head = HeadConfig(kind="sequence", num_labels=1, problem=says)
    student = Student(language_model("bert"), "masked_lm", {"rating": head}).eval()
    with torch.random.fork_rng():
        model = plain_model(student, "rating")
    assert model.config.problem_type == problem_of(head) == "regression"
