"""Make the missing built-in models; ``builtin.missing`` runs this as a separate process.

Unfinished work is in its own folder, and a lock lets only one process work: a second one waits, and
then finds the result.
"""

import logging
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rekindle.data.corpus.packing import MAX_SHARD_SIZE
from rekindle.data.errors import InputError, RekindleError
from rekindle.data.settings import parse_settings
from rekindle.data.storage.atomic import publish_folder
from rekindle.pipeline import job_functions
from rekindle.pipeline.builtin.encoder import train_encoder
from rekindle.pipeline.builtin.names import (
    CORPUS,
    DOMAINS,
    FILES,
    MODELS,
    PREFIX,
    documents_file,
    folder,
)
from rekindle.pipeline.builtin.sections import write_sections
from rekindle.pipeline.builtin.settings import SETTINGS
from rekindle.pipeline.builtin.tasks import write_documents
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.exits import leave
from rekindle.pipeline.processes.jobs import Job, Report, StepReports, run_jobs
from rekindle.pipeline.processes.worker import warm_up
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.untrained_model import make_model
from rekindle.train.finetune.config import ComparisonFinetuneConfig
from rekindle.train.record.run_folder import locked_folder

Recipe = Callable[..., None]  # called with ``out`` and ``report``
_WORK_PREFIX = ".begun-"  # prefix of the folders of unfinished work
_TOKENIZER_FILES = "*token*.json"
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", _TOKENIZER_FILES)


def make(names: Sequence[str], progress: Progress) -> None:
    """Make the built-ins ``names`` (with or without prefix) and what they depend on."""
    root = folder()
    short_names = [name.removeprefix(PREFIX) for name in names]
    models = with_prerequisites([name for name in short_names if name in MODELS])
    with locked_folder(root, wait=True) as has_lock:
        if has_lock:
            for leftover in root.glob(f"{_WORK_PREFIX}*"):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
        # Without the lock, two processes do the same work, harmlessly.
        with TemporaryDirectory(
            prefix=_WORK_PREFIX, dir=root, ignore_cleanup_errors=True
        ) as temporary:
            work_folder = Path(temporary)
            if any(not (root / name).exists() for name in models):
                warm_up()  # while the documents are read
            if not (root / "documents").exists():
                texts = work_folder / "documents"
                with progress.task("documents", unit="files", total=len(FILES)) as task:
                    pages = write_documents(texts, SETTINGS.sizes, SETTINGS.documents, DOMAINS)
                    write_sections(pages, SETTINGS.sections, texts)
                    _publish(texts, root / "documents")
                    task.advance(len(FILES))
            run_jobs([job_of(name, root, work_folder) for name in models], root / "log", progress)


def with_prerequisites(models: Sequence[str]) -> list[str]:
    """Return ``models`` with what they start from, in an order in which they can be made."""
    ordered: dict[str, None] = {}
    for name in models:
        ordered |= dict.fromkeys((*with_prerequisites(prerequisites(name)), name))
    return list(ordered)


def prerequisites(name: str) -> tuple[str, ...]:
    """Return the built-in that a model starts from."""
    if name == "tokenizer":
        return ()
    from_bert = name.startswith("expert-") or name.removeprefix("bert-") in DOMAINS
    from_bert = from_bert or name == "encoder"
    return ("bert",) if from_bert else ("tokenizer",)


def _publish(work_folder: Path, out: Path) -> None:
    """Give finished work its name; if another process was first, its result stays."""
    if not out.exists():
        publish_folder(work_folder, out)


# --- the jobs -------------------------------------------------------------------------------------


def job_of(name: str, root: Path, work_folder: Path) -> Job:
    """Return the job that makes a model in ``work_folder`` and moves it to ``root``."""
    recipe, steps = _recipe_of(name, root)
    out = root / name
    return Job(
        PREFIX + name,
        _make_and_show,
        (recipe, work_folder / name, out),
        output=out,
        after=tuple(PREFIX + prerequisite for prerequisite in prerequisites(name)),
        steps=steps,
    )


def _make_and_show(recipe: Recipe, work_folder: Path, out: Path, report: Report) -> None:
    recipe(out=work_folder, report=report)
    _publish(work_folder, out)


