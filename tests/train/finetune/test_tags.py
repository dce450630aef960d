"""Words with a tag each: how files write them, which token speaks for a word, an expert of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.train.answers.score import evaluate, score_model
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.finetune.metrics import chosen_metric
from rekindle.train.finetune.run import FinetuneConfig, finetune
from rekindle.train.finetune.task_data import read_task
from rekindle.train.finetune.words import encode_words

ROWS = [
    {"tokens": ["EU", "rejects", "Peter"], "tags": ["B-ORG", "O", "B-PER"]},
    {"tokens": [], "tags": []},
    {"tokens": ["[", "x", "]"], "tags": ["O", "O", "O"]},
]
NAMES = ("B-ORG", "B-PER", "I-ORG", "I-PER", "O")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, **settings):
    return read_task(path, settings=TaskSettings(**settings))[0]


WRITTEN = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "a.tsv": "tokens\ttags\nEU rejects Peter\tB-ORG O B-PER\n\t\n[ x ]\tO O O\n",
    "lists.tsv": 'tokens\ttags\n["EU", "rejects", "Peter"]\t["B-ORG", "O", "B-PER"]\n[]\t[]\n'
    '["[", "x", "]"]\t["O", "O", "O"]\n',
    "a.csv": "tokens,tags\nEU rejects Peter,\"['B-ORG', 'O', 'B-PER']\"\n[],[]\n[ x ],O O O\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_tokens_and_tags_are_lists_or_stand_between_blanks(tmp_path, name):
    (tmp_path / name).write_text(WRITTEN[name])
    data = read(str(tmp_path / name))
    assert (data.problem, data.label_names) == ("token_classification", NAMES)
    assert data.words == [row["tokens"] for row in ROWS]
    assert data.texts == ["EU rejects Peter", "", "[ x ]"]
    assert data.labels.tolist() == [0, 4, 1, 4, 4, 4]
    assert [one.tolist() for one in data.by_text(data.labels)] == [[0, 4, 1], [], [4, 4, 4]]
    assert data.describe() == (
        "token classification: 3 rows, 1 of them without text, 6 words, 5 tags: B-ORG 1, B-PER 1, "
        "I-ORG 0, I-PER 0, O 4; F1 is of whole entities"
    )


def test_columns_of_other_names_are_named(tmp_path):
    rows = [{"words": ["a", "b"], "ner_tags": ["X", "Y"], "text": "a b"}]
    path = write(tmp_path / "a.jsonl", rows)
    data = read(path, text_field="words", label_field="ner_tags")
    assert (data.words, data.label_names) == ([["a", "b"]], ("X", "Y"))
    assert data.describe().endswith("2 words, 2 tags: X 1, Y 1; one label a token")
    assert chosen_metric(None, data) == "accuracy"
    with pytest.raises(InputError, match=r"use one of: accuracy$"):
        chosen_metric("f1", data)
    with pytest.raises(InputError, match="text and tokens, and ner_tags holds lists"):
        read(
            write(tmp_path / "c.jsonl", [rows[0] | {"tokens": ["a", "b"]}]), label_field="ner_tags"
        )
    beside = [row | {"tokens": row["words"], "tags": row["ner_tags"]} for row in rows]
    assert read(write(tmp_path / "b.jsonl", beside)).words == [["a", "b"]]


def test_tags_that_are_numbers_have_names_or_are_said_to_be_labels(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": [2, 0]}, {"tokens": ["c"], "tags": [1]}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=r"row 1: tag 2: all tags are numbers.*label_names=\[…\]"):
        read(path)
    data = read(path, label_names=["O", "B-X", "I-X"])
    assert (data.label_names, data.labels.tolist()) == (("O", "B-X", "I-X"), [2, 0, 1])
    assert chosen_metric(None, data) == "f1"
    data = read(path, problem="token_classification")
    assert (data.label_names, chosen_metric(None, data)) == (("0", "1", "2"), "accuracy")


@pytest.mark.parametrize(
    ("row", "settings", "parts"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, {}, ["row 2", "2 tokens, but 1 tags"]),
        ({"tokens": ["a"], "tags": None}, {}, ["row 2", "missing", "drop_labels=[null]"]),
        ({"tokens": None, "tags": ["O"]}, {}, ["row 2", "tokens must be a list", "missing"]),
        ({"tokens": [1], "tags": ["O"]}, {}, ["row 2", "tokens must be a list", "1, a int"]),
        ({"tokens": ["a"], "tags": [None]}, {}, ["row 2", "None in a list is not a label"]),
        ({"tokens": ["\ud800"], "tags": ["O"]}, {}, ["row 2", "half of a surrogate pair"]),
        ({"tokens": ["a"], "tags": ["b-ORG"]}, {}, ["row 2", "'b-ORG'", "blanks or case"]),
        ({"tokens": ["a"], "tags": ["O"]}, {"positive": "O"}, ["positive is 'O'"]),
        (
            {"tokens": ["a"], "tags": ["O"]},
            {"text_field": ["tokens", "tags"]},
            ["tokens and tags are two fields", "not pairs", "the one column"],
        ),
    ],
)
def test_what_is_no_tagged_text_is_refused(tmp_path, row, settings, parts):
    path = write(tmp_path / "a.jsonl", [ROWS[0], row])
    with pytest.raises(InputError) as caught:
        read(path, **settings)
    for part in parts:
        assert part in str(caught.value)


def test_splits_are_all_of_tokens_and_dev_may_go_on_where_train_only_begins(tmp_path):
    train = write(tmp_path / "t.jsonl", ROWS)
    dev = write(tmp_path / "d.jsonl", [{"tokens": ["a", "b"], "tags": ["B-PER", "I-PER"]}])
    assert read_task(train, dev)[1].labels.tolist() == [1, 3]
    other = write(tmp_path / "o.jsonl", [{"text": "a", "label": "x"}])
    with pytest.raises(InputError, match=r"t.jsonl has tokens but .*o.jsonl has texts"):
        read_task(train, other)
    alone = write(tmp_path / "a.jsonl", [{"tokens": ["a"], "tags": ["O"]}])
    with pytest.raises(InputError, match="every tag is 'O'"):
        read_task(alone)


# ---- which token speaks for a word ---------------------------------------------------------------


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory, corpus_file):
    """A sentencepiece-like one with a BOS before and nothing behind."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    lines = corpus_file.read_text().splitlines()
    backend.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    path = tmp_path_factory.mktemp("metaspace")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(path)
    return path


