"""Fine-tune a model on a labelled task into an expert directory. Uses no cache of targets.

The dev split decides which seed's model is written and, with ``patience`` (the default), which
epoch's. Then each seed's score is that of its best epoch on the very rows that chose it: ``mean``
is somewhat too high, the more so the smaller dev is and the more epochs there are, and ``std`` too
small. For comparisons or publication, score on rows that choose nothing (``test``), or train
without ``patience``: the last epoch is kept, and ``mean`` and ``std`` carry no selection.
"""

import functools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rekindle.data.errors import InputError
from rekindle.train.export.card import CARD_FILE
from rekindle.train.export.expert_card import expert_card
from rekindle.train.export.start import check_head, distilled_model
from rekindle.train.finetune.best_epoch import DONE, MAX_STEPS, PATIENCE, BestEpoch
from rekindle.train.finetune.classifier import (
    classifier_config,
    classifier_logits,
    kept_word_positions,
    load_classifier,
    padded_tokenizer,
    predict,
)
from rekindle.train.finetune.config import (
    LEAST_STEPS,
    FinetuneConfig,
    learning_rate_factor,
    less_memory,
    plan_steps,
)
from rekindle.train.finetune.constant import find_weakness
from rekindle.train.finetune.encoded import (
    EncodedTexts,
    collate,
    encode,
    epoch_batches,
    log_cut_texts,
)
from rekindle.train.finetune.loss import loss_of
from rekindle.train.finetune.metrics import (
    chosen_metric,
    log_undefined_scores,
    printed_name,
    scores_of,
)
from rekindle.train.finetune.predictions import Answers, write_predictions
from rekindle.train.finetune.progress import Report, SeedProgress
from rekindle.train.finetune.result import FinetuneResult, SeedResult, check_out
from rekindle.train.finetune.seeds import FinishedSeeds, describe_tuning
from rekindle.train.finetune.task_data import TaskData, read_task
from rekindle.train.model.files import place
from rekindle.train.model.sight import padding_influence
from rekindle.train.optimizer import adamw
from rekindle.train.outside.quiet import quiet_transformers
from rekindle.train.precision import autocast, bf16_saves, warn_of_slow_precision
from rekindle.train.ranking.groups import batches_of_groups, trained_rows, warn_large_groups
from rekindle.train.record.working_copy import shown_folder
from rekindle.train.running_out import report_shortage

CLIP_NORM = 1.0
PREDICTIONS_FILE = "predictions.jsonl"  # for dev, in an expert's folder
LOSS_EVERY = 10  # steps between two looks at the loss; each one waits for the device

logger = logging.getLogger("rekindle")


@dataclass(frozen=True)
class _Job:
    """What the seeds share."""

    model: str
    config: FinetuneConfig
    tokenizer: PreTrainedTokenizerFast
    data: dict[str, TaskData]  # train, dev and maybe test
    encoded: dict[str, EncodedTexts]
    cut_shares: dict[str, float]  # of the texts of each split
    metric: str
    device: torch.device
    precision: str
    rows: np.ndarray | None = None  # for documents in groups: the rows to train on

    @property
    def train_count(self) -> int:
        """Return how many rows an epoch trains on."""
        return len(self.data["train"]) if self.rows is None else len(self.rows)

    @property
    def unread_words(self) -> dict[str, dict[str, int]]:
        """Return the numbers of words that are not read, by split and reason."""
        texts = self.encoded.items()
        return {name: each.unread for name, each in texts if each.word_positions is not None}

    @property
    def shown_metric(self) -> str:
        """Return the printed name of the metric."""
        train = self.data["train"]
        return printed_name(self.metric, train.problem, len(train.label_names))

    def batches(self, seed: int, epoch: int) -> list[np.ndarray]:
        """Return the rows of each batch of an epoch; whole groups for documents in groups."""
        lengths, size = self.encoded["train"].lengths, self.config.batch_size
        groups = self.data["train"].groups
        if groups is None or self.rows is None:
            return epoch_batches(lengths, size, seed=seed, epoch=epoch)
        return batches_of_groups(
            groups, lengths, size, seed=seed, epoch=epoch, chosen_rows=self.rows
        )


