"""metrics.jsonl: one JSON object a line, and only whole lines, whatever a kill or a full disk does."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from swiftkv_train.durable import sync, write_text
from swiftkv_train.errors import UserError


class Metrics:
    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[str] = []  # lines that the disk has refused so far

    def append(self, row: dict[str, Any]) -> None:
        """Add a row. Raises OSError when the disk refuses; the row is then kept and written with the next."""
        self._waiting.append(json.dumps(finite(row), allow_nan=False) + "\n")
        self.flush()

    def flush(self) -> None:
        """Write the rows that the disk has refused so far. Raises OSError when it still does."""
        left = memoryview("".join(self._waiting).encode())
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while left:
                    left = left[file.write(left) :]  # a disk that is almost full takes a part of it
            except OSError:
                file.truncate(end)
                raise
        self._waiting.clear()

    def sync(self) -> None:
        """Have every row on disk, safe from a crash of the machine. Raises OSError."""
        self.flush()
        sync(self.path)

    def rows(self) -> list[dict[str, Any]]:
        """The rows logged so far; one that a kill cut off is left out. Raises UserError when the file is damaged."""
        if not self.path.exists():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
                raise ValueError("a row is none of a run's")
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{self.path} is damaged; remove the lines that are not JSON objects with a step") from None
        return rows

    def trim(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run writes again, and one that was cut off."""
        if self.path.exists():
            kept = [finite(row) for row in self.rows() if row["step"] <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def finite(value: Any) -> Any:
    """`value` with null for nan and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
