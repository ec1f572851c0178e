#!/usr/bin/env bash
# Every figure of the runtime that a CPU can give, in under 15 minutes on two idle cores, then the page docs/benchmarks.md.
# One file a benchmark, the most telling first, each whole after every row. What fails is named at the end; the rest goes on.
#
#   [PYTHON=python3] [OUT=benchmarks/results] [PRESET=111M] [NOTE="what else runs"] benchmarks/runtime/run_cpu.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
OUT=${OUT:-benchmarks/results}
PRESET=${PRESET:-111M}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
failed=()

# bench NAME ARGUMENTS...: kinetok bench into OUT/NAME_cpu.json.
bench() {
  local name=$1
  shift
  echo "== $name, after $SECONDS s"
  "$PYTHON" -m kinetok bench "$@" --device cpu --note "${NOTE:-}" --json "$OUT/${name}_cpu.json" || failed+=("$name")
}

bench "decode_$PRESET" decode --preset "$PRESET" --tokens 50,150 --peers uncached,hf,compile,graph,ort
bench "step_$PRESET" step --preset "$PRESET" --positions 30,300
# An engine of the default model works with one thread, so that a busy neighbour core does not hold it up.
bench stream stream --threads 1
bench crowd crowd --characters 1,8,16,32 --seconds 2 --threads 1
bench tokenizer_default tokenizer --preset default --threads 1
bench tokenizer_released tokenizer --preset released
bench "batch_$PRESET" decode --preset "$PRESET" --batch 1,2,4,8 --tokens 20 --peers hf
echo "== default, after $SECONDS s"
"$PYTHON" benchmarks/runtime/bench_default.py --json "$OUT/default_cpu.json" >/dev/null || failed+=(default)
if [[ $OUT == benchmarks/results ]]; then "$PYTHON" benchmarks/report.py || failed+=(report); fi

echo "results in $OUT after $SECONDS s"
if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}" >&2
  exit 1
fi
