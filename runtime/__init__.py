"""Text to motion: the KV cache, sampling, and the engine that ties the models together."""

if __name__ != "kinetok.runtime":
    raise ImportError("import kinetok.runtime, not the bare folder runtime: an operator would be registered twice")
