"""Who may teach: what is wrong with a teacher is said at once, by name, and leaves no trace."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.pipeline.caching.cache_teachers import cache_teachers

MASKED, CLASSES = "AutoModelForMaskedLM", "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def bert(make_model, wordpiece) -> Path:
    return make_model("bert", MASKED, wordpiece)


def masked(model: Path, **more: object) -> dict[str, object]:
    return {"name": "lm", "model": str(model), "task": "masked_lm"} | more


def copy_of(model: Path, target: Path, without: str = "") -> Path:
    shutil.copytree(model, target)
    for file in target.glob(without) if without else ():
        file.unlink()
    return target


def refused(configure, path: Path, teacher: dict[str, object], *words: str, **sections) -> str:
    """The message with which a teacher is refused; it leaves no trace of it in the cache."""
    with pytest.raises(InputError) as caught:
        cache_teachers(configure(path, [teacher], **sections))
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert not (path / "targets").exists()
    return message


def test_no_such_directory(tmp_path, configure):
    missing = tmp_path / "nowhere"
    refused(configure, tmp_path / "c", masked(missing), str(missing), "no such directory")


def test_a_directory_that_is_no_model(tmp_path, configure, wordpiece):
    refused(configure, tmp_path / "c", masked(wordpiece), str(wordpiece), "no config.json")


def test_a_hub_id_that_is_not_there(tmp_path, configure):
    teacher = masked(Path("nobody/nothing"))
    refused(configure, tmp_path / "c", teacher, "'nobody/nothing'", "hub")


def test_a_directory_without_safetensors(tmp_path, configure, bert):
    """Pickled weights are not loaded, whatever they are called."""
    path = copy_of(bert, tmp_path / "model", "*.safetensors")
    torch.save({}, path / "pytorch_model.bin")
    refused(configure, tmp_path / "c", masked(path), str(path), "no *.safetensors", "Pickled")


def test_an_expert_whose_tokenizer_has_other_special_tokens(tmp_path, configure, make_teacher):
    """Before anything is run: its own code would fail of an index."""
    teacher = make_teacher("topics", "sequence_classification")
    path = copy_of(Path(teacher["model"]), tmp_path / "model")
    (path / "special_tokens_map.json").write_text('{"sep_token": "[SEPARATOR]"}')
    teacher |= {"model": str(path)}
    told = ("'[SEPARATOR]') around each text", "special_tokens_map.json")
    refused(configure, tmp_path / "c", teacher, str(path), *told)


def test_damaged_safetensors(tmp_path, configure, bert):
    path = copy_of(bert, tmp_path / "model")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    said = ("damaged or truncated", "no whole safetensors header")
    refused(configure, tmp_path / "c", masked(path), str(path), *said)


def test_a_configuration_that_is_no_model_type(tmp_path, configure, bert):
    path = copy_of(bert, tmp_path / "model")
    (path / "config.json").write_text(json.dumps({"model_type": "never-heard-of-it"}))
    refused(configure, tmp_path / "c", masked(path), str(path), "config.json")


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta", "modernbert"])
def test_a_masked_lm_without_its_head_names_the_weights(
    tmp_path, configure, make_model, wordpiece, family
):
    """A random head would make noise of the whole cache."""
    model = make_model(family, CLASSES, wordpiece, num_labels=3)
    head = {
        "bert": "cls.predictions",
        "roberta": "lm_head",
        "electra": "generator_",
        "deberta": "cls.predictions",
        "modernbert": "decoder.bias",
    }[family]
    message = refused(configure, tmp_path / "c", masked(model), str(model), "no output over the")
    assert message.endswith("say `task: sequence_classification`")
    silent = copy_of(model, tmp_path / "model")  # that names no class may be anything
    config = json.loads((silent / "config.json").read_text()) | {"architectures": None}
    (silent / "config.json").write_text(json.dumps(config))
    assert head in refused(
        configure, tmp_path / "d", masked(silent), str(silent), "would be random"
    )


@pytest.mark.parametrize(
    ("task", "auto", "missing"),
    [
        ("sequence_classification", MASKED, "classifier.weight"),
        ("token_classification", MASKED, "classifier.weight"),
        ("regression", MASKED, "classifier.weight"),
    ],
)
def test_an_expert_without_its_head_names_the_weights(
    tmp_path, configure, make_model, wordpiece, task, auto, missing
):
    labels = {"num_labels": 1} if task == "regression" else {}
    model = make_model("bert", auto, wordpiece, **labels)
    refused(configure, tmp_path / "c", masked(model, task=task), missing, "would be random", "task")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_is_no_causal_lm(tmp_path, configure, make_model, bytelevel, family, tied):
    """Where the output matrix is the embedding no weight is missing, and yet it is no LM."""
    model = make_model(family, CLASSES, bytelevel, num_labels=2, tie_word_embeddings=tied)
    corpus = {"tokenizer": str(bytelevel)}
    teacher = masked(model, task="causal_lm")
    message = refused(configure, tmp_path / "c", teacher, "'lm'", corpus=corpus)
    assert f"{model}" in message
    assert "ForSequenceClassification" in message


def test_a_model_of_another_kind(tmp_path, configure, make_model, wordpiece):
    model = make_model("llama", "AutoModelForCausalLM", wordpiece)
    refused(configure, tmp_path / "c", masked(model), str(model), MASKED)


def test_another_tokenizer(tmp_path, configure, make_model, bytelevel):
    model = make_model("roberta", MASKED, bytelevel)
    refused(configure, tmp_path / "c", masked(model), "'lm'", "another tokenizer")


def test_a_tokenizer_with_the_same_size_and_other_tokens(tmp_path, configure, bert):
    path = copy_of(bert, tmp_path / "model")
    text = (path / "tokenizer.json").read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    one, two = (next(t for t, i in vocabulary.items() if i == number) for number in (60, 61))
    values = json.loads(text)
    values["model"]["vocab"] |= {one: 61, two: 60}
    (path / "tokenizer.json").write_text(json.dumps(values))
    refused(configure, tmp_path / "c", masked(path), "another tokenizer", "id 60 is", "id 61 is")


def test_a_sequence_expert_may_have_another_tokenizer(tmp_path, configure, make_model, bytelevel):
    model = make_model("roberta", CLASSES, bytelevel)
    teacher = masked(model, task="sequence_classification")
    assert cache_teachers(configure(tmp_path, [teacher])).units_done == 3


def test_a_smaller_vocabulary(tmp_path, configure, make_model, wordpiece):
    size = len(transformers.AutoTokenizer.from_pretrained(str(wordpiece)))
    model = make_model("bert", MASKED, wordpiece, vocab_size=size - 1)
    refused(configure, tmp_path / "c", masked(model), "'lm'", str(size - 1), str(size))


def test_without_tokenizer_files_the_size_decides(tmp_path, configure, make_model, wordpiece, bert):
    bare = copy_of(bert, tmp_path / "bare", "*token*")
    size = len(transformers.AutoTokenizer.from_pretrained(str(wordpiece)))
    padded = make_model("bert", MASKED, wordpiece, vocab_size=size + 6)
    other = copy_of(padded, tmp_path / "other", "*token*")
    refused(configure, tmp_path / "c", masked(other), str(other), "no tokenizer files")
    assert cache_teachers(configure(tmp_path / "c", [masked(bare)])).units_done == 6


def test_a_classifier_is_no_regression(tmp_path, configure, make_model, wordpiece):
    problem = "single_label_classification"
    model = make_model("bert", CLASSES, wordpiece, num_labels=3, problem_type=problem)
    teacher = masked(model, task="regression")
    refused(configure, tmp_path / "c", teacher, "'lm'", problem, "task: sequence_classification")


def test_several_outputs_are_scores_only_where_the_model_says_so(
    tmp_path, configure, make_model, wordpiece
):
    model = make_model("bert", CLASSES, wordpiece, num_labels=2)
    told = ("2 outputs, which may be classes", '"problem_type": "regression" into its config.json')
    refused(configure, tmp_path / "c", masked(model, task="regression"), *told)


def test_a_regression_model_is_no_classifier(tmp_path, configure, make_model, wordpiece):
    for labels in (1, 3):
        model = make_model("bert", CLASSES, wordpiece, num_labels=labels, problem_type="regression")
        teacher = masked(model, task="sequence_classification")
        refused(configure, tmp_path / "c", teacher, "'lm'", "task: regression")


@pytest.mark.parametrize(
    ("family", "positions", "longest"), [("bert", 16, 16), ("roberta", 20, 19), ("electra", 23, 23)]
)
def test_sequences_longer_than_the_teacher_takes(
    tmp_path, configure, make_model, wordpiece, family, positions, longest
):
    """RoBERTa numbers positions from pad_token_id + 1 (here 1), so it takes that many fewer."""
    model = make_model(family, MASKED, wordpiece, max_position_embeddings=positions)
    teacher = masked(model)
    refused(configure, tmp_path / "c", teacher, "'lm'", f"at most {longest} tokens", "is 24")
    fits = configure(tmp_path / "fits", [teacher], corpus={"sequence_length": longest})
    assert cache_teachers(fits).units_done == 6
    lengths = [len(Cache.open(tmp_path / "fits").example(i).input_ids) for i in range(12)]
    assert max(lengths) == longest


def test_a_tokenizer_without_a_mask_token(tmp_path, configure, make_model, bytelevel):
    model = make_model("roberta", MASKED, bytelevel)
    corpus = {"tokenizer": str(bytelevel)}
    refused(
        configure, tmp_path / "c", masked(model), str(bytelevel), "no mask token", corpus=corpus
    )


def test_an_unknown_domain(tmp_path, configure, bert):
    teacher = masked(bert, domains=["even", "uneven"])
    refused(configure, tmp_path / "c", teacher, "'lm'", "'uneven'", "even (", "odd (")
    nameless = {"domain_field": None}
    teacher = masked(bert, domains=["even"])
    refused(configure, tmp_path / "d", teacher, "domain_field", corpus=nameless)


def test_a_wrong_teacher_stops_the_run_before_any_other_runs(tmp_path, configure, bert):
    right, wrong = masked(bert), masked(bert, name="other", domains=["nowhere"])
    with pytest.raises(InputError, match="'other'"):
        cache_teachers(configure(tmp_path, [right, wrong]))
    assert not (tmp_path / "targets").exists()


# --- the teacher under that name is another one ---------------------------------------------------


def test_the_same_name_for_another_teacher_says_what_differs(
    tmp_path, configure, make_model, wordpiece, bert
):
    first = masked(bert, targets={"kind": "topk", "k": 8})
    cache_teachers(configure(tmp_path, [first]))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    retrained = make_model("bert", MASKED, wordpiece, seed=9)
    dropout = make_model("bert", MASKED, wordpiece, hidden_dropout_prob=0.25)
    for teacher, told in [
        (first | {"model": str(retrained)}, "other weights"),
        (first | {"model": str(dropout)}, "other config"),
        (
            first | {"targets": {"kind": "topk", "k": 8, "codec": "precise"}},
            "codec: 'default' there",
        ),
        (first | {"targets": {"kind": "dense"}}, "kind: 'topk' there, 'dense' here"),
        (first | {"domains": ["even"]}, r"domains: None there, \['even'\] here"),
        (first | {"precision": "bf16"}, "precision: 'fp32' there, 'bf16' here"),
    ]:
        with pytest.raises(CacheMismatchError, match=rf"teacher 'lm' .*{told}.*another name"):
            cache_teachers(configure(tmp_path, [teacher]))
    masks = {"mask": {"policy": "random"}}
    with pytest.raises(CacheMismatchError, match=r"view: 'masked-.*' there, 'masked-.*' here"):
        cache_teachers(configure(tmp_path, [first], cache=masks))
    same = {p: p.read_bytes() for p in before}
    assert same == before


def test_the_same_teacher_elsewhere_is_the_same_teacher(tmp_path, configure, bert):
    """Its path and what a save changes without changing the model do not count."""
    cache_teachers(configure(tmp_path / "c", [masked(bert)]))
    moved = copy_of(bert, tmp_path / "moved")
    values = json.loads((moved / "config.json").read_text())
    values |= {"transformers_version": "4.0.0", "dtype": "bfloat16"}
    (moved / "config.json").write_text(json.dumps(values))
    result = cache_teachers(configure(tmp_path / "c", [masked(moved)]))
    assert (result.units_done, result.units_present) == (0, 6)


def test_what_is_left_to_the_machine_is_as_the_cache_has_it(tmp_path, configure, bert):
    """A cache made in bfloat16 on a GPU is finished by the same configuration on a CPU."""
    config = configure(tmp_path, [masked(bert, precision="bf16", domains=["odd", "even"])])
    cache_teachers(config)
    next((tmp_path / "targets" / "lm" / "commits").iterdir()).unlink()
    auto = configure(tmp_path, [masked(bert, domains=["even", "odd", "odd"])])
    assert cache_teachers(auto).units_done == 1
    assert cache_teachers(config).units_done == 0
    explicit = configure(tmp_path, [masked(bert, precision="fp32", domains=["odd", "even"])])
    with pytest.raises(CacheMismatchError, match="precision: 'bf16' there, 'fp32' here"):
        cache_teachers(explicit)


def test_a_name_cannot_leave_the_cache(tmp_path, configure, bert):
    for name in ["../x", "a/b", ".hidden", "", "a\n"]:
        with pytest.raises(InputError, match=r"teachers\.0\.name"):
            configure(tmp_path, [masked(bert, name=name)])


def test_what_the_cache_records_of_a_teacher(tmp_path, configure, make_model, wordpiece, bert):
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    expert = make_model("bert", CLASSES, wordpiece, **labels)
    teachers = [
        masked(bert, targets={"kind": "topk", "k": 5, "temperatures": [3]}),
        masked(expert, name="yes-or-no", task="sequence_classification"),
    ]
    cache_teachers(configure(tmp_path, teachers))
    lm, expert_info = (Cache.open(tmp_path).teachers[name].info for name in ("lm", "yes-or-no"))
    assert (lm.k, lm.temperatures, lm.estimator["bias"]) == (5, (1.0, 3.0), "biased")
    assert set(lm.fingerprints) == {"weights", "config", "tokenizer"}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in lm.fingerprints.values())
    assert {"torch", "transformers", "rekindle"} <= set(lm.versions)
    assert expert_info.label_names == ("no", "yes")
    assert expert_info.estimator == {"kind": "dense", "bias": "exact"}
