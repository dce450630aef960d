"""Measure how likely a language model finds plain text: perplexity or pseudo-perplexity.

Causal: exp(−1/N Σ log p(x_t | x_<t)) over every token of every text but its first (special tokens
around a text count). A text longer than the window is read in windows that advance by ``stride``;
each token is predicted once, in the first window that contains it. Masked: pseudo-perplexity
(Salazar et al., Masked Language Model Scoring, ACL 2020), exp(−1/N Σ log p(x_t | x_<t, x_>t)): each
token but special ones is masked alone, within its text or window.

Bits per byte of causal models are over the bytes of the predicted text. Both are means over tokens,
whichever text they are in, with probabilities over the tokenizer's ids only.
"""

import logging
import math
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from rekindle.data.corpus.encoded import Encoded
from rekindle.data.corpus.tokenizer import Tokenizer, load_tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.padding import length_buckets, pad
from rekindle.data.source.documents import Document, read_documents
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.sources import recorded_origin
from rekindle.train.answers.config import PerplexityConfig
from rekindle.train.answers.watch import NOBODY, Watch
from rekindle.train.answers.windows import (
    Ids,
    Piece,
    Window,
    causal_windows,
    draw_places,
    masked_pieces,
    masked_windows,
)
from rekindle.train.device_batch import model_inputs, send
from rekindle.train.model.causes import explaining_run_errors
from rekindle.train.model.files import load_config, load_model, longest_input, place
from rekindle.train.model.fitting import AUTO_CLASSES, check_fits, recorded_task
from rekindle.train.model.folder import resolve_model, tokenizer_folder
from rekindle.train.model.network import StudentNetwork
from rekindle.train.model.sight import padding_influence
from rekindle.train.outside.quiet import quiet_transformers
from rekindle.train.precision import warn_of_slow_precision
from rekindle.train.running_out import report_shortage
from rekindle.train.student import ABOUT_FILE, Student

DEFAULT_MAX_LENGTH = 1024  # tokens that a model sees at a time, unless a length is given
SORTED_BATCHES = 16  # batches whose windows are sorted by length together
TEXTS_AT_A_TIME = 64  # texts that are tokenised together
LOGIT_ROWS = 256  # rows whose logits are held at a time
_LARGEST_CE = 700.0  # larger ones have no finite exponential

log = logging.getLogger("rekindle")


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How likely a model finds a text, and the rule it was measured by."""

    model: str
    text: str
    task: str  # masked_lm | causal_lm
    measure: str  # perplexity | pseudo-perplexity
    perplexity: float
    ce: float  # log of the perplexity, nats per token
    standard_error: float  # of ce
    tokens: int  # predicted tokens
    tokens_in_all: int
    texts: int
    bits_per_byte: float | None  # for causal models: over the text of the predicted tokens
    rule: str
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Return the measure in lines, with its 95 % interval."""
        low, high = (_exp(self.ce + side * 1.96 * self.standard_error) for side in (-1, 1))
        of_all = "" if self.tokens >= self.tokens_in_all else f" of {self.tokens_in_all:,}"
        texts = counted(self.texts, "text")
        if recorded_origin(self.text).format == "txt":
            texts += " between blank lines"
        lines = [
            f"{self.measure} on {self.text}: {self.perplexity:.4f} per token of its tokenizer "
            f"(95 %: {low:.4g} to {high:.4g}; {self.tokens:,}{of_all} tokens of {texts})",
            f"ce: {self.ce:.4f} nats per token",
        ]
        if self.bits_per_byte is not None:
            lines.append(f"bits per byte: {self.bits_per_byte:.4f}")
        return "\n".join(lines)