WORD = st.one_of(
    st.sampled_from(["river", "The", "learns.", "", " ", "\u200b", "\t", "\x00", "😀", "a b", "é"]),
    st.sampled_from(
        ["👩\u200d🚀", "don't", "##", "[MASK]", "</s>", " city", "ﬁ", "\u0301", "中文"]
    ),
    st.text(max_size=4).filter(lambda text: text.isprintable() or text.isspace()),
)


@pytest.mark.parametrize("name", ["wordpiece", "bytelevel", "metaspace"])
@given(words=st.lists(WORD, max_size=12), limit=st.integers(4, 24))
def test_the_first_token_that_stands_for_a_word_speaks_for_it(request, name, words, limit):
    directory = request.getfixturevalue(name)
    ours = load_tokenizer(str(directory))
    found = encode_words(ours, [words], limit)
    (ids,), (positions,) = found.ids, found.positions
    text = " ".join(words)
    theirs = ours.hf(
        text, return_offsets_mapping=True, split_special_tokens=True, verbose=False,
    )  # fmt: skip
    content = len(theirs["input_ids"]) - len(ours.prefix) - len(ours.suffix)
    kept = min(content, limit - len(ours.prefix) - len(ours.suffix))
    spans = theirs["offset_mapping"][len(ours.prefix) : len(ours.prefix) + content]
    assert len(ids) == kept + len(ours.prefix) + len(ours.suffix)
    assert found.lengths.tolist() == [len(theirs["input_ids"])]
    begin, cut, empty = 0, 0, 0
    for word, position in zip(words, positions, strict=True):
        first = next((begin + n for n, letter in enumerate(word) if not letter.isspace()), None)
        cover = [n for n, (a, b) in enumerate(spans) if first is not None and a <= first < b]
        expected = cover[0] + len(ours.prefix) if cover and cover[0] < kept else -1
        assert position == expected
        empty += not cover
        cut += bool(cover) and expected < 0
        begin += len(word) + 1
    assert (found.cut, found.empty) == (cut, empty)


@given(
    words=st.lists(st.sampled_from(["river", "the", "learns.", "Zebra", "é", "don't"]), max_size=9)
)
def test_of_wordpiece_that_is_the_first_piece_as_transformers_aligns_words(wordpiece, words):
    ours = load_tokenizer(str(wordpiece))
    theirs = ours.hf(words, is_split_into_words=True)
    found = encode_words(ours, [words], 512)
    assert found.ids[0].tolist() == theirs["input_ids"]
    assert found.positions[0].tolist() == [theirs.word_ids().index(n) for n in range(len(words))]


# ---- an expert -----------------------------------------------------------------------------------


