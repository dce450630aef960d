"""The model that all arms of a cycle begin as, in its folder."""

import torch
from safetensors.torch import load_file

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.pipeline.job_functions import save_start
from rekindle.pipeline.processes.jobs import Report
from rekindle.train.model.files import load_language_model

SMALL = {"hidden_size": 16, "intermediate_size": 24}


def test_experts_and_students_begin_with_the_same_weights(tmp_path, make_model, wordpiece):
    """A masked LM has no pooler, and a classifier's head is another model's: no arm keeps either.

    What both begin with is, bit by bit, that of the model; its tokenizer gives the same ids.
    """
    for number, kind in enumerate(("AutoModel", "AutoModelForSequenceClassification")):
        model, out = make_model("bert", kind, wordpiece, 3, **SMALL), tmp_path / f"start-{number}"
        save_start(str(model), out, Report())
        own, saved = (
            {k.removeprefix("bert."): v for k, v in load_file(d / "model.safetensors").items()}
            for d in (model, out)
        )
        body = {k for k in own if k.startswith(("embeddings.", "encoder."))}
        assert body == {k for k in saved if not k.startswith("cls.")}
        assert all(torch.equal(own[key], saved[key]) for key in body)
        assert load_tokenizer(str(out)).digest == load_tokenizer(str(model)).digest
        student = load_language_model(model, "masked_lm").state_dict()
        assert all(torch.equal(saved[key], student[f"bert.{key}"]) for key in body)