def text_perplexity(
    model: str,
    text: str,
    *,
    text_field: str = "text",
    config: PerplexityConfig | None = None,
    watch: Watch = NOBODY,
) -> Perplexity:
    """Measure a language model, or a student as one, on plain text that is read like a corpus.

    Raises InputError for a model without output over the vocabulary, and for bad text.
    """
    started, config = time.perf_counter(), config or PerplexityConfig()
    texts = _Texts(text, text_field)
    network, tokenizer = open_language_model(model, text, config.precision)
    plan = _WindowPlan.of(network, tokenizer, config)
    log.info("%s", plan.rule)
    losses, inference = _Losses(), torch.inference_mode()
    advice = f"Lower batch_tokens: `--set batch_tokens={max(1, config.batch_tokens // 2)}`"
    with report_shortage(Path(text), lambda: "Nothing is written", advice), inference:
        total, windows = plan.windows(texts.encoded(tokenizer))
        watch.expect(total)
        for batch_losses in _run(network, windows, tokenizer.pad_id, config.batch_tokens):
            losses.add(batch_losses)
            watch.advance(len(batch_losses))
    ce = losses.mean(model, text)
    bits, causal = losses.total / math.log(2), network.task == "causal_lm"
    return Perplexity(
        model=model,
        text=text,
        task=network.task,
        measure="perplexity" if causal else "pseudo-perplexity",
        perplexity=_exp(ce),
        ce=ce,
        standard_error=losses.standard_error,
        tokens=losses.count,
        tokens_in_all=texts.tokens,
        texts=texts.count,
        bits_per_byte=bits / texts.bytes if causal and texts.bytes else None,
        rule=plan.rule,
        seconds=time.perf_counter() - started,
    )


def _exp(ce: float) -> float:
    return math.exp(ce) if ce < _LARGEST_CE else math.inf


# ---- the model ----------------------------------------------------------------------------------


def open_language_model(model: str, text: str, precision: str) -> tuple[StudentNetwork, Tokenizer]:
    """Load a language model or student onto its device, and its tokenizer, for ``text``.

    Raises InputError for an expert, for a body without output over the vocabulary, and for a
    tokenizer with more ids than the model.
    """
    directory, placement = resolve_model(model), place(precision)
    tokenizer = load_tokenizer(str(tokenizer_folder(directory)))
    warn_of_slow_precision({"--set precision={}": precision}, placement.device.partition(":")[0])
    with quiet_transformers():
        if (directory / ABOUT_FILE).is_file():
            network: StudentNetwork = Student.from_pretrained(directory)
            for weights in network.parameters():  # as transformers loads: without the buffers
                weights.data = weights.data.to(placement.dtype)
        else:
            config, task = load_config(directory), _language_task(model, directory, text)
            check_fits(config, task, repr(model))
            rows = config.get_text_config().vocab_size
            if tokenizer.size > rows:
                raise InputError(
                    f"{model!r} has a vocabulary of {rows:,}, but its tokenizer has ids up to "
                    f"{tokenizer.size - 1:,}: it belongs to another model"
                )
            loaded = load_model(directory, AUTO_CLASSES[task], placement.dtype)
            network = StudentNetwork(loaded, task, vocabulary_size=tokenizer.size)
    if network.task == "masked_lm" and tokenizer.mask_id is None:
        raise InputError(
            f"the tokenizer of {model!r} has no mask token, which scoring with a masked LM needs"
        )
    return network.to(placement.device).eval(), tokenizer


def _language_task(model: str, directory: Path, text: str) -> Literal["masked_lm", "causal_lm"]:
    config = load_config(directory)
    task, saved_as = recorded_task(config), (config.architectures or ["nothing that it says"])[0]
    if task == "masked_lm":
        return "masked_lm"
    if task == "causal_lm":
        return "causal_lm"
    if task is not None:
        predict_command = ["pipeline", "predict", model, "--text", text]
        evaluate_command = ["pipeline", "evaluate", model, "--test", "FILE"]
        raise InputError(
            f"{model!r} is an expert ({saved_as}): it has no output over the vocabulary, so no "
            f"perplexity. For its predictions on texts: `{shlex.join(predict_command)} --out "
            f"predictions.jsonl`; for its scores on labelled rows: `{shlex.join(evaluate_command)}`"
        )
    raise InputError(
        f"{model!r} was saved as {saved_as}, which has no output over the vocabulary, so no "
        "perplexity; give the language model itself, saved as …ForMaskedLM or …ForCausalLM"
    )


