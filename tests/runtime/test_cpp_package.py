"""runtime/cpp as a package: three ways to ONNX Runtime, installed and found by somebody else's project; sources that any
system compiles."""

import os
import re
from pathlib import Path

import pytest

# What objects may ask of C: ISO C's library. The rest is C++ (mangled), the compiler's own (an underscore) or std::thread's.
ISO_C = {"memcpy", "memmove", "memset", "memcmp", "memchr", "strchr", "strcmp", "strlen", "strstr"}
ISO_C |= {
    "fopen",
    "fclose",
    "fread",
    "ferror",
    "snprintf",
    "vsnprintf",
    "floor",
    "floorf",
    "nearbyint",
    "sqrt",
    "isalnum",
}
THREADS = {"pthread_mutex_lock", "pthread_mutex_unlock", "pthread_self"}
STANDARD_HEADERS = {
    "algorithm",
    "array",
    "atomic",
    "cctype",
    "charconv",
    "chrono",
    "cmath",
    "condition_variable",
    "cstdarg",
    "cstddef",
    "cstdint",
    "cstdio",
    "cstdlib",
    "cstring",
    "deque",
    "exception",
    "filesystem",
    "functional",
    "iterator",
    "limits",
    "map",
    "memory",
    "memory_resource",
    "mutex",
    "new",
    "string",
    "string_view",
    "thread",
    "unordered_map",
    "utility",
    "vector",
    "type_traits",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    from kinetok.export.bundle import export_bundle
    from kinetok.model.pretrained import load_pretrained

    model = load_pretrained(None, "cpu", "float32")
    return export_bundle(model, tmp_path_factory.mktemp("bundle") / "default", text=False, check=False)


@pytest.fixture(scope="module")
def onnxruntime_root(cpp, tmp_path_factory) -> Path:
    """A folder as ONNX Runtime's own releases have it, library and CMake package, around the library that is here."""
    root = tmp_path_factory.mktemp("onnxruntime")
    package = root / "lib" / "cmake" / "onnxruntime"
    package.mkdir(parents=True)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "lib" / name).symlink_to(cpp.onnxruntime)
    (package / "onnxruntimeConfig.cmake").write_text(
        "add_library(onnxruntime::onnxruntime SHARED IMPORTED)\n"
        "set_target_properties(onnxruntime::onnxruntime PROPERTIES\n"
        f'  IMPORTED_LOCATION "{root}/lib/libonnxruntime.so" IMPORTED_SONAME libonnxruntime.so.1)\n'
    )
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One build folder for all ways: only what they change is compiled again."""
    return tmp_path_factory.mktemp("build")


def _build(cpp, folder: Path, **options: object) -> Path:
    chosen = {"ONNXRUNTIME_ROOT": "", "KINETOK_LINK_ONNXRUNTIME": "OFF", "BUILD_SHARED_LIBS": "ON", **options}
    return cpp.build(
        folder,
        "kinetok",
        CMAKE_BUILD_TYPE="None",
        CMAKE_CXX_FLAGS="-O0 -Werror -pedantic-errors -Wconversion -Wsign-conversion",
        **chosen,
    )


@pytest.mark.parametrize("way", ["dlopen", "root", "find_package"])
def test_an_installed_package_is_found_and_used(cpp, bundle, onnxruntime_root, folder, tmp_path, way) -> None:
    options: dict[str, object] = {
        "dlopen": {},
        "root": {"ONNXRUNTIME_ROOT": onnxruntime_root},
        "find_package": {
            "KINETOK_LINK_ONNXRUNTIME": "ON",
            "onnxruntime_DIR": onnxruntime_root / "lib" / "cmake" / "onnxruntime",
            "BUILD_SHARED_LIBS": "OFF",  # its dependencies become those of the project that finds it
        },
    }[way]
    _build(cpp, folder, **options)
    prefix = tmp_path / "installed"
    cpp.run("cmake", "--install", folder, "--prefix", prefix)
    consumer = cpp.build(
        tmp_path / "consumer",
        source=cpp.source / "tests" / "consumer",
        CMAKE_PREFIX_PATH=f"{prefix};{onnxruntime_root}",
        CMAKE_C_FLAGS="-Wall -Wextra -Werror -std=c99 -pedantic",
    )
    # Only the way that loads it when a model opens is told where the library lies.
    library = str(cpp.onnxruntime) if way == "dlopen" else ""
    said = cpp.run(consumer / "consumer", bundle, KINETOK_ONNXRUNTIME=library)
    height = float(said.split(" at ")[1].split()[0])
    assert said.startswith("version 100,") and 0.5 < height < 1.3
    if way == "dlopen" and "LD_LIBRARY_PATH" not in os.environ:
        said = cpp.run(consumer / "consumer", bundle, code=2, KINETOK_ONNXRUNTIME="")
        assert "ONNX Runtime is not on the system's search path" in said


def test_the_ten_lines_of_the_documentation_are_a_program(cpp, bundle, folder, tmp_path) -> None:
    text = (cpp.source.parents[1] / "docs" / "cpp.md").read_text()
    block = text.split("## Ten lines to the first frame\n")[1].split("\nEach call", 1)[0]
    include, *lines = [line.removeprefix("    ") for line in block.splitlines()]
    check = 'printf("%u frame, %.3f m\\n", (unsigned)read, frame[1]);\nreturn 0;'
    (tmp_path / "main.c").write_text(
        "\n".join(["#include <stdio.h>", include, "int main(void) {", *lines, check, "}\n"])
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(ten LANGUAGES C CXX)\nfind_package(kinetok REQUIRED)\n"
        "configure_file(main.c main.cpp COPYONLY)\n"
        + "".join(
            f"add_executable({name} {file})\ntarget_link_libraries({name} kinetok::kinetok)\n"
            for name, file in (("c", "main.c"), ("cpp", "${CMAKE_CURRENT_BINARY_DIR}/main.cpp"))
        )
    )
    _build(cpp, folder)
    cpp.run("cmake", "--install", folder, "--prefix", tmp_path / "installed")
    flags = "-Wall -Wextra -Wconversion -Werror -pedantic"
    built = cpp.build(
        tmp_path / "build",
        source=tmp_path,
        CMAKE_PREFIX_PATH=tmp_path / "installed",
        CMAKE_C_FLAGS=flags,
        CMAKE_CXX_FLAGS=flags,
    )
    (built / "bundle").symlink_to(bundle)
    for program in ("c", "cpp"):
        frames, height = cpp.run("cmake", "-E", "chdir", built, built / program).split(" frame, ")
        assert frames == "1" and 0.5 < float(height.split()[0]) < 1.3


def test_a_root_without_the_library_is_refused(cpp, tmp_path) -> None:
    said = cpp.run("cmake", "-S", cpp.source, "-B", tmp_path, f"-DONNXRUNTIME_ROOT={tmp_path}", code=1)
    assert "expected the library onnxruntime in" in said


def test_one_file_alone_knows_the_operating_system(cpp, folder) -> None:
    sources = sorted((cpp.source / "src").iterdir())
    for file in [*sources, cpp.source / "include" / "kinetok.h"]:
        if file.name == "platform.cpp":
            continue
        headers = set(re.findall(r"^\s*#\s*include\s*<(.+)>", file.read_text(), re.M))
        assert headers <= (STANDARD_HEADERS if file.suffix != ".h" else {"stddef.h", "stdint.h"}), file.name
    _build(cpp, folder)
    objects = [
        file for file in sorted(folder.rglob("*.o")) if file.name.startswith(tuple(f.stem + "." for f in sources))
    ]
    assert len(objects) == len([file for file in sources if file.suffix == ".cpp"]) > 10
    found = {}
    for file in objects:
        names = {line.split()[-1].split("@")[0] for line in cpp.run("nm", "-u", file).splitlines()}
        found[file.name] = {name for name in names if not name.startswith("_")} - ISO_C - THREADS
    assert found.pop("platform.cpp.o") >= {"dlopen", "dlsym"}
    assert not any(found.values()), found
