"""Names that other libraries use for our keys, so that a message can suggest the right one."""

from collections.abc import Collection, Mapping

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("lr", "max_lr", "peak_lr"),
    "weight_decay": ("wd", "decay", "l2"),
    "batch_size": ("bs", "batch", "batchsize", "train_batch_size", "per_device_train_batch_size"),
    "batch_sequences": ("bs", "batch", "batch_size", "train_batch_size", "global_batch_size"),
    "epochs": ("epoch", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs"),
    "steps": ("num_steps", "n_steps", "max_steps", "total_steps", "train_steps", "iterations"),
    "max_length": ("max_len", "maxlen", "max_seq_length", "max_seq_len", "seq_len", "seq_length"),
    "sequence_length": ("seq_len", "seq_length", "max_seq_length", "max_length", "block_size"),
    "warmup": ("warmup_ratio", "warmup_fraction", "warmup_steps"),
    "warmup_steps": ("warmup", "num_warmup_steps"),
    "schedule": ("scheduler", "lr_schedule", "lr_scheduler", "lr_scheduler_type"),
    "patience": ("early_stopping", "early_stopping_patience"),
    "max_grad_norm": ("clip", "clip_norm", "grad_clip", "gradient_clipping"),
    "precision": ("dtype", "torch_dtype", "amp", "fp16", "bf16", "mixed_precision"),
    "evaluate_every": ("eval_every", "eval_steps", "eval_interval"),
    "checkpoint_every": ("save_every", "save_steps", "save_interval"),
    "temperature": ("temp", "tau"),
    "temperatures": ("temps", "taus"),
    "probability": ("mlm_probability", "mask_probability", "mask_prob"),
    "text_field": ("text_column", "text_columns", "text_fields", "text_key"),
    "pair_field": ("text_pair", "pair_column", "second_field", "text_field_b"),
    "without": ("exclude", "decontaminate", "test_files"),
    "label_field": ("label_column", "label_columns", "label_key", "target_column"),
    "model": ("model_name", "model_name_or_path", "checkpoint", "base_model"),
}


def keys_with_alias(name: str, known: Collection[str]) -> list[str]:
    """Return the ``known`` keys that other libraries call ``name``."""
    plain = name.casefold().replace("-", "_")
    return [key for key in known if plain == key or plain in _ALIASES.get(key, ())]
