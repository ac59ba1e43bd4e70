#!/usr/bin/env bash
# Measure the studies that are kept in outputs/reference, on one NVIDIA GPU, part by part:
#
#   bash tests/bench/reference.sh peaks accuracy checkpoints searches bs1 maxbatch sweep
#
# from the repository's root, with `pip install -e '.[test]'`. A part that was cut goes on where it was.
#
# peaks        the device's bandwidth and products; nothing else may run
# accuracy     SmolLM2-135M-Instruct: all items of four tasks, 400 of GSM8K, divergence, batch sensitivity
# checkpoints  Llama-3.2-1B's shape in every format
# searches     its largest batches in 15 GiB; they depend on memory alone, so `accuracy` may run meanwhile
# bs1          both engines at batch size 1; nothing else may run
# maxbatch     the largest batches timed; nothing else may run
# sweep        batches of 1, 2, 4 ... up to the largest of the searches; nothing else may run
#
# DATA_DIR is a folder laid out like the hub, GGUF the file of SmolLM2's weights; without them the hub is read, and the
# row `gguf` is left out. ENGINES restricts searches, bs1, maxbatch and sweep. KEPT is the folder of both studies: where
# a host has two GPUs, each measures one engine into a folder of its own, and `keep.py` puts them together.
set -euo pipefail

kept=${KEPT:-outputs/reference}
formats=${FORMATS:-all,torchao} engines=${ENGINES:-cuda_graph,eager}
run=(python -m qnb run --profile paper)
[ -z "${DATA_DIR:-}" ] || run+=(-p data_dir "$DATA_DIR")
accuracy=("${run[@]}" --only 02 --output "$kept/smollm2-135m" -p model smollm2-135m -p sensitivity_limit 50
  -p precisions "$formats${GGUF:+,gguf=checkpoint:$GGUF}" -p ppl_tokens 65536 -p ppl_context 512
  --workers "${WORKERS:-4}" --gpus-per-model "${SHARE:-0.25}")
shape=("${run[@]}" --output "$kept/llama-3.2-1b-shape" -p model shape:llama-3.2-1b -p precisions "$formats")
requests=${REQUESTS:-2048}

for part in "$@"; do
  case $part in
    peaks | searches | sweep)
      QNB_COMMAND="FORMATS=$formats ENGINES=$engines bash tests/bench/reference.sh $part" \
        python - "$part" "$formats" "$kept/llama-3.2-1b-shape" "${DATA_DIR:-}" "$engines" "$requests" <<'PYTHON'
import sys
from unittest.mock import patch

from qnb.speed import stages
from qnb.study import Study

part, formats, output, data_dir, engines, requests = sys.argv[1:]
study = Study("shape:llama-3.2-1b", formats, output, data_dir)
if part == "peaks":
    print(study.device_peaks())
else:
    workload = study.workload("maxbatch", int(requests), 128, 100, "wikitext")
    for engine in engines.split(","):
        if part == "sweep":
            study.sweep(workload, "auto", engine)
            continue
        with patch.object(stages, "time_in_turn"):  # searches alone
            study.perf_maxbatch(workload, 15360, 1, engine)
PYTHON
      ;;
    accuracy)
      "${accuracy[@]}" -p tasks arc_challenge,arc_easy,hellaswag,mmlu -p limit "${LIMIT:-all}"
      "${accuracy[@]}" -p tasks gsm8k -p limit "${LIMIT:-400}"
      ;;
    checkpoints) "${shape[@]}" --only 01 ;;
    bs1)
      for engine in ${engines//,/ }; do
        "${shape[@]}" --only 03 -p engines "$engine" -p bs1_requests 3
      done
      ;;
    maxbatch)
      for engine in ${engines//,/ }; do
        "${shape[@]}" --only 04 -p engines "$engine" -p maxbatch_requests "$requests" -p memory_mib 15360 \
          -p sweep_batch 0
      done
      ;;
    *) echo "no part $part; choose from peaks, accuracy, checkpoints, searches, bs1, maxbatch, sweep" >&2 && exit 2 ;;
  esac
done
