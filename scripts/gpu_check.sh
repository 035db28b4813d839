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

checkpoint="$scratch/swiftkv"
"$python" - "$model" "$checkpoint" <<'PY'
import sys

from transformers import AutoModelForCausalLM

from swiftkv_models import rewrite

base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model = rewrite(base, num_key_value_layers=base.config.num_hidden_layers // 2)
model.config.base_projections = False
model.save_pretrained(sys.argv[2], state_dict={  # the tail's unused projections stay behind
    name: tensor for name, tensor in model.state_dict().items()
    if not any(f"layers.{i}.self_attn.{kind}_proj.weight" in name
               for i in range(model.config.num_key_value_layers, model.config.num_hidden_layers) for kind in "qkv")
})
PY

# Each step has its share of nine minutes; a step that fails or runs out of it does not keep the others from running.
status=0
run() {
    local seconds="$1"
    shift
    echo "== $*" >&2
    timeout "$seconds" "$@" || { echo "failed: $*" >&2; status=1; }
}
bench() { run "$1" "$python" -m swiftkv_train.cli bench "${@:2}"; }
# Most of the time of a native kernel test goes into compiling it, on one core: so in shards side by side.
shards=8
pids=()
for shard in $(seq "$shards"); do
    SHARD="$shard/$shards" OMP_NUM_THREADS=1 timeout 110 "$python" -m pytest -q -m gpu -p no:cacheprovider \
        tests/kernels tests/models tests/train > "$out/pytest.$shard.log" 2>&1 &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
tail -n 1 "$out"/pytest.*.log >&2
# The whole pipeline, on a tiny random model.
run 60 bash -euc '
    recipe="$PWD/recipes/debug/debug.yaml"
    cd "$1"
    swiftkv() { "$0" -m swiftkv_train.cli "$@"; }
    swiftkv fetch debug --to models/debug
    swiftkv distill "$recipe" model.dtype=bfloat16
    swiftkv export outputs/debug/run --to outputs/debug/checkpoint
    swiftkv evaluate outputs/debug/checkpoint --base models/debug --report "$2/debug"
    swiftkv chat outputs/debug/checkpoint --prompt "What does the fox do at noon?" --max-new-tokens 16
' "$python" "$scratch" "$(realpath "$out")" > "$out/pipeline.log" 2>&1
tail -n 1 "$out/pipeline.log" >&2
bench 50 step "$model" --batch-size 4 --sequence-length 2048 --output "$out/step.json"
bench 40 loss --rows 2048 --repeats 5 --output "$out/loss.json"
bench 30 plan --models 1b --output "$out/plan.json"
bench 40 prefill "$checkpoint" --base "$model" --lengths 2048,8192 --output "$out/prefill.json"
bench 70 relay --heads 32 --kv-heads 8 --head-dim 64 --dtype bfloat16 --output "$out/relay.json"
bench 60 decode "$checkpoint" --base "$model" --batch 1,16 --context 4096 --output "$out/decode.json"
bench 60 stream "$checkpoint" --windows 1024,4096 --tokens 8192 --output "$out/stream.json"
bench 30 kv-memory "$model" --checkpoint "$checkpoint" --output "$out/kv_memory.json"
exit $status
