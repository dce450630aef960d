"""Bad models and tokenizers."""

import json
from typing import Any

from testlib.bad_input.row import Bad, Place

NEW = "cache-teachers run.yaml --set cache.path=new"
TRAIN = "train-student run.yaml --out new"
ASK = "evaluate expert --test dev.jsonl"
COPY = "Copy or download it again"
SAVED = "save_pretrained"


def _config(**values: object):
    return lambda place: place.change("expert/config.json", **values)


def _written(name: str, content: str):
    return lambda place: place.write(name, content)


def _gone(*names: str):
    return lambda place: [place.drop(name) for name in names]


def _pickled(place: Place) -> None:
    place.drop("expert/model.safetensors")
    place.write("expert/pytorch_model.bin", b"\x80\x02}q\x00.")


def _with_nan(name: str):
    def spoil(place: Place) -> None:
        from safetensors.torch import load_file, save_file

        file = place / name / "model.safetensors"
        weights: Any = load_file(file)
        weights["bert.embeddings.word_embeddings.weight"][3:5] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})

    return spoil


def _experts(place: Place) -> None:
    (place / "experts/topics").mkdir(parents=True)


def _index(place: Place) -> None:
    place.drop("expert/model.safetensors")
    names = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    place.write("expert/model.safetensors.index.json", json.dumps(names))


FOLDERS = (
    Bad("no such teacher", f"{NEW} --set teachers.0.model=nowhere", "teacher 'lm': model 'nowhere'",
        "is not a local directory and cannot be loaded from the hub", SAVED),
    Bad("a mistyped folder of a teacher", f"{NEW} --set teachers.0.model=experts/topic",
        "teacher 'lm': model 'experts/topic': no such directory",
        "not a hub id, because a folder experts is here", "did you mean 'experts/topics'?",
        _experts),
    Bad("a mistyped folder of a teacher to plan",
        "plan run.yaml --set cache.path=new --set teachers.0.model=experts/topic",
        "teacher 'lm': model 'experts/topic': no such directory",
        "not a hub id, because a folder experts is here", "did you mean 'experts/topics'?",
        _experts),
    Bad("a mistyped folder of a teacher to check",
        "doctor run.yaml --set teachers.0.model=experts/topic",
        "teacher 'lm': model 'experts/topic': no such directory",
        "not a hub id, because a folder experts is here", "did you mean 'experts/topics'?",
        _experts),
    Bad("a mistyped path of a student to check", "doctor run.yaml --set student.model=./lmm",
        "student: model './lmm': no such directory", "not a hub id", "did you mean 'lm'?"),
    Bad("no such student", f"{TRAIN} --set student.model=nowhere", "model 'nowhere'",
        "is not a local directory and cannot be loaded from the hub", SAVED),
    Bad("no such model to fine-tune",
        "finetune nowhere --train train.jsonl --dev dev.jsonl --out new", "model 'nowhere'",
        "is not a local directory and cannot be loaded from the hub", SAVED),
    Bad("no such student to export", "export nowhere --out new", "model 'nowhere'",
        "is not a local directory and cannot be loaded from the hub", SAVED),
    Bad("a file as the model",
        "evaluate run.yaml --test dev.jsonl", "model 'run.yaml'", "is a file",
        SAVED),
    Bad("a model without config.json", NEW, "teacher 'lm': lm", "it has no config.json", SAVED,
        _gone("lm/config.json")),
    Bad("a folder that is no model", "generate tokens --prompts text.jsonl --out new", "tokens",
        "it has no config.json", SAVED),
    Bad("push of a folder that is neither a cache nor a model",
        "push tokens me/x", "tokens", "it is no cache",
        "give a cache, or the folder"),
    Bad("push of a missing folder", "push nowhere me/x", "'nowhere'", "no such folder",
        "give that of a cache or a model"),
    Bad("push to a repository without an owner", "push expert x", "'x'", "is no repository",
        "give OWNER/NAME"),
    Bad("push of a model with an option for caches", "push expert me/x --with-text", "--with-text",
        "only for a cache, and expert is none", "Leave it out"),
    Bad("push without a network", "push expert me/x", "HF_HUB_OFFLINE is set",
        "nothing can be sent", "Unset it"),
    Bad("a model on a hub without a network",
        "generate hf://me/x --prompts text.jsonl --out new", "hf://me/x",
        "HF_HUB_OFFLINE is set", "Unset it"),
    Bad("a truncated config.json", ASK, "expert/config.json", "is not JSON", SAVED,
        _written("expert/config.json", "{")),
    Bad("a config.json that is a list", ASK, "expert/config.json", "holds list, not an object",
        SAVED, _written("expert/config.json", "[]")),
    Bad("a config.json without model_type", ASK, "expert/config.json", "has no model_type", SAVED,
        _written("expert/config.json", "{}")),
    Bad("an unknown architecture", ASK, "model type `bertt`", "does not recognize this",
        "your version of Transformers is out of date", _config(model_type="bertt")),
    Bad("a model that needs its own code", NEW, "lm/config.json", "remote code is off",
        "a model whose code transformers has", lambda place: place.change(
            "lm/config.json", model_type="own", auto_map={"AutoConfig": "c.C"})),
    Bad("a size that is not a number", ASK, "'hidden_size'", "expected int, got str", "",
        _config(hidden_size="wide")),
    Bad("heads that do not divide the hidden size",
        ASK, "the number of attention heads (5)",
        "is not a multiple of", "", _config(num_attention_heads=5)),
    Bad("an unknown activation", ASK, "'gelux'", "transformers knows no activation",
        "hidden_act in its config.json", _config(hidden_act="gelux")),
)  # fmt: skip

