"""Makes the golden cache of a served teacher, and what it decodes to. Run once, for its format
version; never for an old one.

    PYTHONPATH=tests/lib python tests/golden/make_served.py tests/golden/cache-v7
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from make_cache import TEXTS, decoded, train_tokenizer

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from testlib.servers.vllm_double import served


def main(out: Path) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "docs.txt").write_text("\n\n".join(TEXTS) + "\n")
        tokenizer = train_tokenizer(work / "tokenizer")
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        shape |= {"intermediate_size": 16, "initializer_range": 0.6, "vocab_size": tokenizer.size}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        with torch.no_grad():
            for first, last in tokenizer.gaps:  # what is no token is unlikely
                model.lm_head.weight[first:last] = 0
        model.save_pretrained(work / "lm")
        tokenizer.save(str(work / "lm"))
        corpus = {"source": [str(work / "docs.txt")], "tokenizer": str(work / "tokenizer")}
        with served(work / "lm") as server:
            where = {"url": server.url, "model": "tiny"}
            targets = [{"k": 4}, {"k": 6, "codec": "precise"}, {"k": 4, "codec": "compact"}]
            teachers = [
                {"name": name, "served": where, "targets": kept}
                for name, kept in zip(("usual", "exact", "packed"), targets, strict=True)
            ]
            values = {
                "corpus": corpus | {"sequence_length": 16},
                "cache": {"path": str(out), "sequences_per_shard": 4},
                "teachers": teachers,
            }
            cache_teachers(parse_settings(RunConfig, values))
    expected = [decoded(out, index) for index in range(len(Cache.open(out)))]
    out.with_suffix(".json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
