"""Has a causal language model write on from prompts: rows of tokens for a corpus, of which what the
model said is trained (on-policy distillation, offline).

Draws are of the model's own distribution, at a temperature, whatever its generation config says
beside the end-of-text tokens. What a batch draws depends on the seed and on what is in the batch.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from rekindle.data.corpus.encoder import special_tokens
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.forms.dialogue import Dialogues
from rekindle.data.forms.template import find_template
from rekindle.data.padding import length_buckets
from rekindle.data.source.generated import BESIDE
from rekindle.data.source.given import Dialogue
from rekindle.data.source.record import Bad
from rekindle.data.source.rows import Row, read_rows, text_of
from rekindle.data.source.sources import HUB, recorded_origin
from rekindle.data.storage.atomic import Publish, write_json, write_lines
from rekindle.data.text_files import STDIN
from rekindle.train.answers.config import GenerateConfig
from rekindle.train.answers.perplexity import open_language_model
from rekindle.train.answers.target import check_target
from rekindle.train.answers.watch import NOBODY, Watch
from rekindle.train.model.causes import running
from rekindle.train.model.files import load_config, longest_input, weights_fingerprint
from rekindle.train.model.fitting import task_said
from rekindle.train.model.folder import resolve_model
from rekindle.train.model.network import StudentNetwork
from rekindle.train.model.sight import moved_by_padding
from rekindle.train.record.lineage import lineage_of_model
from rekindle.train.running_out import running_out
from rekindle.train.student import ABOUT_FILE

Ids = NDArray[np.int64]
_OWN = ("input_ids", "loss_mask", "labels", "response", "messages", "tools")  # not of the prompt's


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What was written."""

    model: str
    prompts: str
    out: str
    rows: int
    tokens: int  # that the model said
    ended: int  # answers that it ended itself
    too_long: int  # prompts that leave no room for an answer
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values for JSON."""
        return asdict(self)

    def told(self) -> str:
        """What was written, in lines."""
        lines = [
            f"{self.out}: {counted(self.rows, 'row')}, {counted(self.tokens, 'token')} generated; "
            f"{self.ended:,} ended by the model, the others at max_new_tokens",
            f"beside it {Path(self.out).name}{BESIDE} says which model it was. Name it in "
            "corpus.source: {path: " + self.out + ", format: tokens}",
        ]
        if self.too_long:
            told = counted(self.too_long, "prompt")
            lines.append(f"left out, with no room for max_new_tokens: {told}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Prompt:
    """A prompt: what its rows have beside the tokens, and its tokens."""

    about: dict[str, object]
    ids: Ids


def generate_file(
    model: str,
    prompts: str,
    out: str,
    *,
    config: GenerateConfig | None = None,
    force: bool = False,
    watch: Watch = NOBODY,
) -> Generated:
    """Write a row of tokens (jsonl) for every answer to the ``prompts``, in their order.

    Rows with ``messages`` go through the chat template, up to where the assistant is to speak; an
    answer that they end with is left away. Others have a text to go on from. ``id`` and all plain
    values of a row are kept, so that a domain is one of its rows. The file is there whole, beside
    what tells of it, or not at all. Raises InputError for a model that is no causal LM, for rows
    without a prompt, and for an ``out`` that is there, unless it was generated and ``force`` is
    given.
    """
    started, config = time.perf_counter(), config or GenerateConfig()
    if out == STDIN:
        raise InputError("what is generated is written into a file: give one with --out")
    check_target(out, prompts, model, force)
    _check_causal(model)
    rows = [*islice(read_rows(prompts), config.limit)]
    if not rows:
        raise InputError(f"{prompts} has no rows; give at least one prompt")
    network, tokenizer = open_language_model(model, prompts, config.precision)
    if network.task != "causal_lm":
        raise _cannot(model, network.task)
    if network.prompts is not None:
        raise InputError(f"{model!r} has prompts of its own for domains; it cannot generate")
    found = _prompts(rows, prompts, tokenizer, model, config)
    room = (longest_input(network.model.config) or 1 << 40) - config.max_new_tokens
    fitting = [one for one in found if len(one.ids) <= room]
    if not fitting:
        raise InputError(
            f"no prompt of {prompts} leaves room for max_new_tokens {config.max_new_tokens}: the "
            f"model takes {longest_input(network.model.config)} tokens. Ask for fewer"
        )
    watch.expect(len(fitting))
    work = _Work(network, tokenizer, config)
    half = max(1, config.batch_tokens // 2)
    advice = f"Lower batch_tokens: `--set batch_tokens={half}`"
    directory = resolve_model(model)
    about = {
        "model": model,
        "weights": weights_fingerprint(directory),
        "tokenizer": tokenizer.digest,
        "prompts": prompts,
        "settings": config.model_dump(mode="json"),
        "lineage": [run.model_dump(mode="json") for run in lineage_of_model(directory)],
    }
    with running_out(Path(out), lambda: "Nothing is written", advice), torch.inference_mode():
        answers = work.answers(fitting, watch)
        write_lines(Path(out), work.rows(fitting, answers), _with(about))
    return Generated(
        model=model,
        prompts=prompts,
        out=out,
        rows=sum(map(len, answers)),
        tokens=sum(len(ids) for each in answers for ids in each),
        ended=work.ended,
        too_long=len(found) - len(fitting),
        seconds=time.perf_counter() - started,
    )


def _with(about: Mapping[str, object]) -> Publish:
    """Gives rows their name together with what tells of them: never alone, nor beside what tells of
    others, wherever that ends.
    """

    def publish(rows: Path, out: Path) -> None:
        def both(told: Path, beside: Path) -> None:
            out.unlink(missing_ok=True)
            os.replace(told, beside)
            os.replace(rows, out)

        write_json(Path(f"{out}{BESIDE}"), about, both)

    return publish


def _check_causal(model: str) -> None:
    directory = resolve_model(model)
    said = None
    if not (directory / ABOUT_FILE).is_file():
        said = task_said(load_config(directory))
    if said not in (None, "causal_lm"):
        raise _cannot(model, str(said))


def _cannot(model: str, task: str) -> InputError:
    return InputError(f"{model!r} is a {task}: only a causal language model can generate")


def _prompts(
    rows: Sequence[Row], path: str, tokenizer: Tokenizer, model: str, config: GenerateConfig
) -> list[Prompt]:
    """The prompts of the rows; InputError, naming the row, for one that has none."""
    texts: list[tuple[int, str]] = []
    dialogues: list[tuple[int, str, Dialogue]] = []
    reads = None
    columns = recorded_origin(path).format in ("parquet", "arrow", HUB)
    for number, row in enumerate(rows):
        if row.get("messages") is None:
            field = config.prompt_field if config.prompt_field in row else "text"
            texts.append((number, text_of(row, number + 1, field, path)))
            continue
        if reads is None:
            template = find_template(tokenizer.hf, model, config.chat_template)
            names = [one.content for one in special_tokens(tokenizer.encoder.backend).values()]
            reads = Dialogues(template, names, as_tokens=False)
        made = reads.prompt(row, columns, f"{path}, row {number + 1}")
        if isinstance(made, Bad):
            raise InputError(made.message)
        dialogues.append((number, *made))
    ids: dict[int, Ids] = {}
    encoded = tokenizer.encode([text for _, text in texts])
    for (number, _), one in zip(texts, encoded, strict=True):
        whole = np.concatenate([tokenizer.prefix, one.ids]).astype(np.int64)
        ids[number] = whole[: config.prompt_tokens]
    if dialogues:
        written = [one.written for _, _, one in dialogues]
        encoder = tokenizer.encoder.for_dialogues()
        several = encoder.texts([text for _, text, _ in dialogues], written)[0].each()
        for (number, _, _), one in zip(dialogues, several, strict=True):
            ids[number] = one.ids.astype(np.int64)
    empty = next((number for number in range(len(rows)) if not len(ids[number])), None)
    if empty is not None:
        raise InputError(f"{path}, row {empty + 1}: the prompt has no token; give it a text")
    name = recorded_origin(path).name
    return [Prompt(_about(row, f"{name}:{n + 1}"), ids[n]) for n, row in enumerate(rows)]


def _about(row: Row, identity: str) -> dict[str, object]:
    """What an answer's row keeps: its plain values, and an id."""
    found: dict[str, object] = {"id": identity}
    for name, value in row.items():
        if isinstance(value, str | int | float) and name not in _OWN:
            found[name] = value
    return found


