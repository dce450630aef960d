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
MODEL_ERRORS = (AttributeError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
LENGTHS = (2, 7, 19)  # short ones, where a token weighs much; odd ones, past a block of 16
PADDING = 5  # tokens that the mask hides
# Movement is the change of a position's values as a share of their spread about the mean. Rounding
# alone stays below ROUNDING: another token's influence is thousands of times as much. Kernels of
# another shape round differently, so the limit for padding is larger.
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-4}
COARSEST = 4e-3  # in bfloat16, and in coarser types
SHAPE_TOLERANCE = 10.0
LOGIT_TOLERANCE = 100.0  # a logit may be a small difference of large ones
SAME_ROUNDING = 3.0
# "Nothing is seen" needs movements far below rounding; untrained weights move little.
BLIND_SHARE = 1e-2


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
                    f"{limit:.0e}). Its predictions have seen the answer. "
                    f"{_advise_not_causal(model)}"
                )
            return
        earlier = max(_influence(model, length, of=0) for length in lengths)
    least = BLIND_SHARE * limit
    if min(later, earlier) <= least < max(later, earlier):
        blind = "later" if later < earlier else "earlier"
        raise SightError(
            f"{name} is not a masked LM: when a {blind} token is changed, none of its outputs "
            "elsewhere move, so it sees only one side of a masked token. "
            + ("Say `task: causal_lm`" if blind == "later" else "Check the model")
        )


def _advise_not_causal(model: "PreTrainedModel") -> str:
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
    other_places = [position for position in range(length) if position != of]
    first, repeated, changed = logits[:, other_places]
    # A model that draws at random (hashing, say) moves by itself; and a deep one with large states
    # at the first token (SmolLM2: 2e-5) rounds differently if a product is split differently.
    own_movement = max(
        _movement(first, repeated),
        _movement(first, _logits_in_smaller_batch(model, rows)[other_places]),
    )
    return max(0.0, _movement(first, changed) - 4 * own_movement)


def _logits_in_smaller_batch(model: "PreTrainedModel", rows: Tensor) -> Tensor:
    """Return logits [S,V] of the first row beside fewer others: by products of another shape."""
    for count in (1, 2):  # some quantised layers on a CPU take no single row
        with suppress(*MODEL_ERRORS):
            fewer = rows[:count]
            logits: Tensor = model(input_ids=fewer, attention_mask=torch.ones_like(fewer)).logits
            return logits[0].float()
    return model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[0].float()


def padding_influence(model: "PreTrainedModel") -> float:
    """Return how far padding that the attention mask hides moves the states of a sequence's own
    tokens, or a classifier's output; 0 if by no more than rounding.
    """
    free_tokens = (longest_input(model.config) or LENGTHS[-1]) - PADDING
    ids = sample_ids(model.config, max(1, min(LENGTHS[1], free_tokens)))[None].to(
        next(model.parameters()).device
    )
    configured = padding_of(model.config)
    padding = (0 if ids[0, -1] else 1) if configured is None else configured
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {
        "input_ids": nn.functional.pad(ids, (0, PADDING), value=padding),
        "attention_mask": nn.functional.pad(torch.ones_like(ids), (0, PADDING)),
    }
    try:
        with evaluating(model):
            alone_states, padded_states = (
                _states(model, inputs)[0, : ids.shape[1]] for inputs in (alone, padded)
            )
            if (
                alone_states.shape != padded_states.shape
            ):  # several tokens share a state, as in Funnel
                return math.inf
            movement = _movement(alone_states, padded_states)
            if movement > SHAPE_TOLERANCE * _rounding(model):
                return movement
            return _classifier_padding_influence(model, alone, padded, padding)
    except MODEL_ERRORS:  # what the model cannot do is reported where it is used
        return 0.0


