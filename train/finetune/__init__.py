"""Fine-tune a model on a labelled task, score it, and merge experts as baselines."""
