"""What a language model sees of its input, found by trying: later tokens, earlier ones, padding,
other documents in its row.

The configuration is not trusted: flags differ from family to family, and a checkpoint may have been
trained in another way than its class was written for. Knows nothing of teachers, students or
caches.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rekindle.data.corpus.columns import DOCUMENTS
from rekindle.data.errors import InputError, first_words
from rekindle.train.model.files import longest_input
from rekindle.train.model.padding import padding_of, set_padding
from rekindle.train.packed.forms import Form, as_read, possible_forms

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Errors of models that cannot be run in the way tried.
BROKEN = (AttributeError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
LENGTHS = (2, 7, 19)  # short ones, where a token weighs much; odd ones, past a block of 16
PADDING = 5  # tokens that the mask hides
# Movement is the change of a position's values as a share of their spread about the mean. Rounding
# alone stays below ROUNDING: another token's influence is thousands of times as much. Kernels of
# another shape round differently, so the limit for padding is larger.
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-4}
COARSEST = 4e-3  # in bfloat16, and in coarser types
OF_SHAPES = 10.0
OF_ANSWERS = 100.0  # a logit may be a small difference of large ones
SAME_ROUNDING = 3.0
# "Nothing is seen" needs movements far below rounding; untrained weights move little.
NOTHING = 1e-2


class SightError(InputError):
    """A language model sees what it must not see, or does not see what it must."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without dropout and gradients; restore the model's mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def check_sight(model: "PreTrainedModel", causal: bool) -> None:
    """Raise SightError if a causal LM sees later tokens, or a masked LM only one side.

    Runs a few tiny forward passes: two equal rows and one in which a single token differs.
    """
    name, limit = type(model).__name__, _rounding(model)
    with evaluating(model):
        lengths = _lengths(model.config)
        later = max(_influence(model, length, of=length - 1) for length in lengths)
        if causal:
            if later > limit:
                raise SightError(
                    f"{name} is not a causal LM: when the last token is changed, its outputs at "
                    f"earlier ones move by {later:.2g} (of their spread; rounding explains "
                    f"{limit:.0e}). Its predictions have seen the answer. {_other(model)}"
                )
            return
        earlier = max(_influence(model, length, of=0) for length in lengths)
    least = NOTHING * limit
    if min(later, earlier) <= least < max(later, earlier):
        blind = "later" if later < earlier else "earlier"
        raise SightError(
            f"{name} is not a masked LM: when a {blind} token is changed, none of its outputs "
            "elsewhere move, so it sees only one side of a masked token. "
            + ("Say `task: causal_lm`" if blind == "later" else "Check the model")
        )


def _other(model: "PreTrainedModel") -> str:
    """Return what to do with a model that is not causal."""
    from transformers import AutoModelForMaskedLM

    if type(model.config) in AutoModelForMaskedLM._model_mapping:
        return "Say `task: masked_lm`"
    return (
        "Bidirectional embedders are not language models; if this one was trained causally, its "
        "config.json says otherwise (is_causal, use_bidirectional_attention, is_decoder, causal)"
    )


def _rounding(model: nn.Module) -> float:
    return ROUNDING.get(next(model.parameters()).dtype, COARSEST)


def _lengths(config: "PretrainedConfig") -> list[int]:
    """Return those of LENGTHS that the model takes; the shortest is longer than one token."""
    longest = longest_input(config)
    return [n for n in LENGTHS if longest is None or n <= longest] or [LENGTHS[0]]


def _influence(model: "PreTrainedModel", length: int, of: int) -> float:
    """Return how far another token at the place ``of`` moves the outputs at the others."""
    ids = sample_ids(model.config, length + 1)
    rows = ids[:length].repeat(3, 1)
    rows[2, of] = ids[length]
    rows = rows.to(next(model.parameters()).device)
    logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits.float()
    others = [place for place in range(length) if place != of]
    first, again, changed = logits[:, others]
    # A model that draws at random (hashing, say) moves by itself; and a deep one with large states
    # at the first token (SmolLM2: 2e-5) rounds differently if a product is split differently.
    own = max(_moved(first, again), _moved(first, _of_fewer(model, rows)[others]))
    return max(0.0, _moved(first, changed) - 4 * own)


def _of_fewer(model: "PreTrainedModel", rows: Tensor) -> Tensor:
    """Return logits [S,V] of the first row beside fewer others: by products of another shape."""
    for count in (1, 2):  # some quantised layers on a CPU take no single row
        with suppress(*BROKEN):
            fewer = rows[:count]
            found: Tensor = model(input_ids=fewer, attention_mask=torch.ones_like(fewer)).logits
            return found[0].float()
    return model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[0].float()


def moved_by_padding(model: "PreTrainedModel") -> float:
    """Return how far padding that the attention mask hides moves the states of a sequence's own
    tokens, or a classifier's output; 0 if by no more than rounding.
    """
    room = (longest_input(model.config) or LENGTHS[-1]) - PADDING
    ids = sample_ids(model.config, max(1, min(LENGTHS[1], room)))[None].to(
        next(model.parameters()).device
    )
    own = padding_of(model.config)
    padding = (0 if ids[0, -1] else 1) if own is None else own
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {
        "input_ids": nn.functional.pad(ids, (0, PADDING), value=padding),
        "attention_mask": nn.functional.pad(torch.ones_like(ids), (0, PADDING)),
    }
    try:
        with evaluating(model):
            one, other = (_states(model, inputs)[0, : ids.shape[1]] for inputs in (alone, padded))
            if one.shape != other.shape:  # several tokens share a state, as in Funnel
                return math.inf
            moved = _moved(one, other)
            if moved > OF_SHAPES * _rounding(model):
                return moved
            return _judged_otherwise(model, alone, padded, padding)
    except BROKEN:  # what the model cannot do is reported where it is used
        return 0.0


