#!/usr/bin/env bash
# Everything that is worth measuring on a CUDA GPU, in at most 8 minutes: kernels against their references first, then the
# benchmarks, the most telling ones first. Runs from the checkout, offline; needs python with torch, triton, numpy,
# safetensors, tokenizers, typer, rich and pytest.
#
#   [PYTHON=python3] [OUT=out/gpu] [LIMIT=480] benchmarks/run_gpu.sh
#
# Results are JSON files in OUT, whole after every row, and log.txt. Exit code 1: a kernel is wrong or a benchmark failed;
# 2: there is no GPU to run on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
OUT=${OUT:-out/gpu}
LIMIT=${LIMIT:-480}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "run_gpu.sh: $PYTHON has no torch that finds a CUDA GPU; nothing was run" >&2
  exit 2
fi
mkdir -p "$OUT" || exit 1
: >"$OUT/log.txt"
failed=()

# step NAME SECONDS COMMAND...: run for at most SECONDS and what is left of LIMIT; say how it ended.
step() {
  local name=$1 most=$2 left=$((LIMIT - SECONDS)) code
  shift 2
  if ((left < 10)); then
    echo "$name: no time left"
    return
  fi
  if ((most > left)); then most=$left; fi
  echo "== $name"
  timeout --kill-after=5 "$most" "$@" 2>&1 | tee -a "$OUT/log.txt" | cut -c 1-200 | tail -n 40
  code=${PIPESTATUS[0]}
  case $code in
    0) ;;
    124 | 137) echo "$name: cut off after $most s; what was measured is kept" ;;
    *) failed+=("$name") ;;
  esac
}

# kernel OP SECONDS [OPTION...]: a kernel benchmark, if it exists.
kernel() {
  local op=$1 most=$2
  shift 2
  if [[ -f benchmarks/kernels/bench_$op.py ]]; then
    step "$op" "$most" "$PYTHON" "benchmarks/kernels/bench_$op.py" "$@"
  fi
}

OPS=(linear attention fsq wavelet cross_entropy detokenizer sampling norm gating rotary kinematics)

# Without torch.compile first: its compilation takes longer than all the measuring.
plain() {
  local op
  for op in "$@"; do
    kernel "$op" 40 --no-compile --seconds 0.2 --json "$OUT/kernels_$op.json"
  done
}

step correctness 170 "$PYTHON" benchmarks/kernels/check_gpu.py --json "$OUT/correctness.json" --seconds 150
step fused 70 "$PYTHON" benchmarks/runtime/check_fused.py --json "$OUT/fused.json"
plain "${OPS[@]:0:2}"
step decode 90 "$PYTHON" -m kinetok bench decode --device cuda --dtype bf16 --preset 7B --tokens 150 --peers hf,graph \
  --json "$OUT/decode_7B.json"
step training 80 "$PYTHON" benchmarks/train/bench_train.py --device cuda --json "$OUT/train.json"
step packing 30 "$PYTHON" benchmarks/train/bench_packing.py --device cuda --json "$OUT/train_packing.json"
plain "${OPS[@]:2}"
for op in "${OPS[@]}"; do
  kernel "$op" 60 --seconds 0.2 --json "$OUT/kernels_${op}_compile.json"
done

# The log is the one file that may grow; its end says the most.
tail -c 900000 "$OUT/log.txt" >"$OUT/log.tmp" && mv "$OUT/log.tmp" "$OUT/log.txt"
echo "results in $OUT after $SECONDS s"
if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
