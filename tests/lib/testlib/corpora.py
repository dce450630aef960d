"""Real corpora and tokenizers that some tests use if present."""

import os
from pathlib import Path

SHARED = Path(os.environ.get("REKINDLE_SHARED", Path(__file__).parents[4] / "shared" / "data"))
