"""Rules name the place of the first thing that is wrong, and what was expected there."""

import pytest

from kinetok.runtime.schema import each, either, fields, flag, mapping, real, text, whole

RULE = fields(
    ("maybe",),
    size=whole(1, 9),
    share=real(0, 1),
    kind=text("a", "b"),
    maybe=flag,
    rows=each(fields(at=either(whole())), 2),
    named=mapping(text(), text("x", "y")),
)
GOOD = {"size": 3, "share": 0.5, "kind": "a", "rows": [{"at": None}, {"at": 7}], "named": {"x": "1"}, "more": object()}


def test_what_is_right_and_what_is_not_known_pass() -> None:
    assert RULE(GOOD) is None and RULE({**GOOD, "maybe": True, "share": 1}) is None


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"size": 0}, ("size", "a whole number, 1 to 9")),
        ({"size": True}, ("size", "a whole number, 1 to 9")),
        ({"size": 3.0}, ("size", "a whole number, 1 to 9")),
        ({"size": 10**400}, ("size", "a whole number, 1 to 9")),
        ({"share": float("nan")}, ("share", "a number, 0 to 1")),
        ({"share": float("inf")}, ("share", "a number, 0 to 1")),
        ({"share": False}, ("share", "a number, 0 to 1")),
        ({"kind": "c"}, ("kind", "one of 'a', 'b'")),
        ({"kind": ["a"]}, ("kind", "one of 'a', 'b'")),
        ({"maybe": None}, ("maybe", "true or false")),
        ({"rows": [{"at": 1}]}, ("rows", "a list of 2")),
        ({"rows": [{"at": 1}, {"at": -1}]}, ("rows.1.at", "a whole number, 0 to 16777216")),
        ({"rows": [{"at": 1}, {}]}, ("rows.1.at", "there")),
        ({"rows": [[], {}]}, ("rows.0", "an object")),
        ({"named": {"x": "1", "z": "2"}}, ("named.z", "one of 'x', 'y'")),
        ({"named": {"y": 1}}, ("named.y", "text")),
        ({"named": []}, ("named", "an object")),
    ],
)
def test_the_first_wrong_place_is_named(changes, wrong) -> None:
    assert RULE({**GOOD, **changes}) == wrong


def test_a_missing_key() -> None:
    assert RULE({}) == ("size", "there") and RULE([]) == ("", "an object")
