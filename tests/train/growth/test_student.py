"""A grown student: its heads and prompts do what they did."""

import pytest
import torch

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.train.config import GrowConfig, StudentConfig
from rekindle.train.growth.student import grow_student
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import build_student

HEADS = {
    "v1.sense": HeadConfig(kind="sequence", num_labels=3),
    "tags": HeadConfig(kind="token", num_labels=4),
}
DOMAINS = ("even", "odd")
DOUBLED = {"hidden_size": 32, "layers": 3, "noise_std": 0.1}
SMALL = {"hidden_size": 16, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def student_of(make_model, wordpiece, bytelevel):
    """student_of(family, **config): with heads and prompts, all values away from where they began.

    Logits of the order of 1.
    """

    def make(family, **extra):
        masked = family in ("bert", "roberta")
        tokenizer = wordpiece if masked else bytelevel
        auto = f"AutoModelFor{'Masked' if masked else 'Causal'}LM"
        size = {"n_embd": 16} if family == "gpt2" else dict(SMALL)
        size |= {"num_key_value_heads": 2} if family == "llama" else {}
        model = make_model(family, auto, tokenizer, **size, **extra)
        config = StudentConfig(
            model=str(model), task="masked_lm" if masked else "causal_lm", domain_prompts=True
        )
        vocabulary = load_tokenizer(str(tokenizer)).size
        student = build_student(config, HEADS, vocabulary, 0, domains=DOMAINS)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
        return student.eval()

    return make


def outputs(student):
    """LM logits and those of all heads, of sequences of three domains."""
    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([9, 1, 4])[:, None]).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    places = torch.tensor([0, 5, 9, 20])
    with torch.no_grad():
        found = student(
            student.with_domains(inputs, ["odd", None, "even"]),
            places,
            ["v1.sense"],
            {"tags": places},
        )
    return {"lm": student.output_head.logits(found.hidden)} | found.logits


@pytest.mark.covering
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_all_outputs_stay_where_the_model_keeps_its_own(student_of, family, tied):
    student = student_of(family, tie_word_embeddings=tied)
    asked = [DOUBLED] if family in ("bert", "roberta") else [DOUBLED, {"hidden_size": 24}]
    for values in asked:
        grown = grow_student(student, GrowConfig(**values, preserve="exact"))
        assert grown.vocabulary_size == student.vocabulary_size
        assert grown.prompts.domains == DOMAINS
        found, expected = outputs(grown), outputs(student)
        assert found.keys() == expected.keys() == {"lm", "v1.sense", "tags"}
        for name, logits in expected.items():
            assert logits.std() > 0.1
            torch.testing.assert_close(found[name], logits, rtol=0, atol=1e-4)


def test_a_student_in_training_stays_so(student_of):
    student = student_of("bert").train()
    assert grow_student(student, GrowConfig(layers=3)).training
    assert student.training


def test_a_grown_student_is_saved_and_loaded(student_of, tmp_path):
    grown = grow_student(student_of("gpt2"), GrowConfig(hidden_size=24, preserve="exact"))
    grown.save_pretrained(tmp_path)
    again = type(grown).from_pretrained(tmp_path).eval()
    for name, logits in outputs(grown).items():
        assert torch.equal(outputs(again)[name], logits)
