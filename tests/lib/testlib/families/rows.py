"""The grid's rows: each family with its characteristic settings, in small."""

from typing import Any

from testlib.families.kinds import EXPERT, LEFT_OUT, ROWS, STUDENT, TEACHER, Family

PADDED = {"pad_token_id": 1}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
RELATIVE |= {"pooler_hidden_size": 16}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
ROUTED |= {"n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
GRANITE = {"num_key_value_heads": 1, "logits_scaling": 7.0, "embedding_multiplier": 3.0}
GRANITE |= {"residual_multiplier": 0.5, "attention_multiplier": 0.2}
SIDES = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
}
GEMMA = {"query_pre_attn_scalar": 8, "pad_token_id": 1}
GEMMA4 = GROUPED | PADDED | {"global_head_dim": 8, "hidden_size_per_layer_input": 8}
GEMMA4 |= {"vocab_size_per_layer_input": ROWS, "num_kv_shared_layers": 0}
GEMMA4 |= {"final_logit_softcapping": 1.0}
GEMMA4_EYES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA4_EYES |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16}
EYES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"intermediate_size": 16, "image_size": 28, "patch_size": 14}
MAMBA = {"state_size": 4, "expand": 2}
NO_CLASS = "has no AutoModelForSequenceClassification of the family"
NO_HEAD = "which has no output over the vocabulary"
RANDOM = "they would be random"
NOT_SPLIT = "cannot be split into a body and an output matrix"
PADDING = "lets padding, which the attention mask hides, change the states"
TWO_PARTS = "is an encoder and a decoder"
OF_FAMILY = ("refused", "saved_as", "moved_by_padding", "fresh_head", "quick", "note")


def _row(task: str, name: str, kind: str = "", **own: Any) -> Family:
    about = {key: own.pop(key) for key in OF_FAMILY if key in own}
    return Family(name, kind or name.lower(), task, own, **about)


def masked(name: str, kind: str = "", **own: Any) -> Family:
    return _row("masked_lm", name, kind, **own)


def causal(name: str, kind: str = "", **own: Any) -> Family:
    return _row("causal_lm", name, kind, **own)


def no(*roles: str, why: str) -> dict[str, dict[str, str]]:
    return {"refused": dict.fromkeys(roles, why)}


MOVED = {"moved_by_padding": True, "refused": {STUDENT: PADDING}}

