#!/usr/bin/env bash
# Make .venv from the project's own files: the versions of constraints.txt, the package itself in editable form.
# Runs again only when those files change. Usage: scripts/setup.sh [EXTRA[,EXTRA...]]   (default: dev)
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${1:-dev}"
python="${PYTHON:-python3}"
stamp=".venv/.set-up-$extras"
wanted="$(cat pyproject.toml constraints.txt | cksum) $extras"

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 2
}
if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv || {
        echo "error: $python cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
        exit 2
    }
fi
echo "setting up .venv ($extras); a minute or more, by your connection ..." >&2
# DeepSpeed would otherwise try to compile its operators.
export DS_BUILD_OPS=0
# torch first and by its pinned version: asked for through another package, it would bring gigabytes of CUDA.
.venv/bin/python -m pip install -qq --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
.venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$extras]"
echo "$wanted" >"$stamp"