class _Work:
    """The model, and how it is asked."""

    def __init__(self, network: StudentNetwork, tokenizer: Tokenizer, config: GenerateConfig):
        from transformers import GenerationConfig

        self.network, self.tokenizer, self.config = network, tokenizer, config
        self.ends = _ends(network, tokenizer)
        # transformers takes what is not asked for from the model's own: none of that is meant.
        network.model.generation_config = GenerationConfig()
        self.ended = 0

    def answers(self, prompts: Sequence[Prompt], watch: Watch) -> list[list[Ids]]:
        """The answers to each prompt."""
        lengths = np.array([len(one.ids) for one in prompts]) + self.config.max_new_tokens
        budget = max(1, self.config.batch_tokens // self.config.samples)
        equal = moved_by_padding(self.network.model) > 0
        found: list[list[Ids]] = [[] for _ in prompts]
        for rows in length_buckets(lengths, budget, equal):
            made = self._batch([prompts[row].ids for row in rows], int(rows.min()))
            for row, each in zip(rows.tolist(), made, strict=True):
                found[row] = each
            watch.advance(len(rows))
        return found

    def _batch(self, prompts: Sequence[Ids], first: int) -> list[list[Ids]]:
        """The answers to some prompts, padded before their beginning."""
        from transformers import GenerationConfig

        config, samples = self.config, self.config.samples
        device = next(self.network.parameters()).device
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), self.tokenizer.pad_id, np.int64)
        mask = np.zeros_like(ids)
        for row, one in enumerate(prompts):
            ids[row, width - len(one) :], mask[row, width - len(one) :] = one, 1
        drawn: dict[str, Any] = {"do_sample": config.temperature > 0}
        if config.temperature > 0:
            drawn |= {"temperature": config.temperature, "top_p": config.top_p}
            drawn |= {"top_k": config.top_k or 0}
        asked = GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            num_return_sequences=samples,
            pad_token_id=self.tokenizer.pad_id,
            eos_token_id=self.ends or None,
            **drawn,
        )
        torch.manual_seed(xxhash.xxh3_64_intdigest(f"generate {config.seed} {first}".encode()) >> 1)
        with running(str(self.network.model.name_or_path)):
            told = self.network.model.generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                generation_config=asked,
            )
        said = told[:, width:].cpu().numpy()
        each = [self._until_end(row) for row in said]
        return [each[at : at + samples] for at in range(0, len(each), samples)]

    def _until_end(self, said: Ids) -> Ids:
        """What was said, to the end-of-text token, which is part of it."""
        ends = np.flatnonzero(np.isin(said, self.ends))
        self.ended += bool(len(ends))
        return said[: int(ends[0]) + 1] if len(ends) else said

    def rows(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Ids]]
    ) -> Iterator[dict[str, object]]:
        """The rows that are written."""
        for prompt, each in zip(prompts, answers, strict=True):
            for number, said in enumerate(each):
                identity = f"{prompt.about['id']}" + f"#{number}" * (len(each) > 1)
                mask = [0] * len(prompt.ids) + [1] * len(said)
                yield prompt.about | {
                    "id": identity,
                    "input_ids": [*prompt.ids.tolist(), *said.tolist()],
                    "loss_mask": mask,
                    "response": self.tokenizer.hf.decode(said.tolist(), skip_special_tokens=True),
                }


def _ends(network: StudentNetwork, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text, as the model and the tokenizer have them."""
    model = network.model
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    if any(type(one) not in (int, NoneType) for one in several):
        raise InputError(
            f"{model.name_or_path}/generation_config.json: eos_token_id is {own!r}; it is the id "
            "of a token, or a list of ids"
        )
    return sorted({one for one in (*several, tokenizer.eos_id) if one is not None})
