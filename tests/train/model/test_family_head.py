"""A family's own head on a student's body: transformers' classifier with that body, to the bit."""

import pytest
import torch
import transformers

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.train.config import GrowConfig, StudentConfig
from rekindle.train.growth.student import grow_student
from rekindle.train.model.family_head import FamilyHead, sample_inputs
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import Student, build_student
from testlib.families.language import language_model

SENSE = HeadConfig(kind="sequence", num_labels=3, label_names=("a", "b", "c"))
TAGS = HeadConfig(kind="token", num_labels=5)
FAMILIES = (
    *("bert", "roberta", "albert", "distilbert", "electra", "deberta-v2", "modernbert", "mpnet"),
    *("squeezebert", "luke", "gpt2", "llama", "gpt_neox", "gemma2"),
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_its_logits_are_those_of_the_familys_class(family, kind):
    """With a body of its own, loaded from the student's and the head's weights by their names."""
    model = language_model(family)
    torch.manual_seed(0)
    head = FamilyHead.of(model, kind, 3, padding=7).eval()
    config, inputs = head.frame.config, sample_inputs(head.frame.config)
    auto = {"sequence": "SequenceClassification", "token": "TokenClassification"}[kind]
    whole = getattr(transformers, f"AutoModelFor{auto}").from_config(config).float().eval()
    prefix = whole.base_model_prefix
    body = {f"{prefix}.{k}": v for k, v in model.base_model.state_dict().items()}
    body = {k: v for k, v in body.items() if k in whole.state_dict()}
    whole.load_state_dict(body | head.frame.state_dict())
    with torch.no_grad():
        expected = whole(**inputs).logits
        found = head(model.base_model(**inputs).last_hidden_state, inputs)
    assert expected.std() > 0
    known = inputs["attention_mask"].bool() if kind == "token" else slice(None)
    torch.testing.assert_close(found[known], expected[known], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "kind", "told"),
    [
        ("longformer", "sequence", "runs its body otherwise"),
        ("opt", "token", "no AutoModelForTokenClassification of the family opt"),
        ("bart causal", "sequence", "the body of BartForSequenceClassification is another"),
        ("bert causal", "sequence", "by its first token, which in a causal LM has seen no other"),
    ],
)
def test_families_without_such_a_head_are_refused(family, kind, told):
    model = language_model(family)
    with pytest.raises(InputError, match=told):
        FamilyHead.of(model, kind, 3, padding=7, causal="causal" in family)


def test_the_last_token_is_found_whatever_pads(bytelevel, make_model):
    """GPT-2 looks for the last id that is not its padding: texts of a batch end where they end."""
    directory = make_model("gpt2", "AutoModelForCausalLM", bytelevel, pad_token_id=None)
    student = of(directory, "causal_lm")
    assert student.head_configs["sense"].padding == load_tokenizer(str(bytelevel)).hf.eos_token_id
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (2, 6), generator=draw)
    mask = (torch.arange(6) < torch.tensor([[6], [3]])).long()
    with torch.no_grad():
        padded = [
            student(
                {"input_ids": ids * mask + pad * (1 - mask), "attention_mask": mask},
                None,
                ["sense"],
            )
            for pad in (0, 50)
        ]
        alone = student({"input_ids": ids[1:, :3], "attention_mask": mask[1:, :3]}, None, ["sense"])
    for one in padded:
        torch.testing.assert_close(one.logits["sense"][1:], alone.logits["sense"])


def of(directory, task="masked_lm", seed=0, **config):
    size = load_tokenizer(str(directory)).size
    values = {"model": str(directory), "task": task, "head": "family"} | config
    heads, tokenizer = {"sense": SENSE, "v1.tags": TAGS}, load_tokenizer(str(directory))
    return build_student(StudentConfig(**values), heads, size, seed, 40, tokenizer=tokenizer).eval()


@pytest.fixture(scope="module")
def directory(make_model, wordpiece):
    return make_model("bert", "AutoModelForMaskedLM", wordpiece)


def weights(student):
    return {name: value.clone() for name, value in student.state_dict().items()}


def test_students_keep_them_and_hand_them_on(directory, tmp_path, caplog):
    student = of(directory)
    assert all(torch.equal(v, weights(of(directory))[k]) for k, v in weights(student).items())
    student.save_pretrained(tmp_path)
    load_tokenizer(str(directory)).save(str(tmp_path))
    again, later = Student.from_pretrained(tmp_path), of(tmp_path, seed=9)
    assert again.sequence_length == 40
    for other in (again, later):
        assert other.head_configs == student.head_configs
        found = weights(other)
        assert all(torch.equal(value, found[name]) for name, value in weights(student).items())
    assert not caplog.records
    ours = of(tmp_path, head="ours")
    assert ours.head_configs == {"sense": SENSE, "v1.tags": TAGS}
    assert "the head 'sense' starts afresh" in caplog.text
    assert "(form)" in caplog.text


def test_heads_of_ours_are_described_as_before(directory, tmp_path):
    """Earlier versions read them."""
    assert SENSE.model_dump().keys() == {"kind", "num_labels", "label_names", "problem"}
    student = of(directory, head="ours")
    assert not any(isinstance(head, FamilyHead) for head in student.heads.values())


def test_a_refusal_names_the_key(make_model, bytelevel, tmp_path):
    model = language_model("opt")
    with pytest.raises(InputError, match=r"student.head: family: transformers has no AutoModelFor"):
        Student(model, "causal_lm", {"tags": TAGS.model_copy(update={"form": "family"})})


def test_they_do_not_grow_once_trained(directory, tmp_path):
    """Fresh ones are as fresh on the larger body."""
    grow = GrowConfig(layers=3)
    grown = grow_student(of(directory), grow)
    assert isinstance(grown.heads["sense"], FamilyHead)
    of(directory).save_pretrained(tmp_path)
    load_tokenizer(str(directory)).save(str(tmp_path))
    with pytest.raises(InputError, match=r"the head 'sense' of .* does not grow with it"):
        grow_student(of(tmp_path), grow)
