"""The table of bad input, by theme."""

from testlib.bad_input import caches, configuration, encoders, environment, labels, models, text

THEMES = {
    "run files, settings and options": configuration.ROWS,
    "text": text.ROWS,
    "labels": labels.ROWS,
    "models and tokenizers": models.ROWS,
    "sentence encoders": encoders.ROWS,
    "caches and runs": caches.ROWS,
    "places and machines": environment.ROWS,
}
