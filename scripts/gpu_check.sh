#!/usr/bin/env bash
# All GPU validation and benchmarks in one call, under nine minutes on one GPU. Needs torch with CUDA, transformers and
# pytest; nothing is installed or downloaded. Results: JSON and logs in OUT (default: benchmarks/gpu).
# Usage: scripts/gpu_check.sh [MODEL_DIR]   (a base model; left out: a random Llama of 1B shape is made)
set -uo pipefail
cd "$(dirname "$0")/.."

out="${OUT:-benchmarks/gpu}"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/model_rewrites${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$out"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: no CUDA device is visible to torch" >&2
    exit 2
}
model="${1:-}"
if [ -z "$model" ]; then
    model="$scratch/llama-1b-shape"
    "$python" - "$model" <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=16384,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)
with torch.device("cuda"):
    LlamaForCausalLM(config).save_pretrained(sys.argv[1])
PY
fi

status=0
run() {
    echo "== $*" >&2
    timeout 240 "$@" || { echo "failed: $*" >&2; status=1; }
}
run "$python" -m pytest -q -m gpu tests -p no:cacheprovider 2>&1 | tee "$out/pytest.log"
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
run "$python" -m swiftkv_train.cli bench step "$model" --batch-size 4 --sequence-length 2048 --output "$out/step.json"
exit $status