# ---- what it is shown ---------------------------------------------------------------------------


class _Texts:
    """The texts of a file, counted as they are read."""

    def __init__(self, source: str, field: str):
        self.source, self.left_out = source, LeftOut()
        documents = read_documents([source], field, left_out=self.left_out)
        first = next(documents, None)  # reports a wrong field before a model is loaded
        self._check()
        self._documents = chain([first] if first else [], documents)
        self.count = self.tokens = 0
        self.bytes = 0.0  # of the tokens that a causal model predicts

    def encoded(self, tokenizer: Tokenizer) -> Iterator[Ids]:
        """Yield each text's tokens without special ones; raise InputError for a record without a
        text.
        """
        for document, encoding in self._tokenised(tokenizer):
            self.count += 1
            self.bytes += len(document.text.encode())
            if not tokenizer.prefix:  # then a causal model does not predict the first token
                self.bytes -= _bytes_of_first(document.text, encoding)
            self.tokens += len(encoding.ids)
            yield encoding.ids

    def _tokenised(self, tokenizer: Tokenizer) -> Iterator[tuple[Document, Encoded]]:
        documents = self._read()
        while block := [*islice(documents, TEXTS_AT_A_TIME)]:
            yield from zip(block, tokenizer.encode([one.text for one in block]), strict=True)

    def _read(self) -> Iterator[Document]:
        for document in self._documents:
            self._check()
            yield document
        self._check()

    def _check(self) -> None:
        if self.left_out.first:
            problem = self.left_out.first.replace("corpus.text_field", "--text-field")
            raise InputError(f"{problem}; repair or remove it")


def _bytes_of_first(text: str, encoding: Encoded) -> float:
    """Return the bytes of a text up to the end of its first token; if several tokens share a
    character, an equal part of it.
    """
    if not len(encoding.ids):
        return len(text.encode())
    start, end = int(encoding.starts[0]), int(encoding.ends[0])
    sharing = int(((encoding.starts == start) & (encoding.ends == end)).sum())
    return len(text[:start].encode()) + len(text[start:end].encode()) / sharing


