#!/usr/bin/env bash
# From nothing to a measured SwiftKV checkpoint of a real model, on a laptop. Every step is one public command.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/swiftkv ] && [ -n "$(ls .venv/.set-up-* 2>/dev/null)" ] || scripts/setup.sh serve
export PATH="$PWD/.venv/bin:$PATH"

out=outputs/quickstart
if [ -e "$out/run" ] && [ ! -e "$out/checkpoint" ]; then
    resume=--resume # an earlier start was stopped while it distilled
fi
if [ -e "$out/report/report.json" ]; then
    echo "$out already holds a finished quickstart; remove it to start again" >&2
    exit 2
fi

step() {
    printf '\n\033[1m== %s\033[0m\n$ %s\n' "$1" "${*:2}" >&2
    "${@:2}"
}

step "1/4  the model, and text and chats" \
    swiftkv fetch smollm2-135m --to models/smollm2-135m
if [ ! -e "$out/checkpoint" ]; then
    step "2/4  rewrite, calibrate, distil" \
        swiftkv distill recipes/smollm2-135m/quickstart.yaml ${resume:-}
    step "3/4  a checkpoint that stands alone" \
        swiftkv export "$out/run" --to "$out/checkpoint"
fi
step "4/4  what it cost and gained" \
    swiftkv evaluate "$out/checkpoint" --base models/smollm2-135m --report "$out/report"
