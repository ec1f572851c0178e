"""``kinetok`` and ``python -m kinetok``: the command line, from its first import on."""

import os
import sys


def main() -> None:
    """``kinetok.cli.main``; a Ctrl-C while that is imported, for half a second, ends like any later one."""
    try:
        from kinetok.cli import main as run
    except KeyboardInterrupt:
        print("kinetok: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    # python -m puts the current folder first. In a checkout the folder kernels there is then taken for a package that
    # transformers looks for, and anywhere else a stray file for one that we import.
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    main()
