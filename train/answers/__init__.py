"""Ask finished models: labels of new texts, scores on labelled ones, perplexity on plain ones."""
