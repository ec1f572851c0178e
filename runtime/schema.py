"""Rules for JSON from a stranger: each says what was expected where a value is something else."""

from collections.abc import Callable
from typing import Any

MANY = 1 << 24

Wrong = tuple[str, str]
Rule = Callable[[Any], Wrong | None]
"""Where in a value, and what was expected there; None where nothing is wrong."""


def _unless(fine: bool, expected: str) -> Wrong | None:
    return None if fine else ("", expected)


def _at(key: str, wrong: Wrong | None) -> Wrong | None:
    """What is wrong with an element, seen from its owner."""
    return wrong and (f"{key}.{wrong[0]}" if wrong[0] else key, wrong[1])


def rule(fine: Callable[[Any], bool], expected: str) -> Rule:
    return lambda value: _unless(fine(value), expected)


def whole(least: int = 0, most: int = MANY) -> Rule:
    return rule(lambda value: type(value) is int and least <= value <= most, f"a whole number, {least} to {most}")


def real(least: float = -1e9, most: float = 1e9) -> Rule:
    # NaN is in no range.
    return rule(
        lambda value: type(value) in (int, float) and least <= value <= most, f"a number, {least:g} to {most:g}"
    )


def text(*choices: str) -> Rule:
    expected = f"one of {', '.join(map(repr, choices))}" if choices else "text"
    return rule(lambda value: isinstance(value, str) and (not choices or value in choices), expected)


flag = rule(lambda value: isinstance(value, bool), "true or false")
anything = rule(lambda value: True, "anything")


def each(rule: Rule, count: int | None = None) -> Rule:
    """A list, of ``count`` elements."""

    def check(value: Any) -> Wrong | None:
        if not isinstance(value, list) or (count is not None and len(value) != count):
            return "", "a list" if count is None else f"a list of {count}"
        return next((_at(str(at), wrong) for at, one in enumerate(value) if (wrong := rule(one))), None)

    return check


def mapping(rule: Rule, name: Rule = anything) -> Rule:
    """An object of any keys."""

    def check(value: Any) -> Wrong | None:
        if not isinstance(value, dict):
            return "", "an object"
        found = ((key, name(key) or rule(one)) for key, one in value.items())
        return next((_at(key[:60], wrong) for key, wrong in found if wrong), None)

    return check


def fields(_optional: tuple[str, ...] = (), **rules: Rule) -> Rule:
    """An object with these keys and perhaps others."""

    def check(value: Any) -> Wrong | None:
        if not isinstance(value, dict):
            return "", "an object"
        if missing := next((key for key in rules if key not in value and key not in _optional), None):
            return missing, "there"
        return next((_at(key, wrong) for key in rules if key in value and (wrong := rules[key](value[key]))), None)

    return check


def either(rule: Rule) -> Rule:
    """Null, or as the rule says."""
    return lambda value: None if value is None else rule(value)