@dataclass(frozen=True)
class _WindowPlan:
    """What the model sees of a text at a time, and what it predicts there."""

    tokenizer: Tokenizer
    causal: bool
    window: int
    stride: int
    masked: int | None  # number of masked tokens; None: all
    seed: int

    @classmethod
    def of(cls, network: StudentNetwork, tokenizer: Tokenizer, config: PerplexityConfig) -> Self:
        longest = (longest_input(network.model.config) or math.inf) - (network.prompts is not None)
        limits = (config.max_length or DEFAULT_MAX_LENGTH, longest, tokenizer.hf.model_max_length)
        window = int(min(limits))
        special_count = len(tokenizer.prefix) + len(tokenizer.suffix)
        if window <= special_count + 1:
            raise InputError(f"max_length {window} leaves no room for a text: give more tokens")
        stride = config.stride or max(1, window // 2)
        if stride >= window:
            raise InputError(
                f"stride {stride} is not less than the window of {window} tokens: the first "
                "predictions in a window would have no context; give a smaller one"
            )
        masked = None if config.tokens == "all" else config.tokens
        return cls(tokenizer, network.task == "causal_lm", window, stride, masked, config.seed)

    @property
    def rule(self) -> str:
        """Return what is measured, in one line."""
        if self.causal:
            predicted = "every token" if self.tokenizer.prefix else "every token but the first"
            return (
                f"perplexity: {predicted} of each text is predicted from those before it; texts of "
                f"more than {self.window:,} tokens in windows that advance by {self.stride:,}"
            )
        tokens_text = "every token"
        if self.masked is not None:
            tokens_text = (
                f"at most {self.masked:,} tokens, drawn uniformly with seed {self.seed} "
                "(every one: --set tokens=all), each"
            )
        return (
            f"pseudo-perplexity: {tokens_text} masked alone, in a pass of its own, within its text "
            f"or {self.window:,} tokens of it"
        )

    def windows(self, texts: Iterator[Ids]) -> tuple[int | None, Iterator[Window]]:
        """Return how many tokens are predicted, if that is known, and the windows."""
        prefix, suffix = self.tokenizer.prefix, self.tokenizer.suffix
        if self.causal:
            sequences = (np.concatenate([prefix, ids, suffix]).astype(np.int32) for ids in texts)
            windows = (causal_windows(ids, self.window, self.stride) for ids in sequences)
            return None, chain.from_iterable(windows)
        pieces: Iterable[Piece] = masked_pieces(texts, prefix, suffix, self.window)
        total = None
        if self.masked is not None:
            pieces = draw_places(pieces, self.masked, self.seed)
            total = sum(len(places) for _, places in pieces)
        return total, masked_windows(pieces, int(self.tokenizer.mask_id or 0))


# ---- what it says -------------------------------------------------------------------------------


def _run(
    network: StudentNetwork, windows: Iterator[Window], padding: int, batch_tokens: int
) -> Iterator[NDArray[np.float64]]:
    """Yield −log p of the predicted tokens, by batches of windows of similar length."""
    equal = padding_influence(network.model) > 0
    while block := _block(windows, SORTED_BATCHES * batch_tokens):
        lengths = np.array([len(one.ids) for one in block])
        for rows in length_buckets(lengths, batch_tokens, equal):
            yield _batch_losses(network, [block[row] for row in rows], padding)


def _block(windows: Iterator[Window], tokens: int) -> list[Window]:
    block: list[Window] = []
    for one in windows:
        block.append(one)
        tokens -= len(one.ids)
        if tokens <= 0:
            break
    return block


def _batch_losses(
    network: StudentNetwork, batch: list[Window], padding: int
) -> NDArray[np.float64]:
    device = next(network.parameters()).device
    lengths = np.array([len(one.ids) for one in batch])
    ids = pad([one.ids for one in batch], lengths, padding)
    places = np.concatenate([row * ids.shape[1] + one.places for row, one in enumerate(batch)])
    labels = send(np.concatenate([one.labels for one in batch]), device)
    with explaining_run_errors(str(network.model.name_or_path)):
        inputs = model_inputs(ids, lengths, device)
        hidden = network(inputs, send(places, device)).hidden
    head = network.output_head
    parts = [
        functional.cross_entropy(head.logits(states), targets, reduction="none")
        for states, targets in zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(parts).double().cpu().numpy()


class _Losses:
    """Running sums for the means."""

    def __init__(self) -> None:
        self.count, self.total, self._squares = 0, 0.0, 0.0

    def add(self, losses: NDArray[np.float64]) -> None:
        """Add the losses of a batch."""
        self.count += len(losses)
        self.total += float(losses.sum())
        self._squares += float(np.square(losses).sum())

    def mean(self, model: str, text: str) -> float:
        """Return nats per token; raise InputError if no token was predicted, or the loss is not
        finite.
        """
        if not self.count:
            raise InputError(
                f"{text}: there is no token to predict; give texts of two or more tokens"
            )
        if not math.isfinite(self.total):
            raise InputError(f"{model!r} gives logits that are not finite: its weights may be NaN")
        return self.total / self.count

    @property
    def standard_error(self) -> float:
        """Return the standard error of the mean, as if tokens were independent."""
        mean = self.total / self.count
        return math.sqrt(max(self._squares / self.count - mean**2, 0.0) / self.count)
