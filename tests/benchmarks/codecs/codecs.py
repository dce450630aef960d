"""Bytes per position and error of each codec, on a real model's rows.

    python tests/benchmarks/codecs/codecs.py --model DIR --text FILE [--k 32,64,100] [--sequences N]

``DIR`` is a masked or causal LM with its tokenizer, ``FILE`` text it has not seen (jsonl or txt).
Every codec is written by stage 1 itself and audited against the live model: KL and the largest
errors are to the exact distribution over the k candidates and the tail. Sizes are of whole files:
candidates, values, tails at τ = 1, 2, 4, positions, scalars, digests, Arrow's own bytes.

Prediction (2026-11-21): default 3k + 18 bytes and KL below 2e-5; precise 4k + 16 bytes and KL near
1e-8; compact 25 % below the default at the same KL, to the last digit.
"""

import argparse
import csv
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.config import RunConfig
from rekindle.train.record.versions import package_versions

CODECS = ("default", "precise", "compact")
COLUMNS = ("codec", "k", "bytes a position", "of the default", "KL", "top-1", "kept mass")


def main() -> None:
    """Print the table, and append it to a file if one is given."""
    options = parsed()
    task = "causal_lm" if options.causal else "masked_lm"
    print(f"{options.model}, {options.text}: {platform.processor()}, {package_versions()}")
    print(("{:>18}" * len(COLUMNS)).format(*COLUMNS))
    for k in map(int, options.k.split(",")):
        size = None
        for codec in CODECS:
            found = measured(options, task, codec, k)
            size = size or found["bytes"]
            row = (
                *(codec, k, f"{found['bytes']:.1f}", f"{found['bytes'] / size:.3f}"),
                *(f"{found['kl']:.2e}", f"{found['top1']:.4f}", f"{found['kept_mass']:.4f}"),
            )
            print(("{:>18}" * len(row)).format(*row), flush=True)
            if options.csv:
                with open(options.csv, "a", newline="") as file:
                    csv.writer(file).writerow(["codecs", Path(options.model).name, *row])


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--k", default="32,64,100")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--audited", type=int, default=64, help="sequences for the errors")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--csv", help="append the rows to this file")
    return parser.parse_args()


def measured(options: argparse.Namespace, task: str, codec: str, k: int) -> dict[str, float]:
    """Make and audit one codec in a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {
            "corpus": {
                "source": options.text,
                "tokenizer": options.model,
                "sequence_length": 128,
                "packing": "contiguous",
                "limit_sequences": options.sequences,
            },
            "cache": {"path": folder, "replicas": 1},
            "teachers": [
                {
                    "name": "teacher",
                    "model": options.model,
                    "task": task,
                    "targets": {"kind": "topk", "k": k, "codec": codec},
                }
            ],
        }
        config = parse_settings(RunConfig, values)
        with torch.inference_mode():
            cache_teachers(config)
        teacher = Cache.open(folder).teacher("teacher")
        audit = audit_cache(folder, config, options.audited)["teacher"]
        return audit | {"bytes": teacher.bytes / teacher.positions}


if __name__ == "__main__":
    main()
