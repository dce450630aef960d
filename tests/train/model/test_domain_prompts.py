"""Domain prompts: the model reads one token more, and nobody who names a position knows it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.train.config import ObjectiveConfig, StudentConfig, TrainConfig
from rekindle.train.device_batch import language_rows, model_inputs
from rekindle.train.evaluate import EvaluationData, evaluate
from rekindle.train.loop import train_student
from rekindle.train.model.network import HeadConfig, with_prompt, without_prompt
from rekindle.train.objective.objective import Objective
from rekindle.train.student import Student, build_student

CPU = torch.device("cpu")
HEADS = {
    "sense": HeadConfig(kind="sequence", num_labels=3),
    "tags": HeadConfig(kind="token", num_labels=4),
}
MASKED = ("bert", "roberta", "electra", "deberta", "modernbert")
LENGTHS = (9, 1, 4, 2)


@pytest.fixture(scope="module")
def student_of(make_model, wordpiece, bytelevel):
    def make(family="bert", domains=("even", "odd"), seed=0, **extra):
        masked = family in MASKED
        tokenizer = wordpiece if masked else bytelevel
        auto = f"AutoModelFor{'Masked' if masked else 'Causal'}LM"
        model = make_model(family, auto, tokenizer, **extra)
        config = StudentConfig(
            model=str(model), task="masked_lm" if masked else "causal_lm", domain_prompts=True
        )
        size = load_tokenizer(str(tokenizer)).size
        return build_student(config, HEADS, size, seed, domains=domains).eval()

    return make


def padded(padding=0):
    ids = torch.randint(5, 90, (len(LENGTHS), 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}


# --- positions, every one of them ---


@given(st.integers(1, 5), st.integers(1, 9))
@settings(deadline=None)
def test_every_position_is_found_behind_the_prompt(rows, width):
    marks = torch.arange(rows * width).view(rows, width)
    prompted = torch.cat([marks[:, :1], torch.full((rows, 1), -1), marks[:, 1:]], dim=1)
    places = with_prompt(torch.arange(rows * width), width)
    assert torch.equal(prompted.flatten()[places], marks.flatten())
    assert torch.equal(without_prompt(prompted), marks)


@pytest.mark.parametrize("family", [*MASKED, "gpt2", "llama"])
def test_a_prompt_is_a_token_after_the_first(student_of, family):
    """With a word's embedding as its vector, the states are those of ids with that word put in."""
    student = student_of(family)
    words = student.model.get_input_embeddings().weight
    chosen = [17, 23, 31]  # of no domain, of "even", of "odd"
    with torch.no_grad():
        student.prompts.vectors.weight.copy_(words[chosen])
    inputs = padded(student.model.config.pad_token_id)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    domains = ["odd", None, "even", "elsewhere"]
    tokens = torch.tensor([[chosen[n]] for n in (2, 0, 1, 0)])
    longer = {
        "input_ids": torch.cat([ids[:, :1], tokens, ids[:, 1:]], dim=1),
        "attention_mask": torch.cat([mask[:, :1], mask], dim=1),
    }
    everywhere = mask.flatten().nonzero()[:, 0]
    with torch.no_grad():
        found = student(
            student.with_domains(inputs, domains), everywhere, ["sense"], {"tags": everywhere}
        )
        states = student.model.base_model(**longer).last_hidden_state
        logits = student.model(**longer).logits
    keep = [0, *range(2, 10)]
    real = mask.bool()
    expected = logits[:, keep][real][:, : student.vocabulary_size]
    torch.testing.assert_close(
        student.output_head.logits(found.hidden), expected, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        found.logits["tags"], student.heads["tags"](states[:, keep][real]), rtol=1e-4, atol=1e-4
    )
    last = [0] * 4 if family in MASKED else [n if n > 1 else 0 for n in LENGTHS]
    pooled = states[torch.arange(4), last]  # of a causal LM the last token stands one further
    torch.testing.assert_close(
        found.logits["sense"], student.heads["sense"](pooled), rtol=1e-4, atol=1e-4
    )