def finetune(
    model: str,
    train: str,
    dev: str,
    out: str,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    seed_stride: int = 1,
    metric: str | None = None,
    config: FinetuneConfig | None = None,
    test: str | None = None,
    force: bool = False,
    keep_every: bool = False,
    report: Report = lambda line: None,
) -> FinetuneResult:
    """Fine-tune ``model`` (a directory or a hub id, safetensors only) once per seed; write ``out``.

    The seeds are ``first_seed``, ``first_seed + seed_stride``, … . ``out`` receives the model of
    the seed with the best dev ``metric`` (default: accuracy, or pearson), its tokenizer,
    ``metrics.json`` and ``predictions.jsonl`` (dev). It appears whole or not at all, and replaces
    only an empty directory or, with ``force``, an earlier result. With ``keep_every`` it also has
    the model of every seed, each in ``seeds/seed-K`` as an expert's folder by itself. ``test`` is
    scored per seed and selects nothing. On the CPU a seed gives the same bits again. ``report``
    gets a line for every epoch. If interrupted, finished seeds are kept beside ``out``, and the
    next call continues after them.

    Raises InputError for wrong files, models, metrics or a diverged run, and EarlierResult.
    """
    if seeds < 1:
        raise InputError(f"seeds is {seeds}; give at least 1")
    config = config or FinetuneConfig()
    if config.epochs == 0 or config.merge is not None:
        raise InputError(
            f"epochs is {config.epochs}: merge is for scoring without training, with epochs: 0 "
            "(from Python: score_model of rekindle.train.answers.score)"
        )
    check_out(Path(out), force)
    files = {"train": train, "dev": dev} | ({"test": test} if test else {})
    data = dict(zip(files, read_task(*files.values(), settings=config), strict=True))
    metric = chosen_metric(metric, data["train"])
    check_head(model, config.head, data["train"])
    for name, split in data.items():
        logger.info("%s: %s", name, split.describe())
        if name != "train":
            log_undefined_scores(files[name], split)
    out_folder = Path(out).resolve()
    planned_seeds = range(first_seed, first_seed + seed_stride * seeds, seed_stride)
    seeds_done = FinishedSeeds(out_folder, planned_seeds, metric, keep_every=keep_every)
    settings = {"metric": metric} | config.model_dump(mode="json")
    placement = place(config.precision)
    with quiet_transformers():
        identity = describe_tuning(model, files, settings, placement)
    bf16 = bf16_saves(placement.precision, placement.device.partition(":")[0])
    memory_guard = report_shortage(Path(out), seeds_done.describe_kept, less_memory(config, bf16))
    with (
        memory_guard,
        seeds_done.lock(identity),
        quiet_transformers(),
        SeedProgress(report) as progress,
    ):
        started = time.perf_counter()
        job = _prepare(model, data, metric, config)
        seconds = time.perf_counter() - started
        for seed in seeds_done.missing():
            network, result, dev_logits = _run_seed(job, seed, progress)
            seeds_done.add(result, functools.partial(_save_model, network, job, dev_logits))
            del network

        def result_of(seed_results: Sequence[SeedResult]) -> FinetuneResult:
            return FinetuneResult.of(
                model,
                files,
                data,
                metric,
                seed_results,
                config,
                job.precision,
                seconds + sum(one.seconds for one in seed_results),
                cut=job.cut_shares,
                unread=job.unread_words,
            )

        def write_result(folder: Path, place: Path, seed_results: Sequence[SeedResult]) -> None:
            result = result_of(seed_results)
            result.save(folder)
            card = expert_card(
                shown_folder(Path(out) / place),
                model,
                result.problem,
                result.label_names,
                result.mean_scores(),
            )
            (folder / CARD_FILE).write_text(card, encoding="utf-8")

        seeds_done.publish(out_folder, write_result, force)
    return result_of(seeds_done.results)


def _prepare(model: str, data: dict[str, TaskData], metric: str, config: FinetuneConfig) -> _Job:
    placement = place(config.precision)
    logger.info("fine-tuning %s on %s in %s", model, placement.device, placement.precision)
    warn_of_slow_precision(
        {"--set precision={}": config.precision}, torch.device(placement.device).type
    )
    tokenizer = padded_tokenizer(model)
    model_config = classifier_config(model, data["train"].problem)
    encoded = {
        name: encode(tokenizer, model_config, split, config.max_length)
        for name, split in data.items()
    }
    device = torch.device(placement.device)
    cut_shares = log_cut_texts(encoded, trained_split="train")
    precision, train = placement.precision, data["train"]
    rows = None
    if train.groups is not None:
        rows = trained_rows(train.groups, train.labels, config.loss == "pointwise")
        warn_large_groups(train.groups[rows], config.batch_size)
    return _Job(
        model, config, tokenizer, data, encoded, cut_shares, metric, device, precision, rows
    )


# ---- one seed ----------------------------------------------------------------------------------


