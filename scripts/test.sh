#!/usr/bin/env bash
# Set up if needed, then lint, type-check and test. Arguments go to pytest: scripts/test.sh tests/models -k cache
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"
if [ $# -gt 0 ]; then
    exec pytest "$@"
fi
ruff check .
ruff format --check .
mypy
exec pytest --numprocesses 2 --dist loadfile
