"""Folders as sentence-transformers writes them, by hand: its files, without the package."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXTS = ["The old river runs under the city.", "Engines!", "a", "It was found, and it was kept."]


def encoder_folder(
    out: Path,
    model: Path,
    pooling: dict[str, Any],
    after: Sequence[tuple[str, dict[str, Any], dict[str, Any]]] = (),
    transformer: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write a folder around the ``model``: modules, pooling's settings, the modules ``after`` it
    (class, settings, tensors), what is said of the transformer, and of the whole.
    """
    from safetensors.torch import save_file

    shutil.copytree(model, out)
    listed = [("Transformer", ""), ("Pooling", "1_Pooling")]
    listed += [(kind, f"{n}_{kind}") for n, (kind, _, _) in enumerate(after, 2)]
    package = "sentence_transformers.models"
    modules = [
        {"idx": n, "name": f"{n}", "path": path, "type": f"{package}.{kind}"}
        for n, (kind, path) in enumerate(listed)
    ]
    (out / "modules.json").write_text(json.dumps(modules))
    settings = [("1_Pooling", pooling, {})]
    settings += [(f"{n}_{kind}", *rest) for n, (kind, *rest) in enumerate(after, 2)]
    for folder, values, tensors in settings:
        (out / folder).mkdir()
        (out / folder / "config.json").write_text(json.dumps(values))
        if tensors:
            save_file(tensors, out / folder / "model.safetensors")
    (out / "sentence_bert_config.json").write_text(json.dumps(transformer or {}))
    (out / "config_sentence_transformers.json").write_text(json.dumps(about or {}))
    return out
