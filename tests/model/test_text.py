"""Prompts: what is accepted, in which form, and how refusals read."""

import string
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.model.text import MAX_CHARACTERS, check_prompt, decode_prompt, read_prompts, text_encoder


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=st.characters(), max_size=60))
def test_a_prompt_is_normalised_once_or_refused_in_one_line(text):
    try:
        clean = check_prompt(text)
    except UserError as error:
        assert "\n" not in str(error)
        assert str(error).encode("utf-8").isascii()
    else:
        assert check_prompt(clean) == clean == " ".join(text.split()) != ""
        assert not {unicodedata.category(character) for character in clean} & {"Cc", "Cs"}
        assert decode_prompt(clean.encode("utf-8")) == clean


@pytest.mark.parametrize("text", ["", " ", "\t\r\n", "\u2003\u3000"])
def test_blank_prompts_are_refused(text):
    with pytest.raises(UserError, match="got an empty prompt"):
        check_prompt(text)


def test_the_length_limit_names_both_lengths():
    assert len(check_prompt("x" * MAX_CHARACTERS)) == MAX_CHARACTERS
    with pytest.raises(UserError, match="at most 10000 characters, got 100000"):
        check_prompt("x" * 100_000)


@pytest.mark.parametrize(("text", "code"), [("a\x00b", "0000"), ("a\x1bb", "001B"), ("\ud800 walks", "D800")])
def test_control_characters_and_lone_surrogates_are_named(text, code):
    with pytest.raises(UserError, match=f"U\\+{code}"):
        check_prompt(text)


def test_only_strings_are_prompts():
    with pytest.raises(UserError, match="got int"):
        check_prompt(3)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=40))
def test_bytes_are_utf8_or_refused(data):
    try:
        expected = str(data, "utf-8")
    except UnicodeDecodeError:
        with pytest.raises(UserError, match="expected UTF-8 text, got the byte 0x"):
            decode_prompt(data)
    else:
        assert decode_prompt(data) == expected


def test_a_prompt_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa person  walks\r\n\n  \t\nein Mensch läuft\n".encode())
    assert read_prompts(path) == ["a person walks", "ein Mensch läuft"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(string.ascii_letters + " ", max_size=12), min_size=1, max_size=8))
def test_a_prompt_file_gives_every_line_that_is_not_blank(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    expected = [" ".join(line.split()) for line in lines if line.strip()]
    if expected:
        assert read_prompts(path) == expected
    else:
        with pytest.raises(UserError, match="one prompt a line, got none"):
            read_prompts(path)


def test_a_bad_line_of_a_prompt_file_is_named(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a person walks\n\n" + "x" * 20_000, encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts\.txt, line 3: .* got 20000"):
        read_prompts(path)
    path.write_bytes(b"a person\xff walks")
    with pytest.raises(UserError, match=r"prompts\.txt.*byte 0xFF at 8"):
        read_prompts(path)


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_an_unreadable_prompt_file_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("spec", [{}, {"type": "clip"}, {"type": ["minilm"]}, {"type": "none"}])
def test_an_encoder_that_cannot_be_had_is_refused(spec):
    with pytest.raises(UserError, match="text encoder"):
        text_encoder(spec)
