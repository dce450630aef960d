"""Growth of models: where the logits stay, where they do not, and which weight comes from which."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from rekindle.data.errors import InputError
from rekindle.train.config import GrowConfig
from rekindle.train.growth.families import Linear, Output
from rekindle.train.growth.grow import Growth, Shape, grow, grown_shape
from rekindle.train.model.split_model import SplitLanguageModel

VOCABULARY = 40
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
MODELS = {
    "bert": ("BertForMaskedLM", "BertConfig", COMMON),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", COMMON | {"layer_norm_eps": 1e-5}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", COMMON | {"n_positions": 32}),
    "gpt2-inner": ("GPT2LMHeadModel", "GPT2Config", COMMON | {"n_inner": 12}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON),
    "llama-biased": (
        "LlamaForCausalLM",
        "LlamaConfig",
        GROUPED | {"attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 4}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        GROUPED | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
}
POST_NORM = ("bert", "roberta")
LARGEST = 1e-4  # |Δlogit| of what is called exact; logits are of the order of 5


def model_of(name, seed=0, **extra):
    """Biases and norms away from 0 and 1, so that each of them matters."""
    model, config, values = MODELS[name]
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    made = getattr(transformers, model)(getattr(transformers, config)(**(values | extra))).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return made


def logits_of(model):
    """Of sequences of 12, 7 and 2 tokens, at their tokens."""
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(12) < torch.tensor([12, 7, 2])[:, None]).long()
    with torch.no_grad():
        return model(input_ids=ids * mask, attention_mask=mask).logits[mask.bool()]


def change(model, **config):
    """The largest |Δlogit| of growing so."""
    grown = grow(model, GrowConfig.model_validate(config))
    return float((logits_of(grown) - logits_of(model)).abs().max())


def wider(model, numerator, denominator=1):
    return {"hidden_size": model.config.hidden_size * numerator // denominator}


# --- the table: what keeps the logits ---


@pytest.mark.covering(2)
@pytest.mark.parametrize("preserve", ["exact", "approximate"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_neurons_and_multiples_of_the_hidden_size_keep_all_logits(name, tied, preserve):
    model = model_of(name, tie_word_embeddings=tied)
    neurons = Shape.of(model.config).intermediate_size + 7
    assert change(model, intermediate_size=neurons, preserve=preserve) < LARGEST
    for times in (2, 3):
        noise = {"noise_std": 0.1} if preserve == "exact" else {}
        assert change(model, **wider(model, times), preserve=preserve, **noise) < LARGEST


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [n for n in MODELS if n not in POST_NORM])
def test_exact_keeps_all_logits_at_any_hidden_size_of_pre_norm_models(name, tied):
    model = model_of(name, tie_word_embeddings=tied)
    size = wider(model, 3, 2)
    assert change(model, **size, preserve="exact", noise_std=0.1) < LARGEST
    assert change(model, **size, layers=5, preserve="exact") < LARGEST
    assert change(model, **size) > 0.1


@pytest.mark.parametrize(
    ("name", "eps"), [("gpt2", "layer_norm_epsilon"), ("llama", "rms_norm_eps")]
)
def test_the_eps_of_the_norms_grows_along(name, eps):
    model = model_of(name, **{eps: 0.5})
    assert change(model, hidden_size=12, preserve="exact") < LARGEST
    for size in (8, 16):  # of which nothing needs another eps
        grown = grow(model, GrowConfig(hidden_size=size, preserve="exact"))
        assert getattr(grown.config, eps) == 0.5


@pytest.mark.parametrize("name", POST_NORM)
def test_exact_is_refused_where_a_post_norm_model_cannot(name):
    model = model_of(name)
    with pytest.raises(InputError, match=r"impossible from hidden_size 8 to 12.* Use 16 .*approx"):
        grow(model, GrowConfig(hidden_size=12, preserve="exact"))
    assert change(model, hidden_size=12) > 0.1


@pytest.mark.covering(2)
@pytest.mark.parametrize("which", ["spread", "last", "first"])
@pytest.mark.parametrize("layers", [3, 4, 7])
@pytest.mark.parametrize("name", MODELS)
def test_exact_keeps_all_logits_when_layers_are_added(name, layers, which):
    model = model_of(name)
    assert change(model, layers=layers, copy=which, preserve="exact") < LARGEST
    assert change(model, layers=layers, copy=which) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_exact_keeps_all_logits_when_everything_grows(name):
    model = model_of(name)
    size = wider(model, 2)
    assert change(model, **size, layers=5, intermediate_size=70, preserve="exact") < LARGEST


def test_nothing_grows_where_nothing_is_asked_for():
    model = model_of("bert")
    grown = grow(model, GrowConfig())
    assert all(torch.equal(value, model.state_dict()[n]) for n, value in grown.state_dict().items())


# --- which weight comes from which ---


def test_rows_are_copied_and_columns_divided_in_every_matrix():
    model = model_of("bert")
    config = GrowConfig(hidden_size=12, layers=3, seed=3)
    growth = Growth(model, config)
    old, new = model.state_dict(), grow(model, config).state_dict()
    g = growth.hidden.source
    many = torch.bincount(g)[g].float()
    assert len(g) == 12
    table = "bert.embeddings.{}_embeddings.weight"
    for kind in ("word", "position", "token_type"):  # one g for all places of the hidden size
        assert torch.equal(new[table.format(kind)], old[table.format(kind)][:, g])
    dense = "cls.predictions.transform.dense.weight"
    torch.testing.assert_close(new[dense], old[dense][g][:, g] / many)
    last = "cls.predictions.transform.LayerNorm.{}"  # its output meets columns that are not divided
    for kind in ("weight", "bias"):
        torch.testing.assert_close(new[last.format(kind)], old[last.format(kind)][g] / many)
    for layer, origin in enumerate(growth.sources):
        axes = growth.layers[layer]
        here, there = (f"bert.encoder.layer.{n}." for n in (layer, origin))
        for part in ("query", "key", "value"):
            name = f"attention.self.{part}"
            expected = old[f"{there}{name}.weight"][axes.heads.source][:, g] / many
            torch.testing.assert_close(new[f"{here}{name}.weight"], expected)
            expected = old[f"{there}{name}.bias"][axes.heads.source]
            assert torch.equal(new[f"{here}{name}.bias"], expected)
        for name, axis in (("attention.output.dense", axes.heads), ("output.dense", axes.ffn)):
            count = torch.bincount(axis.source)[axis.source].float()
            expected = old[f"{there}{name}.weight"][g][:, axis.source] / count
            torch.testing.assert_close(new[f"{here}{name}.weight"], expected)
        expected = old[f"{there}intermediate.dense.weight"][axes.ffn.source][:, g] / many
        torch.testing.assert_close(new[f"{here}intermediate.dense.weight"], expected)
        assert torch.equal(
            new[f"{here}output.LayerNorm.weight"], old[f"{there}output.LayerNorm.weight"][g]
        )


def test_gpt2_keeps_query_key_and_value_side_by_side():
    model = model_of("gpt2")
    growth = Growth(model, GrowConfig(hidden_size=12))
    grown = growth.model(model)
    before, after = (m.transformer.h[1].attn.c_attn for m in (model, grown))
    g, heads = growth.hidden.source, growth.layers[1].heads.source
    many = torch.bincount(g)[g].float()
    for part in range(3):
        old, new = before.weight[:, part * 8 :][:, :8], after.weight[:, part * 12 :][:, :12]
        torch.testing.assert_close(new, old[g][:, heads] / many[:, None])
        assert torch.equal(after.bias[part * 12 :][:12], before.bias[part * 8 :][:8][heads])


def test_each_layer_has_its_own_heads_and_neurons():
    growth = Growth(model_of("bert"), GrowConfig(hidden_size=20, layers=6))
    heads = {tuple(axes.heads.source.tolist()) for axes in growth.layers}
    neurons = {tuple(axes.ffn.source.tolist()) for axes in growth.layers}
    assert len(heads) > 1
    assert len(neurons) == 6
    for axes in growth.layers:  # whole heads of 4
        assert (axes.heads.source.view(5, 4) - axes.heads.source.view(5, 4)[:, :1]).tolist() == [
            [0, 1, 2, 3]
        ] * 5


def test_query_heads_stay_with_their_key_value_head():
    growth = Growth(model_of("mistral"), GrowConfig(hidden_size=40))
    (axes, _) = growth.layers
    size, each = 4, 2  # of a head; query heads per key/value head
    queries, groups = axes.heads.source.view(-1, size), axes.groups.source.view(-1, size)
    assert len(queries) == 10
    assert len(groups) == 5
    for head, dimensions in enumerate(queries.tolist()):
        origin = dimensions[0] // size
        assert origin // each == int(groups[head // each, 0]) // size
        assert origin % each == head % each


def test_growth_depends_on_the_seed_alone():
    model = model_of("llama")
    config = {"hidden_size": 12, "layers": 3, "noise_std": 0.1}
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        states.append(grow(model, GrowConfig(**config, seed=seed)).state_dict())
    same = [all(torch.equal(v, other[n]) for n, v in states[0].items()) for other in states[1:]]
    assert same == [True, False]


def test_copies_learn_different_things_only_with_noise():
    """Equal neurons get equal gradients, and AdamW makes equal steps of proportional ones."""
    for noise, differ in ((0.0, False), (0.01, True)):
        model = model_of("llama")
        growth = Growth(model, GrowConfig(intermediate_size=24, noise_std=noise))
        grown = growth.model(model)
        optimizer = torch.optim.AdamW(grown.parameters(), lr=0.01)
        ids = torch.arange(3, 15)[None]
        grown(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        rows = grown.model.layers[0].mlp.up_proj.weight
        copies = growth.layers[0].ffn.source[12:]
        assert torch.allclose(rows[12:], rows[copies], atol=1e-5) is not differ


@pytest.mark.covering(2)
@pytest.mark.parametrize("preserve", ["approximate", "exact"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_noise_is_on_the_divided_columns_of_every_copy_but_the_first(name, tied, preserve):
    """What it adds to each parameter, beside the same growth without; in both directions of GPT-2's
    matrices.
    """
    model = model_of(name, tie_word_embeddings=tied)
    size = wider(model, 3) | {"layers": 3, "preserve": preserve}
    growth = Growth(model, GrowConfig.model_validate(size))
    plain = growth.model(model).state_dict()
    noisy = grow(model, GrowConfig.model_validate(size | {"noise_std": 0.01})).state_dict()
    found = []
    for key, value in noisy.items():
        added = value - plain[key]
        role, layer = growth.family.role(key), growth.family.split_name(key)[0]
        output = isinstance(role, Output) and not tied and value.dim() == 2
        if not output and not (isinstance(role, Linear) and value.dim() == 2):
            assert not added.any(), key
            continue
        units = "hidden" if output else role.into
        dim = 0 if not output and role.transposed else 1
        axis = growth._axis(units, None if layer is None else growth.layers[layer])
        copies = added.narrow(dim, axis.old, len(axis.source) - axis.old)
        assert (copies != 0).float().mean() > 0.99, key
        first = added.narrow(dim, 0, axis.old)
        if preserve == "exact":
            sums = torch.zeros_like(first).index_add_(dim, axis.source, added)
            torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-6)
        else:
            assert not first.any(), key
        found.append(copies.flatten())
    everything = torch.cat(found)
    assert float(everything.std()) == pytest.approx(0.01, rel=0.05)
    assert float(everything.mean()) == pytest.approx(0, abs=5e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_new_layers_learn(name):
    """Their outputs begin at zero and get a gradient."""
    model = model_of(name)
    grown = grow(model, GrowConfig(layers=3, preserve="exact"))
    ids = torch.arange(3, 15)[None]
    grown(input_ids=ids, labels=ids).loss.backward()
    silent = [p for n, p in grown.named_parameters() if p.dim() == 2 and not p.any()]
    assert len(silent) == 2
    assert all(p.grad.abs().max() > 0 for p in silent)


# --- what comes out is a model like any other ---


@pytest.mark.covering
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_grown_model_is_saved_and_loaded_as_any_other(tmp_path, name, tied):
    model = model_of(name, tie_word_embeddings=tied)
    grown = grow(model, GrowConfig(**wider(model, 3), layers=3, preserve="exact"))
    grown.save_pretrained(tmp_path)
    factory = AutoModelForMaskedLM if name in POST_NORM else AutoModelForCausalLM
    again, info = factory.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(again.eval()), logits_of(grown))
    shape, old = Shape.of(again.config), Shape.of(model.config)
    assert shape == Shape(3, *(3 * value for value in old[1:]))
    embeddings, output = again.get_input_embeddings(), again.get_output_embeddings()
    assert (embeddings.weight is output.weight) is tied
    SplitLanguageModel(again, causal=name not in POST_NORM)


def test_layers_keep_their_kind_of_attention():
    model = model_of("qwen2")
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    grown = grow(model, GrowConfig(layers=5, copy="last"))
    assert grown.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 3


def test_the_smaller_model_stays_as_it_is():
    model = model_of("gpt2", attn_implementation="eager").to(torch.bfloat16).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    grown = grow(model, GrowConfig(hidden_size=12, layers=3, noise_std=0.1, preserve="exact"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert grown.dtype == torch.bfloat16
    assert grown.training
    assert grown.config._attn_implementation == "eager"
    assert grown.generation_config.eos_token_id == model.generation_config.eos_token_id


# --- shapes and refusals ---


OLD = Shape(layers=4, hidden_size=64, heads=4, key_value_heads=2, intermediate_size=100)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, OLD),
        ({"layers": 6}, OLD._replace(layers=6)),
        ({"intermediate_size": 101}, OLD._replace(intermediate_size=101)),
        ({"hidden_size": 96}, Shape(4, 96, 6, 3, 150)),
        ({"heads": 6}, Shape(4, 96, 6, 3, 150)),
        ({"heads": 8, "hidden_size": 128, "intermediate_size": 100}, Shape(4, 128, 8, 4, 100)),
    ],
)
def test_what_is_not_asked_for_grows_in_proportion(asked, expected):
    assert grown_shape(OLD, GrowConfig(**asked)) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": 3}, "layers would shrink from 4 to 3"),
        ({"hidden_size": 32}, "hidden_size would shrink from 64 to 32"),
        ({"heads": 2}, "hidden_size would shrink"),
        ({"intermediate_size": 99}, "intermediate_size would shrink from 100 to 99"),
        ({"hidden_size": 128, "intermediate_size": 99}, "intermediate_size would shrink"),
        ({"hidden_size": 72}, "hidden_size 72 with 4 heads.*16 hidden dimensions per head"),
        ({"hidden_size": 96, "heads": 8}, "hidden_size 96 with 8 heads"),
        ({"heads": 8, "hidden_size": 64}, "hidden_size 64 with 8 heads"),
        ({"heads": 5}, "one key/value head serves 2 of them"),
    ],
)
def test_shapes_that_are_no_growth_are_refused(asked, message):
    with pytest.raises(InputError, match=f"student.grow: .*{message}"):
        grown_shape(OLD, GrowConfig(**asked))


def test_other_models_are_refused():
    electra = transformers.ElectraForMaskedLM(
        transformers.ElectraConfig(**COMMON, embedding_size=8)
    )
    with pytest.raises(InputError, match=r"electra.*cannot be grown.*bert, roberta, gpt2, llama"):
        grow(electra, GrowConfig(layers=3))
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx: True cannot be grown"):
        grow(model_of("gpt2", scale_attn_by_inverse_layer_idx=True), GrowConfig(layers=3))
    strange = model_of("llama")
    strange.model.layers[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"parameters that llama models.*layers\.0\.adapter"):
        grow(strange, GrowConfig(layers=3))
