"""Measurements in processes of their own, in which nothing of what ran before is warm or still held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swiftkv_train.errors import RunError, UserError


def in_own_process(
    module: str, arguments: Sequence[str | int], what: str, environment: Mapping[str, str] | None = None
) -> Any:
    """What `python -m module arguments`, which ends in `answer`, found; `environment` adds to this process's.

    Raises:
        UserError: the child's.
        RunError: measuring `what` failed otherwise.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if result.returncode == 0:
        return json.loads(result.stdout.strip().splitlines()[-1])
    last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
    if result.returncode == 2:
        raise UserError(last)
    raise RunError(f"measuring {what} failed: {last}")


def answer(work: Callable[[], Any]) -> None:
    """The child's side: tell what `work` found, or end with status 2 and the line of its UserError."""
    try:
        print(json.dumps(work()))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
