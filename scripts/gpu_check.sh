#!/usr/bin/env bash
# All GPU validation and benchmarks in one call, under nine minutes on one GPU. Nothing is installed or downloaded: what
# lacks a package is left out, by name.
#   scripts/gpu_check.sh [MODEL_DIR]     a base model; left out, a random Llama of 1B shape is made
#   OUT=FOLDER or OUT=FILE.tar.gz        where JSON, plots and logs go (default: the folder benchmarks/gpu)
#   PYTHON=...                           the interpreter that has torch with CUDA (default: python3)
set -uo pipefail

model="${1:+$(realpath "$1")}"
out="${OUT:+$(realpath --canonicalize-missing "$OUT")}"
python="$(command -v "${PYTHON:-python3}")" || { echo "error: there is no ${PYTHON:-python3}" >&2; exit 2; }
python="$(realpath --no-symlinks "$python")"  # a virtual environment's link has to stay one
cd "$(dirname "$0")/.."
out="${out:-$PWD/benchmarks/gpu}"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/model_rewrites${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: no CUDA device is visible to torch" >&2
    exit 2
}
scratch="$(mktemp -d)"
case "$out" in
    *.tar.gz) results="$scratch/results" ;;
    *) results="$out" ;;
esac
mkdir -p "$results" "$(dirname "$out")"
finish() {
    [ "$results" = "$out" ] || tar -C "$results" -czf "$out" .
    rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 143' TERM INT

# Each step has its share of the nine minutes; one that fails, or runs out of it, does not keep the others from running.
status=0
deadline=$((SECONDS + 525))
run() {
    local left=$((deadline - SECONDS)) started=$SECONDS seconds="$1"
    shift
    if [ "$left" -lt 5 ]; then
        echo "no time left for: $*" >&2
        status=1
        return 1
    fi
    echo "== $*" >&2
    timeout "$((seconds < left ? seconds : left))" "$@" || { echo "failed: $*" >&2; status=1; return 1; }
    echo "   $((SECONDS - started)) s" >&2
}
bench() { run "$1" "$python" -m swiftkv_train bench "${@:2}" --output "$results/${2//-/_}.json"; }

missing="$("$python" - <<'PY'
from importlib.util import find_spec

needed = "accelerate jinja2 matplotlib numpy psutil pyarrow pydantic rich safetensors transformers typer yaml".split()
print(*(name for name in needed if find_spec(name) is None))
PY
)"

# Most of the time of a native kernel test goes into compiling it, on one core: so in shards side by side.
shards="$(nproc)"
[ "$shards" -le 16 ] || shards=16  # each has a CUDA context, which takes memory
pids=()
test_in_background() {  # LOG PLACES...
    timeout 150 "$python" -m pytest -q -m gpu -p no:cacheprovider "${@:2}" > "$results/pytest.$1.log" 2>&1 &
    pids+=($!)
}
for shard in $(seq "$shards"); do
    SHARD="$shard/$shards" OMP_NUM_THREADS=1 test_in_background "$shard" tests/kernels tests/models
done
[ -n "$missing" ] || test_in_background train tests/train
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
tail -q -n 1 "$results"/pytest.*.log >&2
cat "$results"/pytest.*.log > "$results/pytest.log" && rm "$results"/pytest.*.log

if [ -n "$missing" ]; then
    echo "error: only the kernels and models were tested; the rest needs $missing" >&2
    exit 1
fi

# The whole pipeline, on a tiny random model.
run 75 bash -euc '
    recipe="$PWD/recipes/debug/debug.yaml"
    cd "$1"
    swiftkv() { "$0" -m swiftkv_train "$@"; }
    swiftkv fetch debug --to models/debug
    swiftkv distill "$recipe" model.dtype=bfloat16
    swiftkv export outputs/debug/run --to outputs/debug/checkpoint
    swiftkv evaluate outputs/debug/checkpoint --base models/debug --report report
    swiftkv chat outputs/debug/checkpoint --prompt "What does the fox do at noon?" --max-new-tokens 16
' "$python" "$scratch" > "$results/pipeline.log" 2>&1
tail -n 1 "$results/pipeline.log" >&2

if [ -z "$model" ]; then
    model="$scratch/llama-1b-shape"
    run 60 "$python" - "$model" <<'PY'
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
run 60 "$python" - "$model" "$checkpoint" <<'PY'
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

# What the mission asks for first.
bench 50 prefill "$checkpoint" --base "$model" --lengths 2048,8000
bench 60 decode "$checkpoint" --base "$model" --batch 1,16 --context 4096
bench 60 stream "$checkpoint" --windows 1024,4096 --tokens 8192
bench 90 relay --heads 32 --kv-heads 8 --head-dim 64 --dtype bfloat16 --batch 1,4,16,64 --prefix 64,1024,4096,16384
bench 70 step "$model" --batch-size 4 --sequence-length 2048
bench 30 kv-memory "$model" --checkpoint "$checkpoint"
bench 60 loss --rows 2048 --repeats 5
bench 60 plan --models 1b
exit $status