def _judged_otherwise(
    model: "PreTrainedModel",
    alone: Mapping[str, Tensor],
    padded: Mapping[str, Tensor],
    padding: int,
) -> float:
    """Return how far padding moves the logits of a classifier that takes its output from padding,
    as XLNet's does, which expects padding before the text: a share of the largest logit, or 0.
    """
    if "SequenceClassification" not in type(model).__name__:
        return 0.0
    own = padding_of(model.config)
    set_padding(model.config, padding)  # some find the last token by it
    try:
        one, other = (model(**inputs).logits[0].float() for inputs in (alone, padded))
    finally:
        set_padding(model.config, own)
    share = float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
    return share if share > OF_ANSWERS * _rounding(model) else 0.0


def check_padding(model: "PreTrainedModel", who: str) -> None:
    """Raise InputError for a model that padding changes, if batches are padded."""
    if moved := moved_by_padding(model):
        raise InputError(
            f"{who}: {type(model).__name__} lets padding, which the attention mask hides, "
            f"change the states of the tokens themselves (by {moved:.2g} of their spread): what it "
            "learns of a sequence would depend on its neighbours in the batch. Use a student of "
            "another family; as a teacher it is shown sequences of one length together"
        )


def find_form(model: "PreTrainedModel", causal: bool, room: int) -> Form:
    """Find how to tell the model that a row of up to ``room`` tokens holds several documents, by
    trying: its outputs for a row of two must be those for each of them alone.

    Raises SightError if they differ whatever it is told, or if one document sees the other.
    """
    name, limit = type(model).__name__, OF_SHAPES * _rounding(model)
    told = f"{name} cannot read rows of several documents (corpus.packing: packed)"
    advice = "Use packing: document, or a model of another family"
    worst, why = math.inf, ""
    for forms in possible_forms(model, causal):
        tried: list[tuple[float, Form]] = []
        for form in forms:
            try:
                with evaluating(model):
                    tried.append((_moved_by_packing(model, form, causal, room), form))
            except BROKEN as error:
                why = why or f"{type(error).__name__}: {first_words(error)}"
        if tried:
            least = min(moved for moved, _ in tried)
            # to rotary positions all of the first ones are the same, up to rounding
            if least <= limit:
                return next(form for moved, form in tried if moved <= SAME_ROUNDING * least)
            worst = min(worst, least)
    if worst == math.inf:
        raise SightError(f"{told}: its code fails ({why}). {advice}")
    raise SightError(
        f"{told}: its outputs for a document beside another one differ from those for it "
        f"alone by {worst:.2g} (of their spread; rounding explains {limit:.0e}). {advice}"
    )


def _moved_by_packing(model: "PreTrainedModel", form: Form, causal: bool, room: int) -> float:
    """Return how far, at most, another document in its row moves the states of one."""
    longest = min(room, longest_input(model.config) or room)
    ids = sample_ids(model.config, longest + 1).to(next(model.parameters()).device)
    cut = longest - min(PADDING, longest // 2)
    first, second, another = ids[:cut], ids[cut:longest], ids[longest:]
    changed = torch.cat([first[:-1], another])
    padding = padding_of(model.config) or 0
    rest = nn.functional.pad(second, (0, cut), value=padding)
    rows = torch.stack([ids[:longest], torch.cat([changed, second]), rest])
    numbers = torch.zeros_like(rows)
    numbers[:2, cut:] = 1
    numbers[2, len(second) :] = -1
    packed = {"input_ids": rows, DOCUMENTS: numbers}
    found = _states(model, as_read(model, packed, form, causal)).reshape(*rows.shape, -1)
    alone = [
        _states(model, {"input_ids": one[None], "attention_mask": torch.ones_like(one[None])})[0]
        for one in (first, second)
    ]
    # If nothing of the other is seen, not even rounding differs.
    seen = _moved(found[0, cut:], found[1, cut:]) * OF_SHAPES
    return max(
        seen,
        _moved(alone[0], found[0, :cut]),
        _moved(alone[1], found[0, cut:]),
        _moved(alone[1], found[2, : len(second)]),
    )


def _states(model: "PreTrainedModel", inputs: Mapping[str, Tensor]) -> Tensor:
    states: Tensor = model.base_model(**inputs).last_hidden_state
    return states.float()


def _moved(one: Tensor, other: Tensor) -> float:
    """Return the largest mean difference of a position, as a share of its spread; 0 if NaN."""
    spread = (one - one.mean(dim=-1, keepdim=True)).abs().mean(dim=-1)
    share = (one - other).abs().mean(dim=-1) / spread.clamp_min(1e-30)
    return float(share.nan_to_num(0.0).max())


def sample_ids(config: "PretrainedConfig", count: int) -> Tensor:
    """Return distinct ids (if there are as many) that are not special tokens: int64 [count]."""
    text = config.get_text_config()
    special = {getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    known = range(text.vocab_size // 3, text.vocab_size)
    chosen = [i for i in known[: count + len(special)] if i not in special] or [0]
    return torch.tensor([chosen[i % len(chosen)] for i in range(count)])
