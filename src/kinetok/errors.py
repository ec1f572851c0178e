"""The one error that means "the input was wrong", as opposed to "kinetok is wrong"."""


class UserError(ValueError):
    """Input that kinetok cannot use. The message says what was expected, what came, and what to do.

    The command line prints it as one line and exits with 2; every other exception is a bug and keeps its traceback.
    """


def missing_package(package: str, extra: str, purpose: str) -> UserError:
    """The error for an optional package that ``purpose`` needs and that is not installed."""
    return UserError(f"{purpose} needs the package {package}, which is not installed: pip install 'kinetok[{extra}]'")
