"""A few fixed sequences (probes) whose answers identify a server's model."""

from collections.abc import Iterator, Sequence
from typing import Any

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError
from rekindle.data.storage.columns import split_lists
from rekindle.data.targets.served import Probe
from rekindle.pipeline.served.answers import parse_answers
from rekindle.pipeline.served.server import Server

SEQUENCES, LENGTH, KEPT = 3, 12, 4
DIGITS = 5  # of log-probabilities: float32 has no more below 10 nats
MAX_DIFFERING = 0.1  # share of the tokens spelt by the server; more means another vocabulary
MAX_SHOWN = 3

ProbeAnswers = list[list[dict[int, float]]]  # by probe and prediction, log-probabilities by id


def probe_prompts(corpus: Corpus) -> list[list[int]]:
    """Return the beginnings of some sequences of the corpus's first file."""
    rows = split_lists([*corpus.shard(0).batches()], "input_ids") if corpus.commits else []
    beginnings = [row[:LENGTH].tolist() for row in rows if len(row) > 1]
    step = max(1, len(beginnings) // SEQUENCES)
    return beginnings[::step][:SEQUENCES] or [[0, 0]]


def ask_probes(
    server: Server, prompts: Sequence[Sequence[int]], k: int
) -> tuple[ProbeAnswers, list[Any]]:
    """Return the server's parsed answers for ``prompts``, and the raw ones. Raise InputError for
    wrong answers.
    """
    raw_answers = server.prompt_logprobs(prompts, k)
    answers = [
        parse_answers(entries, prompt, k)
        for entries, prompt in zip(raw_answers, prompts, strict=True)
    ]
    return answers, raw_answers


def probes_of(
    prompts: Sequence[Sequence[int]], all_answers: ProbeAnswers, k: int
) -> tuple[Probe, ...]:
    """Return what is stored of the answers: the likeliest ids of each prediction, and the
    sequence's own.
    """
    return tuple(
        _probe(prompt, answers, min(k, KEPT))
        for prompt, answers in zip(prompts, all_answers, strict=True)
    )


def _probe(prompt: Sequence[int], answers: list[dict[int, float]], count: int) -> Probe:
    ids, values = [], []
    for true_id, answer in zip(prompt[1:], answers, strict=True):
        likeliest = sorted(answer, key=lambda number: (-answer[number], number))[:count]
        likeliest += [] if true_id in likeliest else [true_id]
        ids.append(tuple(likeliest))
        values.append(tuple(round(answer[number], DIGITS) for number in likeliest))
    return Probe(input_ids=tuple(prompt), ids=tuple(ids), log_probs=tuple(values))


def check_spelling(raw_answers: Sequence[Any], tokenizer: Tokenizer) -> None:
    """Raise InputError if the server's ``decoded_token``s are not the tokenizer's.

    Ignores spaces at the ends and parts of characters, because versions differ in these.
    """
    spellings = {
        number: served_text
        for number, served_text in _spellings(raw_answers)
        if number < tokenizer.size
    }
    differing = {}
    for number, served_text in sorted(spellings.items()):
        corpus_text = str(tokenizer.hf.decode([number]))
        if "\ufffd" not in served_text + corpus_text and served_text.strip() != corpus_text.strip():
            raw = tokenizer.hf.convert_ids_to_tokens(number)
            if served_text.strip() != str(raw).strip():
                differing[number] = (corpus_text, served_text)
    if len(differing) > MAX_DIFFERING * len(spellings):
        shown = "; ".join(
            f"id {number} is {corpus_text!r} here, {served_text!r} there"
            for number, (corpus_text, served_text) in [*differing.items()][:MAX_SHOWN]
        )
        raise InputError(
            f"the served model has another tokenizer than the corpus: {shown} ({len(differing)} of "
            f"{len(spellings)} tokens differ). Take corpus.tokenizer from the served model"
        )


def _spellings(raw_answers: Sequence[Any]) -> Iterator[tuple[int, str]]:
    for entries in raw_answers:
        for entry in entries[1:]:
            for key, value in entry.items():
                if isinstance(text := value.get("decoded_token"), str):
                    yield int(key), text
