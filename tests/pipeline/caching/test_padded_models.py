"""Models that padding changes: shown sequences of one length together, or refused."""

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.pipeline.caching.batching import length_buckets
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.train.config import StudentConfig
from rekindle.train.finetune.classifier import predict
from rekindle.train.finetune.encoded import EncodedTexts
from rekindle.train.student import build_student


@pytest.fixture(scope="module")
def fnet(tmp_path_factory, wordpiece):
    """fnet(auto class) -> a directory with a tiny FNet, which mixes all places of its input."""

    def make(auto):
        tokenizer = load_tokenizer(str(wordpiece))
        config = transformers.FNetConfig(
            vocab_size=tokenizer.size,
            hidden_size=16,
            num_hidden_layers=2,
            intermediate_size=24,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_id,
            initializer_range=0.3,
            num_labels=3,
        )
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("fnet")
        getattr(transformers, auto).from_config(config).save_pretrained(path)
        tokenizer.save(str(path))
        return path

    return make


def test_equal_lengths_share_a_batch_and_no_others():
    lengths = np.array([3, 5, 3, 0, 5, 5, 2])
    batches = [sorted(batch.tolist()) for batch in length_buckets(lengths, 10, equal=True)]
    assert batches == [[1, 4], [5], [0, 2], [6]]


def test_a_teachers_targets_do_not_depend_on_their_neighbours(tmp_path, configure, fnet, caplog):
    path = fnet("AutoModelForSequenceClassification")
    teacher = {"name": "sense", "model": str(path), "task": "sequence_classification"}
    with caplog.at_level("INFO", logger="rekindle"):
        cache_teachers(configure(tmp_path, [teacher]))
    assert "teacher sense: FNetForSequenceClassification lets padding change" in caplog.text
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    cache, tokenizer = Cache.open(tmp_path), load_tokenizer(str(path))
    for example in map(cache.example, range(len(cache))):
        (encoded,) = tokenizer.encode([example.text])
        ids = np.concatenate([tokenizer.prefix, encoded.ids, tokenizer.suffix]).astype(np.int64)
        with torch.no_grad():
            alone = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
        np.testing.assert_allclose(example.targets["sense"][0].logits, alone, atol=1e-4)


def test_scores_do_not_depend_on_their_neighbours(fnet):
    path = fnet("AutoModelForSequenceClassification")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    rows = [[5, 6, 7], [8, 9], [10, 11, 12], [13]]
    found = predict(model, EncodedTexts(rows, None, 0), 4)
    for row, logits in zip(rows, found, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row])).logits[0]
        np.testing.assert_allclose(logits, alone, atol=1e-5)


def test_such_a_student_is_refused(fnet):
    config = StudentConfig(model=str(fnet("AutoModelForMaskedLM")))
    with pytest.raises(InputError, match=r"FNetForMaskedLM lets padding.*another family"):
        build_student(config, {}, 50, 0)
