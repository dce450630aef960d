"""Labels of which several may hold, and tags of tokens: evaluated and predicted as the others."""

import pytest
import torch
from transformers import AutoTokenizer

from rekindle.data.errors import InputError
from rekindle.train.answers.evaluate import evaluate_file
from rekindle.train.answers.predict import predict_file
from rekindle.train.config import StudentConfig
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.run import finetune
from rekindle.train.student import build_student
from testlib.answers.judges import head, lines, write

WORDS = ["the", "river", "city", "light", "old", "water"]
SEVERAL = [
    {"text": " ".join(WORDS[n % 3 :]), "label": [["a"], ["a", "b"], [], ["c"]][n % 4]}
    for n in range(12)
]
TAGGED = [
    {"tokens": WORDS[n % 4 :], "tags": ["O", "B-X", "I-X", "O", "B-X", "O"][n % 4 :]}
    for n in range(12)
]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [(SEVERAL, {"threshold": 0.4}), (TAGGED, {"max_length": 6})],
)
def test_they_are_evaluated_and_predicted_as_finetune_saw_them(
    tmp_path, make_model, wordpiece, rows, settings
):
    model = str(make_model("bert", "AutoModelForMaskedLM", wordpiece, initializer_range=0.1))
    file, expert = write(tmp_path / "rows.jsonl", rows), str(tmp_path / "expert")
    config = FinetuneConfig(max_steps=3, learning_rate=1e-2, **settings)
    result = finetune(model, file, file, expert, config=config)
    found = evaluate_file(expert, file, out=str(tmp_path / "e.jsonl"))
    assert found.scores == pytest.approx(result.per_seed[0].scores, abs=1e-6)
    assert found.metric == result.metric
    predict_file(expert, file, str(tmp_path / "p.jsonl"))
    said = [lines(tmp_path / name) for name in ("e.jsonl", "p.jsonl", "expert/predictions.jsonl")]
    names = "tags" if rows is TAGGED else "labels"
    assert [one[names] for one in said[0]] == [one[names] for one in said[1]]
    assert [one[names] for one in said[0]] == [one[names] for one in said[2]]
    for own, one in zip(rows, said[1], strict=True):
        if rows is TAGGED:
            assert one["given_tags"] == own["tags"]
            assert len(one["tags"]) == len(one["probabilities"]) == len(own["tokens"])
            unread = [tag is None for tag in one["tags"]]
            assert unread == [p is None for p in one["probabilities"]]
            assert any(unread) or len(own["tokens"]) < 5
        else:
            assert one["label"] == own["label"]
            assert one["labels"] == [k for k, p in one["probabilities"].items() if p >= 0.4]
    label = "tags" if rows is TAGGED else "label"
    wrong = write(tmp_path / "wrong.jsonl", [*rows, rows[0] | {label: ["Z"] * len(rows[0][label])}])
    with pytest.raises(InputError, match=r"row 13: .* does not know the label 'Z'"):
        evaluate_file(expert, wrong)


def test_a_text_is_tagged_word_by_word_by_an_expert_and_by_a_students_head(
    tmp_path, make_model, wordpiece
):
    """Which words these are stands beside the tags."""
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, 5, hidden_size=16)
    heads = {"tags": head("O", "B-X", problem=None, kind="token"), "texts": head("a", "b")}
    student = build_student(StudentConfig(model=str(model)), heads, 100, 0).eval()
    student.save_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "t.txt").write_text("the  river\nold\n")
    out, where = str(tmp_path / "o.jsonl"), str(tmp_path / "student")
    predict_file(where, str(tmp_path / "t.txt"), out, head="tags")
    assert [one["tokens"] for one in lines(out)] == [["the", "river"], ["old"]]
    inputs = tokenizer("the river", return_tensors="pt")
    first = inputs.word_ids().index(1)
    with torch.no_grad():
        logits = student(inputs, token_heads={"tags": torch.tensor([1, first])}).logits["tags"]
    best = logits.argmax(dim=1).tolist()
    assert lines(out)[0]["tags"] == [("O", "B-X")[n] for n in best]
    file = write(tmp_path / "g.jsonl", [{"tokens": ["the", "river"], "tags": ["B-X", "O"]}])
    right = [("O", "B-X")[n] == tag for n, tag in zip(best, ("B-X", "O"), strict=True)]
    found = evaluate_file(where, file, head="tags")
    assert found.scores["accuracy"] == pytest.approx(sum(right) / 2)
    with pytest.raises(InputError, match=r"has tokens, but the head 'texts' .* scores whole texts"):
        evaluate_file(where, file, head="texts")
