"""The command as a user runs it: in a process of its own, or in this one where starting torch would cost too much."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Two cores are shared; the models are too small for a second thread, which would only spin.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_SILENT": "true"}


@dataclass
class Result:
    status: int
    out: str
    err: str

    def error(self) -> str:
        """The message of a command that refused its input: status 2, one line on standard error, nothing else there."""
        assert self.status == 2, (self.status, self.err)
        lines = self.err.splitlines()
        # What a run says on its way to the mistake is its progress, one fact per line; anything else would be noise.
        noise = [line for line in lines[:-1] if not PROGRESS.match(line)]
        assert not noise, self.err
        assert lines, "nothing was said"
        assert lines[-1].startswith("error: "), self.err
        assert "Traceback" not in self.err
        assert "Traceback" not in self.out
        return lines[-1]


PROGRESS = re.compile(
    r"(base|dtype|damaged|tokenised|data|calibrate|trained|resumed|run|check|quality|first token|held out) "
)


def environment(**changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV_"))}
    return {**kept, **ENVIRONMENT, **changes}


def start(*arguments: str | Path, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "swiftkv_train", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run_process(*arguments: str | Path, cwd: Path, timeout: float = 240, **options: Any) -> Result:
    process = start(*arguments, cwd=cwd, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Result(process.returncode, out, err)


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Everything that is written to the two file descriptors, also by native code and old handlers."""
    texts: list[str] = []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in (1, 2)]
        kept = [os.dup(number) for number in (1, 2)]
        streams = sys.stdout, sys.stderr
        for stream in streams:
            stream.flush()
        for number, file in zip((1, 2), files, strict=True):
            os.dup2(file.fileno(), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        try:
            yield texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            for file in files:
                file.seek(0)
                texts.append(file.read().decode("utf-8", "replace"))


def run_here(*arguments: str | Path, cwd: Path) -> Result:
    """The entry point of the command in this process."""
    from accelerate.state import AcceleratorState

    from swiftkv_train.cli import main

    before = sys.argv, Path.cwd()
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)  # left by the command before
    status: Any = 0
    with _captured() as texts:
        os.chdir(cwd)
        sys.argv = ["swiftkv", *map(str, arguments)]
        torch.set_num_threads(1)
        try:
            main()
        except SystemExit as end:
            status = end.code
        except BaseException:
            import traceback

            traceback.print_exc()
            status = "traceback"
        finally:
            sys.argv = before[0]
            os.chdir(before[1])
            torch.set_num_threads(threads)
    return Result(0 if status is None else status, texts[0], texts[1])