def task(folder, sizes=(160, 30)):
    """A river has a name of one word before it, or of two; some texts are empty."""
    draw = np.random.default_rng(0)
    paths = []
    for name, size in zip(("train", "dev"), sizes, strict=True):
        rows = [{"tokens": [], "tags": []}, {"tokens": ["river", "\u200b"], "tags": ["O", "O"]}]
        for _ in range(size):
            words, tags = [], []
            for _ in range(draw.integers(1, 5)):
                filler = [
                    *draw.choice(["the", "a", "of", "in", "Learns"], size=draw.integers(1, 3))
                ]
                place = ["city", "engine"][: draw.integers(1, 3)] if draw.random() < 0.5 else []
                words += filler + place
                tags += ["O"] * len(filler) + ["B-LOC", "I-LOC"][: len(place)]
            rows.append({"tokens": words, "tags": tags})
        paths.append(write(folder / f"{name}.jsonl", rows))
    return paths


@pytest.mark.parametrize(("family", "auto"), [("bert", "MaskedLM"), ("gpt2", "CausalLM")])
def test_an_expert_learns_them_and_plain_transformers_gives_the_same(
    tmp_path, make_model, wordpiece, bytelevel, family, auto
):
    tokenizer = wordpiece if family == "bert" else bytelevel
    model = make_model(family, f"AutoModelFor{auto}", tokenizer, initializer_range=0.1)
    train, dev = task(tmp_path)
    out = str(tmp_path / "out")
    config = FinetuneConfig(epochs=6, batch_size=16, learning_rate=1e-2, max_length=16)
    result = finetune(str(model), train, dev, out, config=config)
    assert (result.metric, result.problem) == ("f1", "token_classification")
    assert result.mean > 0.8
    assert result.unread["dev"]["without a token"] == (1 if family == "bert" else 0)
    data = read_task(train, dev)[1]
    scores, logits = evaluate(out, data, max_length=16)
    assert scores == pytest.approx(result.per_seed[0].scores)
    scored = score_model(
        out, train, dev, f"{out}-s", config=FinetuneConfig(epochs=0, max_length=16)
    )
    assert scored.mean == pytest.approx(result.mean)

    saved = AutoModelForTokenClassification.from_pretrained(out).eval()
    theirs = AutoTokenizer.from_pretrained(out)
    assert saved.config.id2label == {0: "B-LOC", 1: "I-LOC", 2: "O"}
    lines = [json.loads(x) for x in (Path(out) / "predictions.jsonl").read_text().splitlines()]
    for words, line, own in zip(data.words, lines, data.by_text(logits), strict=True):
        assert len(line["tags"]) == len(line["given_tags"]) == len(words)
        if not words:
            continue
        inputs = theirs(
            " ".join(words), return_tensors="pt", return_offsets_mapping=True, truncation=True,
            max_length=16,
        )  # fmt: skip
        spans = inputs.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            given = saved(**inputs).logits[0]
        begin = 0
        for word, tag, scores in zip(words, line["tags"], own, strict=True):
            cover = [n for n, (a, b) in enumerate(spans) if a <= begin < b]
            if cover:
                assert tag == saved.config.id2label[int(given[cover[0]].argmax())]
                np.testing.assert_allclose(scores, given[cover[0]], atol=1e-4)
            else:
                assert tag is None
                assert np.isnan(scores).all()
            begin += len(word) + 1


def test_words_that_are_cut_are_counted_and_said(tmp_path, make_model, wordpiece, caplog):
    bert = make_model("bert", "AutoModelForMaskedLM", wordpiece, initializer_range=0.1)
    rows = [{"tokens": ["river", "city"] * 5, "tags": ["A", "B"] * 5}]
    path, config = write(tmp_path / "t.jsonl", rows), FinetuneConfig(max_steps=1, max_length=6)
    result = finetune(str(bert), path, path, str(tmp_path / "out"), config=config)
    assert "6 words of dev: cut; they have no answer, and count as wrong" in caplog.text
    assert "6 words of train: cut; they teach nothing" in caplog.text
    assert result.unread == {n: {"cut": 6, "without a token": 0} for n in ("train", "dev")}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["unread"] == result.unread
    assert result.per_seed[0].scores["accuracy"] <= 0.4


def test_a_classifier_of_texts_is_no_expert_of_tags_nor_the_other_way_round(
    tmp_path, make_model, wordpiece
):
    tags = write(tmp_path / "t.jsonl", [{"tokens": ["river", "the"], "tags": ["x", "y"]}])
    texts = write(tmp_path / "x.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    names = {"id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}}
    of_texts, of_tags = (
        str(make_model("bert", f"AutoModelFor{kind}Classification", wordpiece, **names))
        for kind in ("Sequence", "Token")
    )
    for model, path in ((of_texts, tags), (of_tags, texts)):
        with pytest.raises(
            InputError,
            match=r"is a (single_label|token)_classification; the task has labels of another kind",
        ):
            score_model(model, path, path, str(tmp_path / "s"), config=FinetuneConfig(epochs=0))