def test_segments_grow_with_the_prompt(student_of):
    student = student_of("bert")
    inputs = padded() | {"token_type_ids": torch.ones(4, 9, dtype=torch.int64)}
    longer = student.prompts.insert(inputs, student.model.get_input_embeddings())
    assert longer["token_type_ids"].shape == longer["attention_mask"].shape == (4, 10)
    assert longer["inputs_embeds"].shape[:2] == (4, 10)
    assert torch.equal(longer["attention_mask"].sum(1), torch.tensor(LENGTHS) + 1)
    student(inputs, torch.arange(4))


def test_text_of_no_domain_is_what_is_read_where_none_is_told(student_of):
    student = student_of("gpt2")
    plain = student(padded(), torch.arange(9)).hidden
    none = student(student.with_domains(padded(), [None] * 4), torch.arange(9)).hidden
    other = student(student.with_domains(padded(), ["odd"] * 4), torch.arange(9)).hidden
    assert torch.equal(plain, none)
    assert not torch.equal(plain[1:], other[1:])


# --- in training ---


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_cached_targets_meet_their_own_positions(masked_world, causal_world, kind):
    """The KD loss of every single row equals that of the whole model on ids with the prompt."""
    world = masked_world if kind == "masked" else causal_world
    cache, task = world.open(), f"{kind}_lm"
    name = "big" if kind == "masked" else "lm"
    infos = {name: cache.teacher(name).info}
    config = ObjectiveConfig.model_validate(
        {"hard": {"weight": 0}, "distill": [{"teachers": [name], "tail": "none"}]}
    )
    objective = Objective(config, infos, task, 10)
    student = prompted(world, cache, task)
    words = student.model.get_input_embeddings().weight
    with torch.no_grad():
        student.prompts.vectors.weight.copy_(words[40:43])
    view = cache.masked_view().name if kind == "masked" else None
    seen = set()
    for index in range(3, 20):
        batch = cache.gather(np.array([index]), [name], epoch=0, masked_view=view)
        counts = objective.counts(batch, objective.plan(0))
        found = objective.loss(student, batch, counts, objective.plan(0), CPU).total
        shown = batch.masked.input_ids if kind == "masked" else batch.input_ids
        token = 40 + student.prompts.numbers(batch.domains)[0]
        seen.add(token)
        ids = np.insert(shown[0].astype(np.int64), 1, token)[None]
        with torch.no_grad():
            logits = student.model(torch.from_numpy(ids)).logits[0]
        logits = torch.cat([logits[:1], logits[2:]])[:, : student.vocabulary_size]
        target = batch.targets[name]
        kept, log_probs, _ = target.decode()
        teacher = torch.from_numpy(log_probs)
        ours = logits[torch.from_numpy(target.positions)].log_softmax(1)
        ours = ours.gather(1, torch.from_numpy(kept))
        expected = (teacher.exp() * (teacher - ours)).sum(1).mean()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert seen == {41, 42}


def prompted(world, cache, task):
    config = StudentConfig(model=str(world.student), task=task, domain_prompts=True)
    size = cache.corpus.info["tokenizer"]["size"]
    domains = tuple(cache.corpus.domains)
    assert domains == ("even", "odd")
    return build_student(config, {}, size, 0, domains=domains).eval()


def test_only_prompts_of_the_batchs_domains_get_a_gradient(masked_world):
    cache = masked_world.open()
    student = prompted(masked_world, cache, "masked_lm")
    view = cache.masked_view().name
    batch = cache.gather(np.arange(30), [], epoch=0, masked_view=view)
    domains = np.array(list(batch.domains))
    for wanted in (["odd"], ["even"], ["even", "odd"]):
        index = np.flatnonzero(np.isin(domains, wanted))
        part = cache.gather(index, [], epoch=0, masked_view=view)
        rows = language_rows(part, "masked_lm", CPU)
        student.zero_grad()
        shown = student.with_domains(rows.inputs, part.domains)
        student(shown, rows.select).hidden.square().sum().backward()
        moved = student.prompts.vectors.weight.grad.abs().sum(1) > 0
        assert moved.tolist() == [False, "even" in wanted, "odd" in wanted]


