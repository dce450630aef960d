"""The extra `sentencepiece` is installed, with what it is read by."""


def test_its_models_can_be_trained_and_read(tmp_path):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("the old river runs under the new city\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "unigram"), vocab_size=20, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "unigram.model"))
    assert model.decode(model.encode("the river")) == "the river"
