#!/usr/bin/env bash
# Set up if needed, then lint, type-check and test. Arguments go to pytest: scripts/test.sh tests/models -k cache
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
fi
exec pytest "$@"