def test_every_pass_of_the_objective_knows_the_domains(masked_world):
    cache = masked_world.open()
    names = ["big", "sense", "pair", "tags"]
    infos = {name: cache.teacher(name).info for name in names}
    config = ObjectiveConfig.model_validate({"distill": [{"teachers": [n]} for n in names]})
    objective = Objective(config, infos, "masked_lm", 10)
    student = prompted(masked_world, cache, "masked_lm")
    student.add_heads(objective.heads)
    seen = []
    insert = student.prompts.insert
    student.prompts.insert = lambda inputs, words: (
        seen.append(inputs["domain_numbers"].tolist()) or insert(inputs, words)
    )
    view = cache.masked_view().name
    batch = cache.gather(np.arange(8), names, epoch=0, masked_view=view)
    objective.loss(
        student, batch, objective.counts(batch, objective.plan(0)), objective.plan(0), CPU
    )
    data = EvaluationData(cache, np.arange(8), tuple(names), view, 8)
    passes = len(seen)
    assert passes == 3  # the masked text, the clean text, pairs
    values = evaluate(student, data, CPU)
    assert {f"kl/{name}" for name in names} <= values.keys()
    assert len(seen) == 2 * passes
    assert all(numbers == student.prompts.numbers(batch.domains) for numbers in seen)


# --- what is kept ---


def test_prompts_are_saved_loaded_and_handed_on(student_of, tmp_path):
    student = student_of("bert")
    student.save_pretrained(tmp_path)
    again = Student.from_pretrained(tmp_path).eval()
    assert again.prompts.domains == ("even", "odd")
    shown = student.with_domains(padded(), ["odd", "even", None, "odd"])
    assert torch.equal(again(shown, torch.arange(9)).hidden, student(shown, torch.arange(9)).hidden)
    config = StudentConfig(model=str(tmp_path), domain_prompts=True)
    later = build_student(config, {}, 50, seed=7, domains=("law", "odd"))  # ELLE: a domain more
    old, new = student.prompts.vectors.weight, later.prompts.vectors.weight
    assert torch.equal(new[[0, 2]], old[[0, 2]])
    assert not torch.isin(new[1], old).any()
    without = build_student(StudentConfig(model=str(tmp_path)), {}, 50, seed=7)
    assert without.prompts is None


def test_a_run_trains_them_and_goes_on_bit_for_bit(masked_world, tmp_path):
    cache = masked_world.open()
    student = StudentConfig(model=str(masked_world.student), domain_prompts=True)
    config = TrainConfig(
        steps=4,
        batch_sequences=6,
        warmup_steps=0,
        checkpoint_every=2,
        held_out=0.1,
        evaluate_sequences=8,
    )

    def stop(step, values):
        if step == 3:
            raise KeyboardInterrupt

    train_student(cache, student, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_student(cache, student, config, tmp_path / "cut", report=stop)
    train_student(cache, student, config, tmp_path / "cut", resume=True)
    one, other = (Student.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    state = one.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    fresh = prompted(masked_world, cache, "masked_lm").state_dict()["prompts.vectors.weight"]
    moved = (state["prompts.vectors.weight"] - fresh).abs().amax(1)
    assert (moved[1:] > 1e-4).all()  # by both domains' text; decay alone moves less
    assert moved[0] < 1e-4


# --- refusals ---


def test_a_corpus_without_domains_has_no_prompts(student_of):
    with pytest.raises(InputError, match=r"the corpus has no domains.*corpus.domain_field"):
        student_of("bert", domains=())


def test_the_prompt_takes_a_position(make_model, wordpiece):
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, max_position_embeddings=24)
    size = load_tokenizer(str(wordpiece)).size
    plain, with_prompts = (
        StudentConfig(model=str(model), domain_prompts=prompts) for prompts in (False, True)
    )
    build_student(plain, {}, size, 0, 24)
    build_student(with_prompts, {}, size, 0, 23, ("a",))
    with pytest.raises(InputError, match=r"at most 24 tokens.*24 and the domain prompt one more"):
        build_student(with_prompts, {}, size, 0, 24, ("a",))


def test_without_prompts_inputs_are_what_they_were(make_model, wordpiece):
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece)
    student = build_student(StudentConfig(model=str(model)), {}, 50, 0)
    inputs = model_inputs(np.ones((1, 3), np.int32), np.array([3]), CPU)
    assert student.with_domains(inputs, ["x"]) is inputs