def _classifier_padding_influence(
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
    configured = padding_of(model.config)
    set_padding(model.config, padding)  # some find the last token by it
    try:
        alone_logits, padded_logits = (
            model(**inputs).logits[0].float() for inputs in (alone, padded)
        )
    finally:
        set_padding(model.config, configured)
    movement = float(
        (alone_logits - padded_logits).abs().max() / alone_logits.abs().max().clamp_min(1e-30)
    )
    return movement if movement > LOGIT_TOLERANCE * _rounding(model) else 0.0


def check_padding(model: "PreTrainedModel", subject: str) -> None:
    """Raise InputError for a model that padding changes, if batches are padded."""
    if movement := padding_influence(model):
        raise InputError(
            f"{subject}: {type(model).__name__} lets padding, which the attention mask hides, "
            f"change the states of the tokens themselves (by {movement:.2g} of their spread): what "
            "it learns of a sequence would depend on its neighbours in the batch. Use a student of "
            "another family; as a teacher it is shown sequences of one length together"
        )


def find_form(model: "PreTrainedModel", causal: bool, room: int) -> Form:
    """Find how to tell the model that a row of up to ``room`` tokens holds several documents, by
    trying: its outputs for a row of two must be those for each of them alone.

    Raises SightError if they differ whatever it is told, or if one document sees the other.
    """
    name, limit = type(model).__name__, SHAPE_TOLERANCE * _rounding(model)
    failure = f"{name} cannot read rows of several documents (corpus.packing: packed)"
    advice = "Use packing: document, or a model of another family"
    least_overall, reason = math.inf, ""
    for forms in possible_forms(model, causal):
        movements: list[tuple[float, Form]] = []
        for form in forms:
            try:
                with evaluating(model):
                    movements.append((_packing_influence(model, form, causal, room), form))
            except MODEL_ERRORS as error:
                reason = reason or f"{type(error).__name__}: {first_words(error)}"
        if movements:
            least_movement = min(movement for movement, _ in movements)
            # to rotary positions all of the first ones are the same, up to rounding
            if least_movement <= limit:
                return next(
                    form
                    for movement, form in movements
                    if movement <= SAME_ROUNDING * least_movement
                )
            least_overall = min(least_overall, least_movement)
    if least_overall == math.inf:
        raise SightError(f"{failure}: its code fails ({reason}). {advice}")
    raise SightError(
        f"{failure}: its outputs for a document beside another one differ from those for it "
        f"alone by {least_overall:.2g} (of their spread; rounding explains {limit:.0e}). {advice}"
    )


def _packing_influence(model: "PreTrainedModel", form: Form, causal: bool, room: int) -> float:
    """Return how far, at most, another document in its row moves the states of one."""
    longest = min(room, longest_input(model.config) or room)
    ids = sample_ids(model.config, longest + 1).to(next(model.parameters()).device)
    cut = longest - min(PADDING, longest // 2)
    first, second, another = ids[:cut], ids[cut:longest], ids[longest:]
    changed = torch.cat([first[:-1], another])
    padding = padding_of(model.config) or 0
    second_alone = nn.functional.pad(second, (0, cut), value=padding)
    rows = torch.stack([ids[:longest], torch.cat([changed, second]), second_alone])
    numbers = torch.zeros_like(rows)
    numbers[:2, cut:] = 1
    numbers[2, len(second) :] = -1
    packed = {"input_ids": rows, DOCUMENTS: numbers}
    packed_states = _states(model, as_read(model, packed, form, causal)).reshape(*rows.shape, -1)
    alone = [
        _states(model, {"input_ids": one[None], "attention_mask": torch.ones_like(one[None])})[0]
        for one in (first, second)
    ]
    # If nothing of the other is seen, not even rounding differs.
    leaked = _movement(packed_states[0, cut:], packed_states[1, cut:]) * SHAPE_TOLERANCE
    return max(
        leaked,
        _movement(alone[0], packed_states[0, :cut]),
        _movement(alone[1], packed_states[0, cut:]),
        _movement(alone[1], packed_states[2, : len(second)]),
    )


def _states(model: "PreTrainedModel", inputs: Mapping[str, Tensor]) -> Tensor:
    states: Tensor = model.base_model(**inputs).last_hidden_state
    return states.float()


def _movement(one: Tensor, other: Tensor) -> float:
    """Return the largest mean difference of a position, as a share of its spread; 0 if NaN."""
    spread = (one - one.mean(dim=-1, keepdim=True)).abs().mean(dim=-1)
    movement = (one - other).abs().mean(dim=-1) / spread.clamp_min(1e-30)
    return float(movement.nan_to_num(0.0).max())


def sample_ids(config: "PretrainedConfig", count: int) -> Tensor:
    """Return distinct ids (if there are as many) that are not special tokens: int64 [count]."""
    text = config.get_text_config()
    special = {getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    ids = range(text.vocab_size // 3, text.vocab_size)
    chosen = [i for i in ids[: count + len(special)] if i not in special] or [0]
    return torch.tensor([chosen[i % len(chosen)] for i in range(count)])
