#!/usr/bin/env bash
# The library's own tests under ThreadSanitizer, with a stub in ONNX Runtime's place: tests/tsan.sh BUNDLE [BUILD]
# BUNDLE is one with a text encoder, as `kinetok export onnx --out BUNDLE` writes it.
set -euo pipefail
bundle=${1:?usage: tests/tsan.sh BUNDLE [BUILD]}
build=${2:-build/tsan}
cmake -S "$(dirname "${BASH_SOURCE[0]}")/.." -B "$build" -DKINETOK_TESTS=ON -DKINETOK_SANITIZE=thread \
  -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g"
cmake --build "$build" --target kinetok_tests kinetok_stub_onnxruntime
stub=$(echo "$build"/tests/libkinetok_stub_onnxruntime.*)
mkdir -p "$build/scratch"
KINETOK_ONNXRUNTIME=$stub TSAN_OPTIONS="halt_on_error=1 ${TSAN_OPTIONS:-}" "$build/tests/kinetok_tests" "$bundle" "$build/scratch"