FAMILIES = (
    masked("BERT", quick=True),
    masked("BERT", note="untied head", tie_word_embeddings=False),
    masked(
        "BERT",
        note="body alone: embedders such as MiniLM, E5, BGE",
        saved_as="AutoModel",
        fresh_head=True,
        quick=True,
        refused={TEACHER: NO_HEAD, EXPERT: RANDOM},
    ),
    masked("RoBERTa", quick=True),
    masked("XLM-RoBERTa"),
    masked("CamemBERT"),
    masked("DeBERTa", **RELATIVE),
    masked("DeBERTa", note="`legacy: false`", **RELATIVE, legacy=False),
    masked("DeBERTa-v3", "deberta-v2", **RELATIVE),
    masked(
        "DeBERTa-v3", "deberta-v2", note="`legacy: false`", **RELATIVE, legacy=False, quick=True
    ),
    masked("ELECTRA", note="generator", embedding_size=8),
    masked(
        "ELECTRA",
        note="discriminator, as it is published",
        embedding_size=8,
        saved_as="AutoModelForPreTraining",
        fresh_head=True,
        quick=True,
        refused={TEACHER: RANDOM},
    ),
    masked("ALBERT", embedding_size=8, quick=True),
    masked("MPNet", quick=True),
    masked("ModernBERT", local_attention=8, global_attn_every_n_layers=2, quick=True),
    masked("EuroBERT"),
    masked("DistilBERT", dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    masked("RemBERT", input_embedding_size=8, output_embedding_size=12),
    masked("ERNIE"),
    masked("I-BERT", "ibert"),
    masked("Megatron-BERT"),
    masked("data2vec", "data2vec-text"),
    masked("X-MOD", "xmod", default_language="en_XX"),
    masked("RoFormer", embedding_size=8),
    masked("Nomic-BERT", "nomic_bert", head_dim=8),
    masked("GTE", "gte"),
    masked("Jina-embeddings-v3", "jina_embeddings_v3"),
    masked("ESM-2", "esm", token_dropout=False, **no(TEACHER, STUDENT, why=NOT_SPLIT)),
    masked("ESM-C", "esmc", num_key_value_heads=2, head_dim=8),
    masked(
        "SqueezeBERT",
        embedding_size=16,
        **{f"{part}_groups": 2 for part in ("q", "k", "v", "intermediate", "output")},
    ),
    masked("Longformer", attention_window=4),
    masked("BigBird", "big_bird"),
    masked("LUKE", entity_vocab_size=20, entity_emb_size=8),
    masked(
        "MobileBERT",
        embedding_size=8,
        true_hidden_size=16,
        intra_bottleneck_size=16,
        moved_by_padding=True,
        refused={TEACHER: NOT_SPLIT, STUDENT: PADDING},
    ),
    masked("ConvBERT", embedding_size=16, conv_kernel_size=3, **MOVED),
    masked("FNet", **MOVED),
    masked("Nystromformer", num_landmarks=8, segment_means_seq_len=8, conv_kernel_size=3, **MOVED),
    masked("YOSO", **MOVED),
    masked(
        "Funnel",
        num_hidden_layers=LEFT_OUT,
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=24,
        block_sizes=[1, 1],
        moved_by_padding=True,
        refused={TEACHER: NOT_SPLIT, STUDENT: PADDING},
    ),
    masked("XLM", **XLM),
    masked("FlauBERT", **XLM),
    masked("UltraBERT", **GROUPED, **WINDOWS, prediction_head_size=16),
    masked(
        "T5",
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=1,
        saved_as="AutoModelForSeq2SeqLM",
        **no(TEACHER, STUDENT, why=TWO_PARTS),
    ),
    masked(
        "BART",
        d_model=16,
        **SIDES,
        decoder_start_token_id=2,
        saved_as="AutoModelForSeq2SeqLM",
        **no(TEACHER, STUDENT, why=TWO_PARTS),
    ),
    causal("GPT-2", "gpt2", **GPT, quick=True),
    causal(
        "GPT-Neo",
        "gpt_neo",
        num_layers=2,
        num_heads=2,
        window_size=4,
        attention_types=[[["global", "local"], 1]],
    ),
    causal("GPT-NeoX", "gpt_neox"),
    causal("GPT-J", "gptj", **GPT, rotary_dim=4),
    causal("GPT-BigCode", "gpt_bigcode", **GPT),
    causal("CodeGen", **GPT, rotary_dim=4, **no(EXPERT, why=NO_CLASS)),
    causal("GPT", "openai-gpt", **GPT),
    causal("CTRL", **GPT, dff=24),
    causal("OPT", ffn_dim=24, word_embed_proj_dim=16, **PADDED),
    causal(
        "OPT",
        note="projected, as OPT-350m",
        ffn_dim=24,
        word_embed_proj_dim=8,
        **PADDED,
        do_layer_norm_before=False,
    ),
    causal("BLOOM", n_head=2, n_layer=2),
    causal("MPT", d_model=16, n_heads=2, n_layers=2, max_seq_len=24),
    causal("Falcon", ffn_hidden_size=24),
    causal("Falcon", note="ALiBi", ffn_hidden_size=24, alibi=True),
    causal("Llama", **GROUPED),
    causal("Llama", note="tied head", **GROUPED, tie_word_embeddings=True),
    causal(
        "Llama",
        note="body alone: embedders such as E5-Mistral",
        **GROUPED,
        saved_as="AutoModel",
        refused={TEACHER: NO_HEAD, STUDENT: NO_HEAD, EXPERT: RANDOM},
    ),
    causal("Mistral", **GROUPED, sliding_window=4),
    causal("Ministral", **GROUPED, **WINDOWS),
    causal("Ministral 3", "ministral3", **GROUPED),
    causal("Mixtral", **GROUPED, **EXPERTS),
    causal("Qwen2", **GROUPED, quick=True),
    causal("Qwen2-MoE", "qwen2_moe", **GROUPED, **EXPERTS),
    causal("Qwen3", **GROUPED),
    causal("Qwen3-MoE", "qwen3_moe", **GROUPED, **EXPERTS, quick=True),
    causal("Qwen3-Next", "qwen3_next", **GROUPED, **EXPERTS, **LINEAR),
    causal("Qwen3.5", "qwen3_5_text", **GROUPED, **LINEAR),
    causal("Gemma", **GROUPED, **PADDED),
    causal(
        "Gemma 2",
        "gemma2",
        **GROUPED,
        **GEMMA,
        **WINDOWS,
        final_logit_softcapping=1.0,
        attn_logit_softcapping=2.0,
        quick=True,
    ),
    causal("Gemma 3", "gemma3_text", note="text", **GROUPED, **GEMMA, **WINDOWS),
    causal(
        "Gemma 3",
        "gemma3",
        text_config=GROUPED | GEMMA | WINDOWS,
        vision_config=EYES,
        mm_tokens_per_image=4,
        boi_token_index=90,
        eoi_token_index=91,
        image_token_index=92,
    ),
    causal("Phi", partial_rotary_factor=0.5),
    causal("Phi-3", "phi3", num_key_value_heads=1, **PADDED, original_max_position_embeddings=26),
    causal("Phi-3.5-MoE", "phimoe", **GROUPED, **EXPERTS),
    causal("OLMo", num_key_value_heads=1, clip_qkv=1.0, **PADDED),
    causal("OLMo2", num_key_value_heads=1, **PADDED),
    causal("OLMo3", num_key_value_heads=1, **PADDED, **WINDOWS),
    causal("OLMoE", num_key_value_heads=1, **PADDED, **EXPERTS, **no(EXPERT, why=NO_CLASS)),
    causal("SmolLM3", num_key_value_heads=1, **PADDED, no_rope_layers=[1, 0]),
    causal(
        "Mamba", **MAMBA, time_step_rank=4, pad_token_id=0, quick=True, **no(EXPERT, why=NO_CLASS)
    ),
    causal(
        "Mamba-2",
        "mamba2",
        **MAMBA,
        num_heads=4,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
        **PADDED,
        **no(EXPERT, why=NO_CLASS),
    ),
    causal(
        "Falcon-Mamba",
        "falcon_mamba",
        **MAMBA,
        time_step_rank=4,
        pad_token_id=0,
        **no(EXPERT, why=NO_CLASS),
    ),
    causal("GPT-OSS", "gpt_oss", **GROUPED, **EXPERTS, **WINDOWS),
    causal("Granite", **GRANITE, **no(EXPERT, why=NO_CLASS)),
    causal("Granite-MoE", "granitemoe", **GRANITE, **EXPERTS, **no(EXPERT, why=NO_CLASS)),
    causal(
        "Cohere",
        num_key_value_heads=1,
        logit_scale=0.3,
        **PADDED,
        quick=True,
        **no(EXPERT, why=NO_CLASS),
    ),
    causal(
        "Cohere2",
        num_key_value_heads=1,
        logit_scale=0.3,
        **PADDED,
        **WINDOWS,
        **no(EXPERT, why=NO_CLASS),
    ),
    causal("StarCoder2", num_key_value_heads=1, sliding_window=4),
    causal("StableLM", num_key_value_heads=1),
    causal("Helium", **GROUPED),
    causal("GLM", **GROUPED, **PADDED),
    causal("GLM-4", "glm4", **GROUPED, **PADDED),
    causal("DeepSeek-V2", "deepseek_v2", **LATENT, **ROUTED),
    causal("DeepSeek-V3", "deepseek_v3", **LATENT, **ROUTED),
    causal(
        "ModernBERT decoder",
        "modernbert-decoder",
        **PADDED,
        cls_token_id=0,
        sep_token_id=2,
        local_attention=8,
        global_attn_every_n_layers=2,
    ),
    causal("BERT", note="`is_decoder: true`", is_decoder=True, **PADDED),
    causal("BART", note="decoder alone", d_model=16, **SIDES, **PADDED, **no(EXPERT, why=RANDOM)),
    causal(
        "xLSTM",
        hidden_size=128,
        num_blocks=2,
        num_heads=2,
        output_logit_soft_cap=1.0,
        qk_dim_factor=1.0,
        v_dim_factor=1.0,
        **PADDED,
        **no(EXPERT, why=NO_CLASS),
    ),
    causal(
        "Gemma 4",
        "gemma4",
        text_config=GEMMA4,
        vision_config=GEMMA4_EYES,
        **no(EXPERT, why=NO_CLASS),
    ),
    causal("Nemotron", num_key_value_heads=1),
    causal("Persimmon"),
    causal("BioGPT", **PADDED),
    causal(
        "XGLM",
        d_model=16,
        ffn_dim=24,
        num_layers=2,
        attention_heads=2,
        **PADDED,
        **no(EXPERT, why=NO_CLASS),
    ),
    causal("Arcee", **GROUPED),
    causal("Apertus", **GROUPED, **no(EXPERT, why=NO_CLASS)),
    causal("Seed-OSS", "seed_oss", **GROUPED),
    causal("EXAONE 4", "exaone4", **GROUPED, sliding_window=4, sliding_window_pattern=2),
    causal("MiniCPM3", **LATENT, dim_model_base=8),
    causal("ERNIE 4.5", "ernie4_5", **GROUPED, **no(EXPERT, why=NO_CLASS)),
    causal("Hunyuan", "hunyuan_v1_dense", **GROUPED),
    causal(
        "LFM2",
        **GROUPED,
        layer_types=["conv", "full_attention"],
        block_multiple_of=8,
        block_ff_dim=24,
        **no(EXPERT, why=NO_CLASS),
    ),
    causal(
        "Jamba",
        num_key_value_heads=1,
        **EXPERTS,
        **PADDED,
        mamba_d_state=4,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    causal(
        "Bamba",
        **GROUPED,
        **PADDED,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        attn_layer_indices=[1],
        **no(EXPERT, why=NO_CLASS),
    ),
    causal(
        "RecurrentGemma",
        "recurrent_gemma",
        **GROUPED,
        **PADDED,
        num_hidden_layers=3,
        lru_width=16,
        logits_soft_cap=1.0,
        attention_window_size=8,
        **no(EXPERT, why=NO_CLASS),
    ),
    causal("RWKV", context_length=24, attention_hidden_size=16, **no(EXPERT, why=NO_CLASS)),
    causal("BitNet", num_key_value_heads=1, **no(EXPERT, why=NO_CLASS)),
    causal("nanochat", num_key_value_heads=2, **PADDED, **no(EXPERT, why=NO_CLASS)),
    causal("DiffLlama", num_key_value_heads=2, head_dim=8),
    causal(
        "HyperCLOVA X", "hyperclovax", **GROUPED, logits_scaling=0.7, **no(EXPERT, why=NO_CLASS)
    ),
    causal(
        "Falcon-H1",
        "falcon_h1",
        **GROUPED,
        **PADDED,
        lm_head_multiplier=0.3,
        mamba_n_heads=2,
        mamba_d_head=16,
        mamba_d_ssm=32,
        mamba_d_state=8,
        **no(EXPERT, why=NO_CLASS),
    ),
    causal(
        "XLNet",
        max_position_embeddings=LEFT_OUT,
        d_model=16,
        n_layer=2,
        n_head=2,
        d_inner=24,
        **PADDED,
        **no(TEACHER, STUDENT, why="sees both sides of a token"),
        moved_by_padding=True,
    ),
)
