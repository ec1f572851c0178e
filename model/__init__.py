"""The tokenizer, the decoder, the text encoders, and the files they are loaded from."""

if __name__ != "kinetok.model":
    raise ImportError("import kinetok.model, not the bare folder model: an operator would be registered twice")
