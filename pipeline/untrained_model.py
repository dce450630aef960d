"""A tiny untrained language model: a WordPiece tokenizer and a configuration."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from rekindle.data.storage.atomic import new_folder
from rekindle.pipeline.processes.jobs import Report

_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_RARE = 5  # rarer characters are unknown


def train_tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    """Train a lower-casing WordPiece tokenizer of at most ``size`` tokens; equal texts give equal
    ids.

    The trainer of ``tokenizers`` alone is not deterministic: it numbers the pieces "##a", "##b", …
    in the order in which a randomly seeded hash map yields the words, and breaks ties between
    merges by those numbers. Here these pieces have fixed numbers from the start, as special tokens
    of a draft whose vocabulary is then copied.
    """
    draft = _blank({})
    counts = Counter(char for text in texts for char in draft.normalizer.normalize_str(text))
    alphabet = sorted(char for char, n in counts.items() if n >= _RARE and not char.isspace())
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*_SPECIALS, *(f"##{char}" for char in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        min_frequency=2,
        show_progress=False,
    )
    draft.train_from_iterator(texts, trainer)
    tokenizer = _blank(draft.get_vocab())
    ids = tokenizer.get_vocab()
    sep, cls = ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    return tokenizer


def _blank(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def make_model(
    corpus: Path, out: Path, vocabulary: int, config: Mapping[str, int | float], report: Report
) -> None:
    """Write a tokenizer trained on the corpus, and ``config.json`` (a BERT with the values of
    ``config``), to ``out``, which appears whole or not at all. This is the function of a job.
    """
    from transformers import BertConfig, PreTrainedTokenizerFast

    bert = BertConfig(pad_token_id=0, **config)
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokenizer = train_tokenizer(texts, vocabulary)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    saved_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=bert.max_position_embeddings,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, _SPECIALS, strict=True)),
    )
    bert.vocab_size = len(saved_tokenizer)
    with new_folder(out) as staged:
        saved_tokenizer.save_pretrained(staged)
        bert.save_pretrained(staged)
