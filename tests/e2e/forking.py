"""The command in processes that are forked from one that has loaded the libraries: many starts in little time."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

from commanding import environment

PRELOADED = ["pytest", "swiftkv_train.cli", "swiftkv_train.distill", "transformers.models.auto", "safetensors.torch"]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


def start_forked(*arguments: str | Path, cwd: Path, log: Path, **variables: str) -> ForkServerProcess:
    """`swiftkv ARGUMENTS`, its output appended to `log`, with more environment variables."""
    process = context.Process(target=_run, args=([*map(str, arguments)], cwd, log, variables), daemon=True)
    with mock.patch.dict(os.environ, environment(), clear=True):  # the first call starts the server, which keeps these
        process.start()
    return process


def _run(arguments: list[str], cwd: Path, log: Path, variables: dict[str, str]) -> None:
    from swiftkv_train.cli import main

    os.environ.update(variables)
    os.chdir(cwd)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["swiftkv", *arguments]
    main()
