"""A tokenizer with gaps in its ids: what lies above them is tokens like others, gaps are none."""

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.data.corpus import config, corpus
from rekindle.data.corpus.config import content_ids, gap_ids
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError
from rekindle.data.storage.store import LocalStore
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.masking import MaskConfig
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.train.config import StudentConfig
from rekindle.train.method import MethodRun
from rekindle.train.methods.replaced_tokens import ReplacedTokens, ReplacedTokensSettings
from rekindle.train.student import build_student
from testlib.models import NARROW
from testlib.run_alone import check_distribution, logits_of
from testlib.vocabularies.changed import with_gaps

MASKED = "AutoModelForMaskedLM"
LIFTED = ["the", "a", "ri", "##er"]
KINDS = {
    "topk": {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]},
    "all": {"kind": "topk", "k": 100_000, "temperatures": [1.0]},
    "threshold": {"kind": "threshold", "k": 8},
    "random": {"kind": "random", "k": 40},
    "dense": {"kind": "dense"},
    "hidden": {"kind": "hidden"},
}


@pytest.fixture(scope="module")
def gapped(tmp_path_factory, wordpiece):
    return with_gaps(wordpiece, tmp_path_factory.mktemp("gaps") / "tokenizer", LIFTED)


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model, gapped):
    """Nearly all of its mass lies in the gaps and in the rows that pad its vocabulary."""
    tokenizer = load_tokenizer(str(gapped))
    made = make_model("bert", MASKED, gapped, 3, **NARROW, vocab_size=tokenizer.size + 6)
    found = transformers.AutoModelForMaskedLM.from_pretrained(str(made))
    holes = [i for first, past in tokenizer.gaps for i in range(first, past)]
    with torch.no_grad():
        found.cls.predictions.bias[[*holes, *range(tokenizer.size, tokenizer.size + 6)]] = 30.0
    folder = tmp_path_factory.mktemp("gaps") / "model"
    found.save_pretrained(folder)
    tokenizer.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_cache, gapped, model):
    """The configuration of a cache with targets of all kinds; half of what is masked is random."""
    teachers = [
        {"name": name, "model": str(model), "task": "masked_lm", "targets": targets}
        for name, targets in KINDS.items()
    ]
    mask = {"probability": 0.5, "mask_token": 0.5, "random_token": 0.5}
    path = tmp_path_factory.mktemp("gaps") / "cache"
    return make_cache(
        path, teachers, {"tokenizer": str(gapped), "limit_sequences": 12}, {"mask": mask}
    )


def test_the_size_is_one_past_the_largest_id(gapped, wordpiece):
    plain, found = load_tokenizer(str(wordpiece)), load_tokenizer(str(gapped))
    assert plain.gaps == ()
    assert found.size == max(found.hf.get_vocab().values()) + 1 > len(found.hf) == plain.size
    holes = {i for first, past in found.gaps for i in range(first, past)}
    assert holes == {*range(found.size)} - {*found.hf.get_vocab().values()}


def test_the_text_is_there_and_random_tokens_are_drawn_from_all_tokens(made):
    cache = Cache.open(made.cache.path)
    facts = cache.corpus.info["tokenizer"]
    lifted = {*range(168, facts["size"])} - {*gap_ids(facts).tolist()}
    assert len(lifted) == len(LIFTED)
    texts = np.concatenate([cache.example(i).input_ids for i in range(len(cache))])
    assert {*texts.tolist()} & lifted
    masker = MaskedView(cache.corpus, MaskConfig(mask_token=0, random_token=1), 0, 1).masker
    drawn = masker.replacements(texts[:1].repeat(20_000), np.arange(20_000), "digest", 0)
    assert {*drawn.tolist()} == {*content_ids(facts).tolist()} > lifted
    assert not {*drawn.tolist()} & {*gap_ids(facts).tolist()}


def test_targets_are_of_tokens_alone(made, model, gapped):
    assert verify_cache(made.cache.path).problems == []
    cache = Cache.open(made.cache.path)
    facts = cache.corpus.info["tokenizer"]
    holes, size = gap_ids(facts), facts["size"]
    assert cache.teacher("all").info.k == size - len(holes)
    assert cache.teacher("all").info.estimator["bias"] == "exact"
    for index in range(0, len(cache), 5):
        example = cache.example(index)
        for name in KINDS:
            for found in example.targets[name]:
                kept = found.ids[np.exp(found.log_probs) > 1e-30]
                assert not np.isin(kept, holes).any(), name
                logits = logits_of(model, MASKED, input_ids=found.input_ids)[:, :size]
                logits[:, holes] = -1e5
                exact = torch.log_softmax(logits[found.positions], -1).numpy()
                gold = np.take_along_axis(exact, found.gold_ids[:, None], 1)[:, 0]
                assert np.abs(found.gold_log_prob - gold.clip(-63.999)).max() < 2e-3
                if name in ("dense", "hidden"):
                    error = np.abs(np.exp(found.log_probs) - np.exp(exact)).max()
                    assert error < (1e-5 if name == "dense" else 1e-2)
                if name in ("topk", "all"):
                    for row in range(len(found.positions)):
                        at = logits[found.positions[row]]
                        check_distribution(found, row, at, int(found.gold_ids[row]))


