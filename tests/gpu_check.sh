#!/usr/bin/env bash
# On a bare machine with a CUDA GPU, at the repository's root: bash tests/gpu_check.sh
# Installs what is missing, trains both stages with default flags, times inference, compares CPU and
# CUDA, runs the tests marked cuda. The report is in gpu_out/report.txt; it takes under 9 minutes.
# A dry run without a GPU: DEVICE=cpu STEPS=2 bash tests/gpu_check.sh
set -u
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-gpu_out}
REPORT=$OUT/report.txt
mkdir -p "$OUT"
python -c "import torch; torch.zeros(1, device='$DEVICE')" || python -m pip install -q torch
python -c "import numpy, scipy, matplotlib, pytest" || python -m pip install -q numpy scipy matplotlib pytest
{ nvidia-smi -L 2>/dev/null || echo "no GPU"; python -c "import torch; print('torch', torch.__version__)"; } | tee "$REPORT"

run() {     # seconds allowed, command: the end of its output, exit status and time go into the report
  local start=$SECONDS limit=$1
  shift
  timeout "$limit" "$@" >"$OUT/log.txt" 2>&1
  echo "== exit $?, $((SECONDS - start)) s: $*" | tee -a "$REPORT"
  tr '\r' '\n' <"$OUT/log.txt" | tail -6 | tee -a "$REPORT"
}

steps=()
[ -n "${STEPS:-}" ] && steps=(--steps "$STEPS")
data=()
[ -n "${DATA:-}" ] && data=(--data "$DATA")
run 120 python train_vq.py "${data[@]}" --device "$DEVICE" --out "$OUT/vq" "${steps[@]}"
run 200 python train_ar.py "${data[@]}" --device "$DEVICE" --vq "$OUT/vq/best.pt" --out "$OUT/ar" "${steps[@]}"
run 60 python infer.py "${data[@]}" --device "$DEVICE" --ar "$OUT/ar/best.pt" --test
run 60 python tests/gpu_compare.py "$DEVICE" "$OUT/ar/best.pt"
run 90 python -m pytest -q tests/test_devices.py -m cuda
