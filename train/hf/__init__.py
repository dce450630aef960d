"""A cache for trainers of one's own: data sets, collator, loss, and a mixin for HF's Trainer."""
