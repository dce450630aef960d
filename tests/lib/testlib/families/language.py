"""Language models of transformers' families, with 99 words and random weights, on the CPU."""

import torch
import transformers

SMALL = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.5,
}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
OWN = {  # by family: what its configuration calls otherwise, or wants besides
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8},
    "deberta": {"pooler_hidden_size": 16} | RELATIVE,
    "deberta-v2": {"pooler_hidden_size": 16} | RELATIVE,
    "modernbert": IDS | {"cls_token_id": 1, "sep_token_id": 2},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 8},
    "longformer": {"attention_window": 4},
    "squeezebert": {"embedding_size": 16}
    | {f"{part}_groups": 2 for part in ("q", "k", "v", "intermediate", "output")},
    "gpt2": GPT,
    "llama": GROUPED,
    "gemma2": GROUPED | IDS,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bart": {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    | {"d_model": 16},
    "bert causal": {"is_decoder": True},
}
CAUSAL = ("gpt2", "llama", "gpt_neox", "gemma2", "opt", "bart", "bert causal")


def language_model(family: str) -> transformers.PreTrainedModel:
    """A masked language model, or a causal one of the families that are CAUSAL."""
    common = {"vocab_size": 99} if family == "bart" else SMALL
    config = transformers.AutoConfig.for_model(
        family.partition(" ")[0], **(common | OWN.get(family, {}))
    )
    auto = "AutoModelForCausalLM" if family in CAUSAL else "AutoModelForMaskedLM"
    torch.manual_seed(0)
    made = getattr(transformers, auto).from_config(config, dtype=torch.float32)
    return made.eval()