@pytest.mark.parametrize("teacher", ["topk", "dense", "random"])
def test_replaced_tokens_are_tokens(made, teacher):
    """Drawn from what was kept, and from what was not."""
    cache = Cache.open(made.cache.path)
    (view,) = cache.views
    settings = ReplacedTokensSettings(method="replaced_tokens", teacher=teacher)
    method = ReplacedTokens(settings, MethodRun(cache, "masked_lm", view, 1, 0))
    seen = set()
    for epoch in range(2):
        batch = cache.gather(np.arange(12), [teacher], epoch=epoch, masked_view=view)
        seen |= {
            *method.corrupted(batch, torch.device("cpu")).inputs["input_ids"].flatten().tolist()
        }
    facts = cache.corpus.info["tokenizer"]
    assert not seen & {*gap_ids(facts).tolist()}
    assert max(seen) == facts["size"] - 1


def test_a_student_needs_as_many_rows_as_the_largest_id_wants(made, model, gapped, make_model):
    size = load_tokenizer(str(gapped)).size
    student = StudentConfig(model=str(model), task="masked_lm")
    assert build_student(student, {}, size, 0).output_head.weight.shape[0] == size
    small = make_model("bert", MASKED, gapped, 3, **NARROW, vocab_size=168)
    scratch = StudentConfig(model=str(small), task="masked_lm", from_scratch=True)
    with pytest.raises(InputError, match=rf"go up to {size - 1}; set vocab_size .* to {size} or"):
        build_student(scratch, {}, size, 0)


def test_an_audit_finds_nothing(made):
    report = audit_cache(made.cache.path, made, 3)
    assert report.problems == []
    assert {*report.values} == {*KINDS}


def made_before(monkeypatch, tmp_path, gapped, text):
    """A corpus that knows of the tokenizer what versions before format 3 recorded."""

    def as_before(tokenizer):
        known = config.tokenizer_facts(tokenizer)
        known.pop("holes")
        return known | {"size": len(tokenizer.hf)}

    (tmp_path / "text.txt").write_text(text)
    settings = config.CorpusConfig(source=str(tmp_path / "text.txt"), tokenizer=str(gapped))
    store = LocalStore(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "tokenizer_facts", as_before)
        patch.setattr(
            corpus,
            "describe_corpus",
            lambda *a: config.describe_corpus(*a) | {"tokenizer": as_before(a[1])},
        )
        corpus.build_corpus(store, settings, 10)
    return store, settings


def test_a_corpus_of_an_earlier_version_is_read_as_it_was_made(monkeypatch, tmp_path, gapped):
    store, settings = made_before(monkeypatch, tmp_path, gapped, "old city.")
    found = corpus.Corpus(store)
    assert len(found.rows(0, 0, 1)) == 1
    masker = MaskedView(found, MaskConfig(), 0, 1).masker
    assert masker.content_ids.tolist() == [*range(5, 168)]  # as they were drawn then
    with pytest.raises(CacheMismatchError, match=r"gaps in its ids.*took 168 .*cannot be added to"):
        corpus.build_corpus(store, settings, 10)


def test_a_corpus_of_an_earlier_version_that_lost_text_says_so(monkeypatch, tmp_path, gapped):
    store, _ = made_before(monkeypatch, tmp_path, gapped, "the river runs.")
    with pytest.raises(CacheMismatchError, match=r"gaps in its ids.*Make the cache again"):
        corpus.Corpus(store).rows(0, 0, 1)


def test_ids_in_a_gap_are_damage(made, monkeypatch):
    found = Cache.open(made.cache.path).corpus
    facts = found.info["tokenizer"]
    assert config.are_tokens(np.array([0, facts["size"] - 1], np.int32), facts)
    assert not config.are_tokens(np.array([0, facts["holes"][0][0]], np.int32), facts)
    found.shard(0)
    monkeypatch.setitem(facts, "holes", [[5, 160]])
    with pytest.raises(CacheFormatError, match="ids outside the vocabulary"):
        found.rows(0, 0, 1)