def _recipe_of(name: str, root: Path) -> tuple[Recipe, int]:
    """Return the function that makes a model in ``out``, and its number of steps."""
    settings, corpus = SETTINGS, documents_file(root, CORPUS)
    tokenizer, bert, train = root / "tokenizer", root / "bert", settings.pretrain
    if name == "tokenizer":  # also bert's configuration
        config = settings.bert | {"max_position_embeddings": settings.positions}
        return partial(make_model, corpus, vocabulary=settings.vocabulary, config=config), 1
    if name.endswith("-larger"):
        values = settings.bert_larger if name.startswith("bert") else settings.gpt2_larger
        return partial(write_untrained, tokenizer, name.removesuffix("-larger"), values), 1
    if name.startswith("expert-"):
        task = documents_file(root, f"{name.removeprefix('expert-')}/train").parent
        return partial(fine_tune, bert, task), 1
    if name == "encoder":
        arguments = (settings.encoder, settings.sequence_length, settings.seed)
        return partial(train_encoder, bert, corpus, *arguments), int(settings.encoder["steps"])
    if name == "gpt2":
        return partial(pretrain_gpt2, tokenizer, corpus), train["steps"]
    if name == "bert":
        student = {"model": str(tokenizer), "from_scratch": True}
        return partial(pretrain, student, corpus, train), train["steps"]
    text = root / "documents" / f"domain-{name.removeprefix('bert-')}.jsonl"
    train = settings.further
    return partial(pretrain, {"model": str(bert)}, text, train), train["steps"]


def write_untrained(
    tokenizer: Path, kind: str, values: Mapping[str, object], out: Path, report: Report
) -> None:
    """Write a configuration and the tokenizer, without weights."""
    from transformers import BertConfig, GPT2Config

    from rekindle.data.corpus.tokenizer import load_tokenizer

    loaded = load_tokenizer(str(tokenizer))
    shared_values = {"vocab_size": loaded.size, "pad_token_id": loaded.pad_id}
    if kind == "bert":
        config = BertConfig(max_position_embeddings=SETTINGS.positions, **shared_values, **values)
    else:
        # Texts begin with [CLS] and end with [SEP] for this model, too.
        ends = {"bos_token_id": loaded.prefix[0], "eos_token_id": loaded.suffix[-1]}
        config = GPT2Config(n_positions=SETTINGS.positions, **shared_values, **ends, **values)
    config.save_pretrained(out)
    loaded.save(out)


def pretrain_gpt2(tokenizer: Path, corpus: Path, out: Path, report: Report) -> None:
    """Pre-train a causal language model from scratch."""
    untrained = out.with_name("gpt2-untrained")
    write_untrained(tokenizer, "gpt2", SETTINGS.gpt2, untrained, Report())
    student = {"model": str(untrained), "from_scratch": True, "task": "causal_lm"}
    pretrain(student, corpus, SETTINGS.pretrain, out, report)


def pretrain(
    student: Mapping[str, object], corpus: Path, train: dict[str, object], out: Path, report: Report
) -> None:
    """Run both stages without teachers, on a temporary cache; keep the model."""
    from rekindle.pipeline.caching.cache_teachers import cache_teachers
    from rekindle.pipeline.train_student import train_from_config

    settings, run = SETTINGS, out.with_name(f"{out.name}-run")
    values = {
        "corpus": {
            "source": [str(corpus)],
            "tokenizer": student["model"],
            "sequence_length": settings.sequence_length,
        },
        "cache": {
            "path": str(out.with_name(f"{out.name}-cache")),
            "sequences_per_shard": MAX_SHARD_SIZE,  # temporary, so one shard will do
            "replicas": settings.replicas,
            "seed": settings.seed,
        },
        "student": student,
        "train": train | {"seed": settings.seed, "batch_sequences": settings.batch_sequences},
    }
    config = parse_settings(RunConfig, values, out.name)
    cache_teachers(config)
    train_from_config(config, run, progress=StepReports(report))
    out.mkdir()
    for pattern in _MODEL_FILES:
        for file in run.glob(pattern):
            file.rename(out / file.name)


def fine_tune(model: Path, task: Path, out: Path, report: Report) -> None:
    """Fine-tune an expert as ``pipeline finetune`` does."""
    values = SETTINGS.finetune | {"max_length": SETTINGS.sequence_length}
    config = parse_settings(ComparisonFinetuneConfig, values)
    tuning = job_functions.FineTuning(model, task, out, range(1))
    job_functions.fine_tune(tuning, [(config, out)], report)


# --- the process ----------------------------------------------------------------------------------


def main() -> int:
    """Make the names on the command line; errors go to stdout."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("rekindle").setLevel(logging.INFO)
    try:
        with Progress.to_terminal() as progress:
            make(sys.argv[1:], progress)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"{error.strerror} ({error.filename}); REKINDLE_HOME names another folder")
        return InputError.exit_code
    except RekindleError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    leave(main())  # the parent does not need an orderly end of the interpreter
