"""Bad sentence encoders, and bad settings of them."""

from typing import Any

from testlib.bad_input.row import Bad, Place

NEW = "cache-teachers run.yaml --set cache.path=new"
PLAIN = {"pooling": "mean", "normalise": True}
WIDTH = 32  # of lm's hidden states


def _asked(spoil=lambda place: None, **settings: Any):
    """The run file with lm as a sentence encoder of those settings."""

    def ask(place: Place) -> None:
        spoil(place)
        place.change(
            "run.yaml",
            teachers=[{"name": "e", "model": "lm", "task": "embedding", **settings}],
            student=...,
            train=...,
        )

    return ask


def _folder(*after: tuple[str, str], pooling: dict | None = None, **about: Any):
    """lm with modules.json: those ``after`` the transformer and pooling, as (type, path)."""

    def write(place: Place) -> None:
        lead = "sentence_transformers.models."
        listed = [(f"{lead}Transformer", ""), (f"{lead}Pooling", "1_Pooling"), *after]
        modules = [{"type": kind, "path": path} for kind, path in listed]
        place.write("lm/modules.json", "[]")
        place.rows("lm/modules.json", modules)
        place.rows("lm/1_Pooling/config.json", {"pooling_mode": "mean"} | (pooling or {}))
        place.rows("lm/config_sentence_transformers.json", about)

    return write


def _dense(place: Place) -> None:
    _folder(("sentence_transformers.models.Dense", "2_Dense"))(place)
    place.rows("lm/2_Dense/config.json", {"in_features": 8, "out_features": 4})
    place.write("lm/2_Dense/pytorch_model.bin", b"x")


ROWS = (
    Bad("a plain encoder without pooling", NEW, "'lm' is a plain encoder", "has no modules.json",
        "Set pooling", _asked()),
    Bad("an unknown pooling", NEW, "pooling 'last' is not known", "known are mean, cls, lasttoken",
        "", _asked(pooling="last", normalise=False)),
    Bad("a pooling that contradicts the folder", NEW, "modules say pooling: mean", "not cls",
        "Leave pooling out", _asked(_folder(), pooling="cls")),
    Bad("a normalise setting that contradicts the folder",
        NEW, "modules say normalise: false", "not true",
        "Leave normalise out", _asked(_folder(), normalise=True)),
    Bad("an unknown module", NEW, "module 2 is sentence_transformers.models.CNN",
        "Known are Transformer, Pooling", "give an encoder with only these",
        _asked(_folder(("sentence_transformers.models.CNN", "2_CNN")))),
    Bad("a module from another package", NEW, "module 2 is own.Step", "which is not run",
        "give an encoder with only these", _asked(_folder(("own.Step", "2_Step")))),
    Bad("modules in an unsupported order",
        NEW, "Transformer, Pooling, Pooling", "in this order", "",
        _asked(_folder(("sentence_transformers.models.Pooling", "1_Pooling")))),
    Bad("a module outside its folder", NEW, "module 2 is outside", "(../tokens)", "",
        _asked(_folder(("sentence_transformers.models.Normalize", "../tokens")))),
    Bad("a Dense module with pickled weights", NEW, "2_Dense has no model.safetensors",
        "pickled ones are not loaded", "Save the encoder again", _asked(_dense)),
    Bad("a pooling width unlike the model's",
        NEW, "takes states of 7 values", f"its model gives {WIDTH}",
        "save the folder again", _asked(_folder(pooling={"word_embedding_dimension": 7}))),
    Bad("a sparse encoder", NEW, "lm is a SparseEncoder", "gives no vector",
        "give the folder of a SentenceTransformer", _asked(_folder(model_type="SparseEncoder"))),
    Bad("pooling for a language model", f"{NEW} --set teachers.0.pooling=mean", "teachers.0",
        "pooling is for embedding teachers", ""),
    Bad("targets.kind for a sentence encoder", NEW, "teachers.0", "vectors are kept whole",
        "as targets.vectors says", _asked(**PLAIN, targets={"kind": "dense"})),
    Bad("targets.vectors for a classifier",
        f"{NEW} --set teachers.1.targets.vectors=int8", "teachers.1",
        "targets.vectors is for embedding teachers", ""),
    Bad("single texts to score an encoder", "evaluate lm --test dev.jsonl --set pooling=mean",
        "dev.jsonl", "how near two texts are", "name the two columns with --text-field",
        lambda place: place.rows("dev.jsonl", {"text": "a", "label": 1.5},
                                 {"text": "b", "label": 2.5})),
    Bad("an imported row without a vector",
        "import-targets cache new rows.jsonl --task embedding --provenance model=x",
        "rows.jsonl, row 1", "must have a vector", "a list of numbers",
        lambda place: place.rows("rows.jsonl", {"index": 0})),
)  # fmt: skip
