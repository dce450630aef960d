"""Use a cache in your own trainer: data sets, collator, loss, and a mixin for HF's Trainer."""
