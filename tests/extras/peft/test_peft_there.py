"""The extra `peft` is installed."""


def test_a_model_gets_an_adapter(make_model, wordpiece):
    import peft
    import transformers

    path = make_model("bert", "AutoModelForMaskedLM", wordpiece)
    model = transformers.AutoModelForMaskedLM.from_pretrained(str(path))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    assert any("lora_A" in name for name, _ in model.named_parameters())
