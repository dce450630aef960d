"""A few fixed sequences (probes) whose answers identify a server's model."""

from collections.abc import Iterator, Sequence
from typing import Any

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError
from rekindle.data.storage.columns import split_lists
from rekindle.data.targets.served import Probe
from rekindle.pipeline.served.answers import said_of
from rekindle.pipeline.served.server import Server

SEQUENCES, LENGTH, KEPT = 3, 12, 4
DIGITS = 5  # of log-probabilities: float32 has no more below 10 nats
DIFFERING = 0.1  # share of the tokens spelt by the server; more means another vocabulary
SHOWN = 3

Said = list[list[dict[int, float]]]  # by probe and prediction, log-probabilities by id


def probe_prompts(corpus: Corpus) -> list[list[int]]:
    """Return the beginnings of some sequences of the corpus's first file."""
    rows = split_lists([*corpus.shard(0).batches()], "input_ids") if corpus.commits else []
    long = [row[:LENGTH].tolist() for row in rows if len(row) > 1]
    step = max(1, len(long) // SEQUENCES)
    return long[::step][:SEQUENCES] or [[0, 0]]


def ask(server: Server, prompts: Sequence[Sequence[int]], k: int) -> tuple[Said, list[Any]]:
    """Return the server's parsed answers for ``prompts``, and the raw ones. Raise InputError for
    wrong answers.
    """
    found = server.prompt_logprobs(prompts, k)
    said = [said_of(entries, prompt, k) for entries, prompt in zip(found, prompts, strict=True)]
    return said, found


def probes_of(prompts: Sequence[Sequence[int]], said: Said, k: int) -> tuple[Probe, ...]:
    """Return what is stored of the answers: the likeliest ids of each prediction, and the
    sequence's own.
    """
    return tuple(
        _probe(prompt, answers, min(k, KEPT)) for prompt, answers in zip(prompts, said, strict=True)
    )


def _probe(prompt: Sequence[int], answers: list[dict[int, float]], kept: int) -> Probe:
    ids, values = [], []
    for own, answer in zip(prompt[1:], answers, strict=True):
        best = sorted(answer, key=lambda number: (-answer[number], number))[:kept]
        best += [] if own in best else [own]
        ids.append(tuple(best))
        values.append(tuple(round(answer[number], DIGITS) for number in best))
    return Probe(input_ids=tuple(prompt), ids=tuple(ids), log_probs=tuple(values))


def check_spelling(found: Sequence[Any], tokenizer: Tokenizer) -> None:
    """Raise InputError if the server's ``decoded_token``s are not the tokenizer's.

    Ignores spaces at the ends and parts of characters, because versions differ in these.
    """
    spelt = {number: text for number, text in _spelt(found) if number < tokenizer.size}
    wrong = {}
    for number, text in sorted(spelt.items()):
        ours = str(tokenizer.hf.decode([number]))
        if "\ufffd" not in text + ours and text.strip() != ours.strip():
            raw = tokenizer.hf.convert_ids_to_tokens(number)
            if text.strip() != str(raw).strip():
                wrong[number] = (ours, text)
    if len(wrong) > DIFFERING * len(spelt):
        shown = "; ".join(
            f"id {number} is {ours!r} here, {theirs!r} there"
            for number, (ours, theirs) in [*wrong.items()][:SHOWN]
        )
        raise InputError(
            f"the served model has another tokenizer than the corpus: {shown} ({len(wrong)} of "
            f"{len(spelt)} tokens differ). Take corpus.tokenizer from the served model"
        )


def _spelt(found: Sequence[Any]) -> Iterator[tuple[int, str]]:
    for entries in found:
        for entry in entries[1:]:
            for key, value in entry.items():
                if isinstance(text := value.get("decoded_token"), str):
                    yield int(key), text
