"""Random damage to what a bundle brings: manifests, vocabularies and sentences, under AddressSanitizer and UBSan.

KINETOK_FUZZ_SECONDS=1800 for each of the two; 30 without.
"""

import os

import pytest

SECONDS = os.environ.get("KINETOK_FUZZ_SECONDS", "30")
CORPUS_BYTES = 200_000


@pytest.fixture(scope="module")
def fuzzer(cpp, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    options = {"KINETOK_TESTS": "ON", "KINETOK_SANITIZE": "address,undefined", "CMAKE_BUILD_TYPE": "None"}
    return cpp.build(folder, "kinetok_fuzz", CMAKE_CXX_FLAGS="-O1", **options) / "tests" / "kinetok_fuzz"


@pytest.mark.parametrize("target", ["manifest", "words"])
def test_damage_only_gives_errors(cpp, fuzzer, tmp_path, target) -> None:
    corpus = cpp.source / "tests" / "fuzz" / target
    assert 0 < sum(file.stat().st_size for file in corpus.iterdir()) < CORPUS_BYTES
    print(cpp.run(fuzzer, target, SECONDS, 1, tmp_path / "found", corpus))


def test_what_it_reaches_it_keeps(cpp, fuzzer, tmp_path) -> None:
    """The smallest part of a corpus that goes as far as all of it: that part alone goes as far."""
    reached = []
    for corpus, kept in ((cpp.source / "tests" / "fuzz" / "words", "all"), (tmp_path / "all", "again")):
        said = cpp.run(fuzzer, "words", 0, 1, tmp_path / kept, corpus)
        reached.append(int(said.split(" accepted, ")[1].split(" edges")[0]))
    assert reached[0] == reached[1] > 100
    (tmp_path / "none").mkdir()
    assert "expected a corpus" in cpp.run(fuzzer, "words", 0, 1, tmp_path / "kept", tmp_path / "none", code=1)
