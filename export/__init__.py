"""Export of models to other runtimes."""

if __name__ != "kinetok.export":
    raise ImportError("import kinetok.export, not the bare folder export: an operator would be registered twice")
