"""Load pre-trained models and split a language model into its body and its head."""