def _run_seed(
    job: _Job, seed: int, progress: SeedProgress
) -> tuple[PreTrainedModel, SeedResult, np.ndarray]:
    """Load, train epoch by epoch, and score one seed. Leaves torch's generators as they were."""
    started = time.perf_counter()
    config, data, encoded = job.config, job.data, job.encoded

    def score_split(split: str) -> tuple[dict[str, float], np.ndarray]:
        logits = predict(model, encoded[split], config.batch_size)
        return scores_of(data[split], logits), logits

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _start(job).to(job.device)
        optimizer = adamw(
            model.parameters(),
            config.learning_rate,
            config.weight_decay,
            betas=config.betas,
            eps=config.eps,
        )
        max_epochs = config.epochs_of(job.train_count)
        batch_count = None
        if job.rows is not None:
            batch_count = sum(len(job.batches(seed, epoch)) for epoch in range(max_epochs))
        total, warmup = plan_steps(job.train_count, config, batch_count)
        best = BestEpoch(config.patience_of(max_epochs))
        bar = progress.add_task(f"seed {seed}", total=total)
        step, end_reason, epochs = 0, DONE, list[dict[str, object]]()
        for epoch in range(max_epochs):
            batches = job.batches(seed, epoch)[: total - step]
            loss_sum = torch.zeros((), device=job.device)
            model.train()
            for number, rows in enumerate(batches, start=1):
                for group in optimizer.param_groups:
                    factor = learning_rate_factor(step, total, warmup, config.schedule)
                    group["lr"] = config.learning_rate * factor
                inputs = collate(encoded["train"], rows, job.device)
                positions = kept_word_positions(encoded["train"], rows, inputs)
                with autocast(job.precision, job.device):
                    logits = classifier_logits(model, inputs, positions)
                loss = loss_of(logits.float(), data["train"], encoded["train"], rows, config)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                optimizer.step()
                loss_sum += loss.detach()
                step += 1
                if step % LOSS_EVERY == 0 or number == len(batches):
                    mean_loss = _finite(loss_sum.item() / number, seed, step)
                    line = f"seed {seed}  epoch {epoch + 1}/{max_epochs}  loss {mean_loss:.4f}"
                    progress.step(bar, step, line)
            scores = None
            if step == total or (epoch + 1) % config.evaluate_every == 0:
                scores, dev_logits = score_split("dev")
                best.update(job.metric, scores, dev_logits, model)
                line += f"  dev {job.shown_metric} {scores[job.metric]:.4f}"
            else:
                best.skip()
            progress.tell(line)
            epochs.append({"epoch": epoch + 1, "steps": step, "loss": mean_loss, "scores": scores})
            if step == total or best.ran_out:
                early_reason = PATIENCE if best.ran_out and step < total else MAX_STEPS
                end_reason = DONE if epoch + 1 == max_epochs else early_reason
                break
        best.restore(model)
        test_scores = score_split("test")[0] if "test" in data else None
        progress.remove_task(bar)
    result = SeedResult(
        seed,
        best.scores,
        test_scores,
        epochs,
        seconds=time.perf_counter() - started,
        kept_epoch=best.epoch,
        planned_epochs=max_epochs,
        stopped=end_reason,
        warning=_warning(job, seed, best),
    )
    return model, result, best.logits


def _warning(job: _Job, seed: int, best: BestEpoch) -> str | None:
    """Return, and log, the warning about a seed that has learned little or nothing."""
    weak = find_weakness(job.metric, best.scores[job.metric], best.logits, job.data["dev"])
    if weak is None:
        return None
    score_text = f"{job.shown_metric} {best.scores[job.metric]:.4f}"
    config, longer = job.config, f"train longer ({_longer(job, best)})"
    rate = (
        f"try another learning_rate (now {config.learning_rate:g}; often 1e-4 to 2e-4 for a small "
        "model, 2e-5 for a large one)"
    )
    is_short = plan_steps(job.train_count, config)[0] < LEAST_STEPS
    first, then = (longer, rate) if is_short else (rate, longer)
    line = (
        f"warning: seed {seed}: {score_text} on dev {weak}. First {first}, then {then}; or check "
        "that the labels fit the texts"
    )
    logger.warning(line)
    return line


def _longer(job: _Job, best: BestEpoch) -> str:
    """Return the settings for a longer training of a seed, as they are typed."""
    config, rows = job.config, job.train_count
    without_limit = config.model_copy(update={"max_steps": None})
    settings = ["patience=null"] if best.ran_out else []
    if plan_steps(rows, config) == plan_steps(rows, without_limit):
        automatic = config.model_copy(update={"epochs": "auto"})
        epochs = max(2 * config.epochs_of(rows), automatic.epochs_of(rows))
        settings = [f"epochs={epochs}", "patience=null"]
    settings += ["max_steps=null"] if config.max_steps else []
    return " ".join(f"--set {one}" for one in settings)


def _start(job: _Job) -> PreTrainedModel:
    """Return the model that training begins with: a fresh head, or a student's distilled one."""
    if job.config.head is not None:
        return distilled_model(job.model, job.config.head, job.data["train"])
    network = load_classifier(job.model, job.tokenizer, job.data["train"])
    if padding_influence(network):
        logger.info(
            "%s lets padding change its outputs: trained in padded batches, it is scored on "
            "texts of one length together",
            type(network).__name__,
        )
    return network


def _finite(loss: float, seed: int, step: int) -> float:
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at step {step} of seed {seed}: training diverged; lower the "
            "learning_rate or lengthen the warmup"
        )
    return loss


# ---- output ------------------------------------------------------------------------------------


def _save_model(network: PreTrainedModel, job: _Job, logits: np.ndarray, staging: Path) -> None:
    """Write the model, the tokenizer and the dev predictions over those of an earlier seed."""
    network.save_pretrained(staging)
    backend = job.tokenizer.backend_tokenizer
    backend.no_truncation()  # otherwise this run's truncation would be saved with the tokenizer
    backend.no_padding()
    job.tokenizer.save_pretrained(staging)
    train = job.data["train"]
    names = train.label_names or tuple(f"LABEL_{i}" for i in range(logits.shape[1]))
    answers_of = Answers(train.head_problem, names, train.threshold)
    with (staging / PREDICTIONS_FILE).open("wb") as file:
        write_predictions(file, job.data["dev"], answers_of, logits)
