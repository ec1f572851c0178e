"""Write src/unicode_tables.hpp: what MiniLM's tokenizer does to every character, read off the tokenizer itself.

python runtime/cpp/tools/unicode_tables.py > runtime/cpp/src/unicode_tables.hpp
"""

from collections.abc import Iterable

from kinetok.model.text_minilm import MiniLM

HANGUL = range(0xAC00, 0xD7A4)  # decomposed by arithmetic
LINE = 118


def ranges(points: Iterable[int]) -> list[tuple[int, ...]]:
    """Code points as (first, last) pairs."""
    found: list[tuple[int, ...]] = []
    for point in points:
        if found and found[-1][1] == point - 1:
            found[-1] = found[-1][0], point
        else:
            found.append((point, point))
    return found


def runs(mapped: dict[int, int]) -> list[tuple[int, ...]]:
    """Code points with another in their place, as (first, last, stride, difference)."""
    found: list[tuple[int, ...]] = []
    for point, target in mapped.items():
        delta = target - point
        if found:
            first, last, stride, before = found[-1]
            gap = point - last
            if delta == before and (gap == stride or (first == last and gap <= 2)):
                found[-1] = first, point, gap, delta
                continue
        found.append((point, point, 1, delta))
    return found


def table(name: str, kind: str, rows: list[tuple[int, ...]]) -> str:
    """One C++ array."""
    lines, line = [], "   "
    for row in rows:
        text = " {" + ", ".join(str(value) for value in row) + "},"
        if len(line) + len(text) > LINE:
            lines.append(line)
            line = "   "
        line += text
    return f"inline constexpr {kind} {name}[] = {{\n" + "\n".join([*lines, line]) + "\n};\n"


def main() -> None:
    tokenizer = MiniLM().tokenizer
    normalise, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    removed, spaces, surrounded, punctuation = [], [], [], []
    single: dict[int, int] = {}
    several: list[tuple[int, ...]] = []
    for point in points:
        character = chr(point)
        result = normalise(character)
        if len(split(f"a{character}a")) == 3:
            punctuation.append(point)
        if result == " " and point != 0x20:
            spaces.append(point)
            continue
        if not result:
            removed.append(point)
            continue
        if len(result) == 3 and result[0] == result[2] == " ":
            surrounded.append(point)
            result = result[1]
        if point in HANGUL or result == character:
            continue
        if len(result) == 1:
            single[point] = ord(result)
        else:
            several.append((point, *[ord(part) for part in result.ljust(3, "\0")]))
    print(
        "// Written by tools/unicode_tables.py. Sorted code points, decimal.\n"
        "#pragma once\n\n#include <cstdint>\n\nnamespace kinetok::unicode {\n\n"
        "struct Range {\n  uint32_t first, last;\n};\n"
        "struct Run {  // first, first + stride, ... last: each becomes itself + difference\n"
        "  uint32_t first, last, stride;\n  int32_t difference;\n};\n"
        "struct Several {\n  uint32_t from, to[3];  // 0: none\n};\n"
    )
    print(table("REMOVED", "Range", ranges(removed)))
    print(table("SPACES", "Range", ranges(spaces)))
    print(table("SURROUNDED", "Range", ranges(surrounded)))
    print(table("PUNCTUATION", "Range", ranges(punctuation)))
    print(table("RUNS", "Run", runs(single)))
    print(table("SEVERAL", "Several", several))
    print("}  // namespace kinetok::unicode")


if __name__ == "__main__":
    main()
