"""Tasks of lm-evaluation-harness, from local files, and what is made of its answers."""

import json
import math

import pytest
import torch

from swiftkv_models import optimize_for_cpu, rewrite
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.evaluate.report import task_table
from swiftkv_train.evaluate.tasks import _row, compare_on_tasks, load_tasks
from swiftkv_train.fetch.demo_tasks import hellaswag, social_iqa, write_task
from swiftkv_train.loading import load_model, load_tokenizer

ROWS = [
    {
        "text": f"Question: how many legs have {n} cats?\nAnswer:",
        "choices": [str(4 * n), str(3 * n), "none"],
        "answer": 0,
    }
    for n in range(1, 13)
]


@pytest.fixture
def task(tmp_path, make_recipe):
    make_recipe()  # the debug model
    write_task(tmp_path, "legs", ROWS)
    return tmp_path / "legs.yaml"


def answer(values, target, right):
    """What the harness notes of a question: log-likelihoods of the choices."""
    return {"filtered_resps": [(value, False) for value in values], "target": target, "acc": right, "metrics": ["acc"]}


@torch.no_grad()
def log_probabilities(model, tokenizer):
    """Of each question's right answer among its choices."""
    found = []
    for row in ROWS:
        asked = len(tokenizer(row["text"])["input_ids"])
        likelihoods = []
        for choice in row["choices"]:
            ids = tokenizer(f"{row['text']} {choice}", return_tensors="pt")["input_ids"]
            said = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            likelihoods.append(said[asked - 1 :].sum())
        found.append(torch.stack(likelihoods).log_softmax(0)[row["answer"]])
    return torch.stack(found)


def test_differences_are_paired():
    base = [answer([-1.0, -2.0], 0, 1.0), answer([-1.0, -2.0], "1", 0.0), answer([-3.0, -1.0], 1, 1.0)]
    student = [answer([-1.0, -2.0], 0, 1.0), answer([-2.0, -1.0], "1", 1.0), answer([-1.0, -3.0], 1, 0.0)]
    row = _row("t", base, student)
    assert (row["questions"], row["chance"], row["base"], row["student"]) == (3, 0.5, 2 / 3, 2 / 3)
    assert (row["difference"], row["standard_error"]) == (0.0, pytest.approx(1 / math.sqrt(3)))  # of 0, 1 and -1
    assert not row["above_chance"]
    gained = math.log(1 + math.e**1) - math.log(1 + math.e**-1)  # of the second question, by one nat each way
    lost = math.log(1 + math.e**-2) - math.log(1 + math.e**2)
    assert row["log_probability_difference"] == pytest.approx((gained + lost) / 3)
    same = _row("t", base, base)
    assert (same["difference"], same["standard_error"], same["log_probability_difference"]) == (0.0, 0.0, 0.0)
    spoken = [{"filtered_resps": ["4"], "target": "4", "exact_match": 1.0, "metrics": ["exact_match"]}] * 9
    row = _row("t", spoken, spoken)
    assert (row["chance"], row["above_chance"], row["log_probability_difference"]) == (0.0, True, None)
    with pytest.raises(RunError, match="has none of the metrics acc_norm, acc, exact_match, but"):
        _row("t", [{"metrics": ["bleu"]}], [{"metrics": ["bleu"]}])


def test_a_file_of_questions_is_asked_of_both(task):
    base = load_model("models/debug", dtype="float32")
    student = rewrite(base, num_key_value_layers=3)
    ways = {"base": base, "student": optimize_for_cpu(student)}
    tokenizer = load_tokenizer("models/debug")
    result = compare_on_tasks(load_tasks([str(task)]), ways, tokenizer, None)
    (row,) = result["rows"]
    assert (row["task"], row["metric"], row["questions"], row["chance"]) == (
        "demo_legs",
        "acc_norm",
        12,
        pytest.approx(1 / 3),
    )
    by_hand = [log_probabilities(student, tokenizer), log_probabilities(base, tokenizer)]
    expected = (by_hand[0] - by_hand[1]).mean()
    assert abs(expected) > 1e-3
    assert row["log_probability_difference"] == pytest.approx(float(expected), abs=1e-4)
    alone = compare_on_tasks(load_tasks([str(task)]), dict.fromkeys(ways, ways["base"]), tokenizer, 5)
    assert alone["rows"][0]["questions"] == 5
    assert alone["rows"][0]["log_probability_difference"] == 0
    assert "| demo_legs | acc_norm | 12 | 33.3% |" in task_table(result)


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("a.jsonl", "DIR/a.jsonl"),
        (["a.jsonl", "/x/b.jsonl"], ["DIR/a.jsonl", "/x/b.jsonl"]),
        ({"test": ["a", "b"], "train": "hf://datasets/c"}, {"test": ["DIR/a", "DIR/b"], "train": "hf://datasets/c"}),
    ],
)
def test_data_files_are_beside_their_task(tmp_path, named, found):
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps({"task": "x", "dataset_kwargs": {"data_files": named}}))
    (task,) = load_tasks([str(path)]).tasks
    expected = json.loads(json.dumps(found).replace("DIR", str(tmp_path)))
    assert task == {"task": "x", "dataset_kwargs": {"data_files": expected}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: No such file"),
        ("task: [", "is no YAML without functions"),
        ("a: 1", "must be a task of lm-evaluation-harness, with its name as `task`"),
        ("task: x\nprocess: !function a.b", "is no YAML without functions"),
        ("task: x\ndataset_kwargs: foo", "dataset_kwargs must be a mapping, found 'foo'"),
        ("task: x\ndataset_kwargs: {data_files: 3}", "data_files must name files, found 3"),
    ],
)
def test_files_that_are_no_tasks(tmp_path, text, says):
    path = tmp_path / "t.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        load_tasks([str(path)])


def test_a_task_that_cannot_be_run_is_named(task):
    (task.parent / "legs.jsonl").unlink()
    base = load_model("models/debug", dtype="float32")
    with pytest.raises(RunError, match="--tasks demo_legs: "):
        compare_on_tasks(load_tasks([str(task)]), {"base": base}, load_tokenizer("models/debug"), None)
    with pytest.raises(UserError, match="--tasks names 'demo_legs' twice"):
        load_tasks([str(task), str(task)])


def test_questions_of_the_demo():
    line = {"activity_label": "Juggling", "ctx": "A man", "endings": ["a", "b", "c", "d"], "expected_index": 2}
    assert hellaswag(json.dumps(line)) == [{"text": "Juggling: A man", "choices": ["a", "b", "c", "d"], "answer": 2}]
    said = "Jo ran. Why? A: to win; B: A: was said; C: the end."
    line = {"input": [{"role": "user", "content": said}], "ideal": "B"}
    assert social_iqa(json.dumps(line)) == [
        {"text": "Question: Jo ran. Why?\nAnswer:", "choices": ["to win", "A: was said", "the end"], "answer": 1}
    ]
    line["input"][0]["content"] = "Jo ran. Why? A: to win"
    with pytest.raises(ValueError, match="no question with answers A, B and C"):
        social_iqa(json.dumps(line))
