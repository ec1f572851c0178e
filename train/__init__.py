"""Training of the tokenizer and the decoder."""

if __name__ != "kinetok.train":
    raise ImportError("import kinetok.train, not the bare folder train: an operator would be registered twice")
