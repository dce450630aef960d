"""A tokenizer like Llama's: pieces with "▁" for a space, and a token for each byte."""

import json
from collections.abc import Iterable
from pathlib import Path


def save_pieces(folder: Path, texts: Iterable[str], size: int) -> Path:
    """Train a tokenizer of at most ``size`` tokens on ``texts``; BOS comes before a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Without a pre-tokenizer a text is one word; from single words the trainer makes pieces.
    words = [f" {word}" for text in texts for word in text.split(" ")]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    made.train_from_iterator((word[1:] for word in words), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    values = json.loads(made.to_str())
    values["added_tokens"] = [one for one in values["added_tokens"] if one["id"] < 3]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)),
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        model_max_length=512,
    )
    fast.save_pretrained(folder)
    return folder
