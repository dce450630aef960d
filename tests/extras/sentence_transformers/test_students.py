"""Students of sentence encoders as folders that the package itself loads, with equal vectors."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.train.config import StudentConfig
from rekindle.train.export.card import student_card
from rekindle.train.export.folder import export_head, longest_text
from rekindle.train.export.sentence_folder import write_beside
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import Student, build_student
from testlib.models import AUTO

LENGTH = 12
# One is longer than the student was trained with.
TEXTS = ["the old river", "water runs under the mountain " * 6, "light", "of the city and the sea"]


def head(size, normalise, projection=None):
    return HeadConfig(
        kind="embedding",
        num_labels=size,
        normalise=normalise,
        projection=projection,
        as_long=True,
    )


HEADS = {"wide": head(20, True), "same": head(16, False)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("students")


@pytest.fixture(scope="module")
def saved(make_model, wordpiece, place):
    """saved(heads, task, **embedding) -> the student, and its folder as a run leaves it."""

    def make(heads, task="masked_lm", family="bert", **embedding):
        base = make_model(family, AUTO[task], wordpiece, **SIZES[family])
        tokenizer = load_tokenizer(str(base))
        config = StudentConfig(model=str(base), task=task, embedding=embedding)
        made = build_student(config, heads, tokenizer.size, 0, LENGTH, (), tokenizer).eval()
        folder = place / f"student-{len([*place.iterdir()])}"
        made.save_pretrained(folder)
        tokenizer.save(str(folder))
        write_beside(made, longest_text(made), folder)
        return made, folder

    return make


SIZES = {"bert": {"hidden_size": 16}, "gpt2": {"n_embd": 16}}


def own_vectors(student, folder, name):
    """Text by text, as training shows them: cut, and not padded."""
    tokenizer = load_tokenizer(str(folder))
    room = LENGTH - len(tokenizer.prefix) - len(tokenizer.suffix)
    found = []
    for one in tokenizer.encode(TEXTS):
        ids = [*tokenizer.prefix, *one.ids[:room], *tokenizer.suffix]
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        inputs["attention_mask"] = inputs["attention_mask"].long()
        with torch.no_grad():
            found.append(student(inputs, sequence_heads=[name]).logits[name][0])
    return torch.stack(found)


def loaded_vectors(folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(TEXTS, convert_to_tensor=True, batch_size=3), model


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "max", "weightedmean"])
def test_the_package_loads_a_students_folder(saved, pooling):
    student, folder = saved({"wide": HEADS["wide"]}, pooling=pooling)
    found, model = loaded_vectors(folder)
    torch.testing.assert_close(found, own_vectors(student, folder, "wide"), rtol=0, atol=2e-6)
    assert model.max_seq_length == LENGTH
    assert [type(module).__name__ for module in model] == [
        *("Transformer", "Pooling", "Dense", "Normalize")
    ]
    language_model = AutoModelForMaskedLM.from_pretrained(folder)
    body = AutoModel.from_pretrained(folder)  # what transformers loads of it is as it was
    for name, values in body.state_dict().items():
        if not name.startswith("pooler."):
            assert torch.equal(values, language_model.base_model.state_dict()[name]), name


def test_which_vectors_a_folder_gives_is_a_setting(saved, place):
    student, folder = saved(HEADS, normalise=True)  # of two: its own, until one is named
    modules = json.loads((folder / "modules.json").read_text())
    assert [one["type"].rpartition(".")[2] for one in modules] == [
        *("Transformer", "Pooling", "Normalize")
    ]
    assert loaded_vectors(folder)[0].shape == (len(TEXTS), 16)
    again = Student.from_pretrained(folder).eval()
    assert again.vectors == "own"
    for name in HEADS:
        out = place / f"export-{name}"
        found = export_head(str(folder), str(out), name)
        assert found.difference < 1e-6
        vectors = loaded_vectors(out)[0]
        torch.testing.assert_close(vectors, own_vectors(student, folder, name), rtol=0, atol=2e-6)
    export_head(str(folder), str(place / "own"), "own")
    torch.testing.assert_close(loaded_vectors(place / "own")[0], loaded_vectors(folder)[0])
    named, folder = saved(HEADS, output="same", normalise=False)
    expected = own_vectors(named, folder, "same")
    torch.testing.assert_close(loaded_vectors(folder)[0], expected, rtol=0, atol=2e-6)


def test_a_card_says_how_the_vectors_are_used(saved, place):
    """Its code runs as it stands."""
    _, folder = saved({"wide": HEADS["wide"]})
    student = Student.from_pretrained(folder)
    export_head(str(folder), str(place / "carded"))
    for card in (student_card(student, folder), (place / "carded" / "README.md").read_text()):
        assert "library_name: sentence-transformers" in card
        assert "pipeline_tag: sentence-similarity" in card
        code = card.split("```python\n")[1].split("```")[0]
        found = {}
        exec(code, found)
        assert found["vectors"].shape == (2, 20)


def test_a_causal_students_last_token(saved, place):
    student, folder = saved({"wide": HEADS["wide"]}, "causal_lm", "gpt2", pooling="lasttoken")
    out = place / "causal"
    told = export_head(str(folder), str(out)).describe()
    assert "20 numbers" in told
    assert "lasttoken pooling" in told
    expected = own_vectors(student, folder, "wide")
    torch.testing.assert_close(loaded_vectors(out)[0], expected, rtol=0, atol=2e-6)


def test_a_student_with_prompts_is_none(make_model, wordpiece, place):
    base = make_model("bert", AUTO["masked_lm"], wordpiece, **SIZES["bert"])
    config = StudentConfig(model=str(base), domain_prompts=True)
    tokenizer = load_tokenizer(str(base))
    made = build_student(config, HEADS, tokenizer.size, 0, LENGTH, ["d"], tokenizer)
    folder = place / "prompted"
    made.save_pretrained(folder)
    tokenizer.save(str(folder))
    assert "domain prompts" in write_beside(made, LENGTH, folder)
    assert not (folder / "modules.json").exists()
    with pytest.raises(InputError, match="domain prompts"):
        export_head(str(folder), str(place / "none"), "wide")
