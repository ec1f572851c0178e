#!/usr/bin/env bash
# Everything that is worth measuring on a CUDA GPU, in at most LIMIT seconds: kernels and the decode step against their
# references first, then the benchmarks, the most telling ones first. Runs from the checkout, offline; needs python with torch,
# triton, numpy, safetensors, tokenizers, typer, rich and pytest. A peer whose package is missing is named in the results.
#
#   [PYTHON=python3] [OUT=out/gpu] [LIMIT=560] [PARTS="correctness runtime training kernels"] benchmarks/run_gpu.sh
#
# The part runtime wants 78 GiB of GPU memory for all of its rows and about 7 minutes; what does not fit is named. Results are
# JSON files in OUT, whole after every row, and log.txt; copied to benchmarks/results, benchmarks/report.py puts them on the page.
# Exit code 1: something is wrong or a benchmark failed; 2: there is no GPU to run on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
OUT=${OUT:-out/gpu}
LIMIT=${LIMIT:-560}
PARTS=${PARTS:-correctness runtime training kernels}
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

# bench NAME SECONDS ARGUMENTS...: kinetok bench of the 7B into OUT/NAME.json.
bench() {
  local name=$1 most=$2 what=$3
  shift 3
  step "$name" "$most" "$PYTHON" -m kinetok bench "$what" --preset 7B --device cuda --json "$OUT/$name.json" "$@"
}

part() { [[ " $PARTS " == *" $1 "* ]]; }

if part correctness; then
  step correctness 150 "$PYTHON" benchmarks/kernels/check_gpu.py --json "$OUT/correctness.json" --seconds 140
  step fused 60 "$PYTHON" benchmarks/runtime/check_fused.py --json "$OUT/correctness_fused.json"
  # Engines are built for this GPU, run, and compared with torch, where a library for them is installed.
  if "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("onnx") and any(map(u.find_spec, ("tensorrt_rtx", "tensorrt")))))'; then
    step tensorrt 60 "$PYTHON" -P -m pytest -q -rs -p no:cacheprovider tests/runtime/test_backend_tensorrt.py
  fi
fi
if part runtime; then
  bench decode_7B 90 decode --dtype bf16 --tokens 150 --peers graph,hf
  # Batches at a mean context of 170; 500 and 1000 are the goals in real time.
  bench step_7B 60 step --dtype bf16 --batch 64,256,448,500 --positions 170 --steps 4
  bench step_7B_fp8 70 step --dtype fp8 --kv fp8 --batch 64,512,1000 --positions 170 --steps 4
  bench decode_7B_int8 60 decode --dtype int8 --tokens 150
  bench decode_7B_int4 60 decode --dtype int4 --tokens 150
  bench stream_7B 45 stream --dtype bf16 --seconds 4
  bench stream_7B_causal 45 stream --dtype bf16 --seconds 4 --causal
  # 26 GB more, in fp32, and the slowest: a run of its own.
  bench decode_7B_uncached 100 decode --dtype bf16 --tokens 150 --peers uncached
  bench positions_7B 45 step --dtype bf16 --positions 30,300
  bench decode_7B_fp8 60 decode --dtype fp8 --kv fp8 --tokens 150
  # A whole engine: draws, tokenizer and frames on the host for everyone; 95 positions of text and 150 tokens are 170 on average.
  bench crowd_7B 60 crowd --dtype bf16 --characters 64 --text 95 --seconds 10
fi
if part training; then
  step training 240 "$PYTHON" benchmarks/train/bench_train.py --device cuda --json "$OUT/train.json"
  step packing 30 "$PYTHON" benchmarks/train/bench_packing.py --device cuda --json "$OUT/train_packing.json"
fi
if part kernels; then
  plain "${OPS[@]}"
  for op in "${OPS[@]}"; do
    kernel "$op" 60 --seconds 0.2 --json "$OUT/kernels_${op}_compile.json"
  done
fi

# The log is the one file that may grow; its end says the most.
tail -c 900000 "$OUT/log.txt" >"$OUT/log.tmp" && mv "$OUT/log.tmp" "$OUT/log.txt"
echo "results in $OUT after $SECONDS s"
if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
