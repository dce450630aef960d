"""A built-in sentence encoder: two passages that follow each other are near, others of a step far.

Contrastive training with the other passages of a step as negatives (InfoNCE; Henderson et al.,
"Efficient Natural Language Response Suggestion", 2017). It is the teacher of the recipe `embed`:
tiny, and trained for a minute.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rekindle.pipeline.builtin.tasks import passages
from rekindle.pipeline.processes.jobs import Report

Pair = tuple[str, str]


def pairs_of(corpus: Path) -> list[Pair]:
    """Return each two passages of a document that follow each other, and the first line of each
    that begins with one line, with the passage under it.
    """
    with open(corpus, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    pairs = [pair for text in texts for pair in pairwise(passages(text))]
    for text in texts:
        title, _, body = text.partition("\n\n")
        if "\n" not in title and (following := passages(body)):
            pairs.append((title, following[0]))
    return pairs


def batches_of(pairs: Sequence[Pair], size: int, steps: int, seed: int) -> Iterator[list[Pair]]:
    """Yield ``steps`` batches of ``size`` pairs, drawn anew each time round."""
    import numpy as np

    generator, order = np.random.default_rng(seed), list[int]()
    for _ in range(steps):
        while len(order) < size:
            order += generator.permutation(len(pairs)).tolist()
        yield [pairs[number] for number in order[:size]]
        del order[:size]


def train_encoder(
    model: Path,
    corpus: Path,
    settings: Mapping[str, Any],
    max_length: int,
    seed: int,
    out: Path,
    report: Report,
) -> None:
    """Train the body of a masked LM as an encoder, and write it as a folder of
    sentence-transformers.
    """
    import torch
    from transformers import AutoModel

    from rekindle.data.corpus.tokenizer import load_tokenizer
    from rekindle.train.export.sentence_folder import Encoder, write_modules
    from rekindle.train.outside.quiet import quiet_transformers

    torch.manual_seed(seed)
    with quiet_transformers():
        body = AutoModel.from_pretrained(model, add_pooling_layer=False).train()
    tokenizer = load_tokenizer(str(model))
    encoder = Encoder.own("encoder", body.config.hidden_size, "mean", normalise=True)
    rate, steps = settings["learning_rate"], settings["steps"]
    optimizer = torch.optim.AdamW(body.parameters(), lr=rate)

    def vectors(texts: Sequence[str]) -> torch.Tensor:
        inputs = tokenizer.hf(
            list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        return encoder.vectors(body(**inputs).last_hidden_state, inputs["attention_mask"])

    batches = batches_of(pairs_of(corpus), settings["batch_pairs"], steps, seed)
    for step, pairs in enumerate(batches):
        warmup_share = min(1.0, (step + 1) / settings["warmup_steps"])
        optimizer.param_groups[0]["lr"] = rate * warmup_share * (1 - step / steps)
        first, second = (vectors(texts) for texts in zip(*pairs, strict=True))
        scores = first @ second.T / settings["temperature"]
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(pairs)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        report.advance()
    with quiet_transformers():
        body.save_pretrained(out)
    tokenizer.save(str(out))
    write_modules(encoder, body.config.hidden_size, max_length, out)
