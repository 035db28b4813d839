"""metrics.jsonl: whole lines, each once, whatever a kill or a full disk does."""

import json
import math

import pytest

from swiftkv_train.errors import UserError
from swiftkv_train.metrics import Metrics


@pytest.fixture
def metrics(tmp_path):
    return Metrics(tmp_path / "metrics.jsonl")


def test_rows_come_back(metrics):
    assert metrics.rows() == []
    rows = [{"step": 1, "loss": 0.1}, {"step": 1, "held_out": {"prose": {"kl": 1e-300}}}]
    for row in rows:
        metrics.append(row)
    assert Metrics(metrics.path).rows() == rows
    assert [json.loads(line) for line in metrics.path.read_text().splitlines()] == rows


def test_a_row_that_a_kill_cut_off_is_left_out_and_trimmed_away(metrics):
    for step in range(5):
        metrics.append({"step": step, "loss": 1 / (step + 1)})
    with metrics.path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in metrics.rows()] == [0, 1, 2, 3, 4]
    metrics.trim(2)
    metrics.append({"step": 3})
    rows = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert rows == [*({"step": step, "loss": 1 / (step + 1)} for step in range(3)), {"step": 3}]
    assert [path.name for path in metrics.path.parent.iterdir()] == ["metrics.jsonl"]


def test_rows_that_a_full_disk_refuses_are_written_when_there_is_room(metrics, small_files):
    rows = [{"step": step, "text": "x" * 40} for step in range(6)]
    metrics.append(rows[0])
    size = metrics.path.stat().st_size
    with small_files(int(2.5 * size)):  # room for two rows and a half
        metrics.append(rows[1])
        for row in rows[2:4]:
            with pytest.raises(OSError, match="too large"):
                metrics.append(row)
            assert metrics.path.stat().st_size == 2 * size  # no half line
    metrics.append(rows[4])
    assert Metrics(metrics.path).rows() == rows[:5]
    metrics.sync()
    assert Metrics(metrics.path).rows() == rows[:5]


def test_damage_is_named(metrics):
    metrics.path.write_bytes(b'{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged; remove the lines that are not JSON"):
        metrics.rows()
    metrics.path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        metrics.rows()


def test_what_json_does_not_know_is_null(metrics):
    metrics.append({"step": 1, "loss": math.nan, "held_out": {"prose": {"kl": math.inf, "tokens": 3}}})
    expected = [{"step": 1, "loss": None, "held_out": {"prose": {"kl": None, "tokens": 3}}}]
    assert metrics.rows() == expected
    with metrics.path.open("a") as file:
        file.write('{"step": 2, "loss": NaN}\n')  # as it was written once
    metrics.trim(2)
    assert "NaN" not in metrics.path.read_text()


@pytest.mark.parametrize("line", ["3", "[]", '{"loss": 1.0}', '{"step": "1"}', "[" * 5000])
def test_a_row_of_an_odd_shape_is_damage(metrics, line):
    metrics.path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        metrics.rows()