WEIGHTS = (
    Bad("no weights", ASK, "expert", "has no *.safetensors weights", SAVED,
        _gone("expert/model.safetensors")),
    Bad("pickled weights", ASK, "expert", "Pickled weights are not loaded", SAVED, _pickled),
    Bad("truncated weights of a teacher", NEW, "lm/model.safetensors",
        "it has 46,348 bytes, but its header announces 92,696", COPY,
        lambda place: place.cut("lm/model.safetensors")),
    Bad("truncated weights of a student", TRAIN, "lm/model.safetensors",
        "is damaged or truncated", COPY, lambda place: place.cut("lm/model.safetensors")),
    Bad("weights of 0 bytes", ASK, "expert/model.safetensors", "hold no whole safetensors header",
        COPY, _written("expert/model.safetensors", "")),
    Bad("a git-lfs pointer", ASK, "expert/model.safetensors", "is a git-lfs pointer",
        "Run `git lfs pull` in expert",
        _written("expert/model.safetensors", "version https://git-lfs.github.com/spec/v1\n")),
    Bad("a missing shard of the weights", ASK, "expert lacks model-00001-of-00002.safetensors",
        "which model.safetensors.index.json names", "Copy or download the missing files", _index),
    Bad("weights whose shapes differ from config.json",
        ASK, "bert.embeddings", "by its config.json",
        "Give the config.json that the weights were saved with", _config(hidden_size=64),
        loads=True),
    Bad("a vocabulary smaller than the weights'", NEW, "word_embeddings.weight is [168, 32]",
        "by its config.json", "Give the config.json that the weights were saved with",
        lambda place: place.change("lm/config.json", vocab_size=50)),
    Bad("a teacher with NaN", NEW, "lm: 64 of the 5,376 values of bert.embeddings",
        "are NaN", "Give a sound checkpoint", _with_nan("lm"), kept="new", loads=True),
    Bad("a student with NaN", TRAIN, "lm: 64 of the 5,376 values of bert.embeddings",
        "are NaN", "Give a sound checkpoint", _with_nan("lm"),
        loads=True),
    Bad("an expert with NaN", "predict expert --text text.jsonl --out new.jsonl",
        "expert: 64 of the 5,376 values", "are NaN", "Give a sound checkpoint",
        _with_nan("expert"), loads=True),
    Bad("a model to fine-tune with NaN",
        "finetune lm --train train.jsonl --dev dev.jsonl --out new",
        "lm: 64 of the 5,376 values", "are NaN", "Give a sound checkpoint", _with_nan("lm"),
        loads=True),
    Bad("a masked LM as causal LM", f"{NEW} --set teachers.0.task=causal_lm", "teacher 'lm'",
        "it is not a causal LM", "say `task: masked_lm`"),
    Bad("a language model as classifier", f"{NEW} --set teachers.1.model=lm",
        "has no weights for", "they would be random", "Is the teacher's `task` right"),
    Bad("a classifier as language model", f"{NEW} --set teachers.0.model=expert", "teacher 'lm'",
        "has no output over the vocabulary", "say `task: sequence_classification`"),
    Bad("a classifier as regression", f"{NEW} --set teachers.1.task=regression",
        "teacher 'expert'", "is a classifier of 2 classes", "say `task: sequence_classification`"),
    Bad("sequences longer than a teacher accepts", f"{NEW} --set corpus.sequence_length=512",
        "teacher 'lm'", "takes at most 256 tokens", "corpus.sequence_length is 512"),
    Bad("a student's truncated heads file",
        "export student --out new", "student/heads.safetensors",
        "is damaged or truncated", COPY, lambda place: place.cut("student/heads.safetensors")),
    Bad("a student's truncated record", "export student --out new", "rekindle_student.json",
        "is not the directory of a student", "`pipeline train-student` writes such",
        _written("student/rekindle_student.json", "{")),
    Bad("export of an unknown head", "export student --head xx --out new", "not 'xx'",
        "has the task heads expert"),
    Bad("merge-adapter on a whole model",
        "merge-adapter student --out new", "'student' is a whole model",
        "not an adapter", "it can be used wherever a model is needed"),
    Bad("growth to a size not divisible by heads",
        f"{TRAIN} --set student.grow.hidden_size=33",
        "hidden_size 33 with 2 heads", "whole heads are added", "Give a multiple of it",
        loads=True),
)  # fmt: skip


