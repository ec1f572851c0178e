"""``kinetok`` and ``python -m kinetok``: the command line, from its first import on."""

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
    main()