def _without_mask(place: Place) -> None:
    place.change("tokens/tokenizer_config.json", mask_token=None)


def _of_bytes(place: Place) -> None:
    """Make a tokenizer of another kind that shares some of the corpus's tokens."""
    values = json.loads((place / "tokens/tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    swapped = {"the": vocabulary["water"], "water": vocabulary["the"]}
    values["model"]["vocab"] = vocabulary | swapped
    place.write("lm/tokenizer.json", json.dumps(values))


TOKENIZERS = (
    Bad("no such tokenizer", f"{NEW} --set corpus.tokenizer=nowhere", "tokenizer 'nowhere'",
        "cannot be loaded", "give a directory with the tokenizer's files"),
    Bad("a truncated tokenizer.json", NEW, "tokens/tokenizer.json", "is not JSON",
        "give the file as it was saved", _written("tokens/tokenizer.json", "{")),
    Bad("a tokenizer.json that is no tokenizer", ASK, "expert/tokenizer.json",
        "is not a tokenizer of the tokenizers library", "give the file as it was saved",
        _written("expert/tokenizer.json", '{"model": 3}')),
    Bad("an expert without a tokenizer", ASK, "expert", "has no tokenizer files",
        "it must hold tokenizer.json",
        _gone("expert/tokenizer.json", "expert/tokenizer_config.json")),
    Bad("no mask token", NEW, "tokens", "has no mask token", "Use a tokenizer with one",
        _without_mask),
    Bad("a teacher with another tokenizer", NEW, "id 163 is 'the' here",
        "has another tokenizer than the corpus", "corpus.tokenizer of this teacher", _of_bytes),
    Bad("a student with another tokenizer", TRAIN, "lm", "another tokenizer",
        "Use a student with the cache's tokenizer", _of_bytes),
)  # fmt: skip

ROWS = FOLDERS + WEIGHTS + TOKENIZERS
