"""A checkpoint and its base on tasks of lm-evaluation-harness, question by question against each other.

Two models that answer the same questions differ by far less than the accuracy of either is uncertain, so what is
reported is the mean of the differences and its standard error. Finer than right or wrong: how much the log-probability
of the right one among a question's choices differs.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swiftkv_train.errors import RunError, UserError
from swiftkv_train.loading import Model, Tokenizer, one_line

METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task has; all are 0 or 1 for a question
BATCH = 8  # sequences
ABOVE_CHANCE = 2.0  # standard errors
Sample = dict[str, Any]


@dataclass(frozen=True)
class Tasks:
    """What to ask: names of the harness's own tasks and those of files; the harness's index of its own."""

    tasks: list[str | dict[str, Any]]
    manager: Any

    @property
    def names(self) -> list[str]:
        return [task if isinstance(task, str) else task["task"] for task in self.tasks]


def load_tasks(names: Sequence[str]) -> Tasks:
    """`names`: of tasks, or YAML files. Raises UserError for what is neither, or without lm-evaluation-harness."""
    tasks = [_task_file(Path(name)) if name.endswith((".yaml", ".yml")) else name for name in names]
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as missing:
        raise UserError(f"--tasks needs {missing.name}: pip install 'swiftkv-train[tasks]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = Tasks(tasks, TaskManager(include_defaults=any(isinstance(task, str) for task in tasks)))
    for task in tasks:
        if isinstance(task, str) and task not in found.manager.all_tasks:
            raise UserError(f"--tasks {task!r} is no task of lm-evaluation-harness; `lm_eval ls tasks` lists them")
    if doubled := [name for name in found.names if found.names.count(name) > 1]:
        raise UserError(f"--tasks names {doubled[0]!r} twice")
    return found


def _task_file(path: Path) -> dict[str, Any]:
    """Data files that it names are found beside it."""
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--tasks {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--tasks {path} is no YAML without functions: {one_line(error)}") from None
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise UserError(f"--tasks {path} must be a task of lm-evaluation-harness, with its name as `task`")
    arguments = task.get("dataset_kwargs")
    if arguments is None:
        return task
    if not isinstance(arguments, dict):
        raise UserError(f"--tasks {path}: dataset_kwargs must be a mapping, found {arguments!r}")
    if arguments.get("data_files") is not None:
        arguments["data_files"] = _beside(path, arguments["data_files"])
    return task


def _beside(path: Path, files: Any) -> Any:
    """Data files as `datasets` takes them: a name, names, or those of each split; URLs stay."""
    if isinstance(files, dict):
        return {split: _beside(path, named) for split, named in files.items()}
    if isinstance(files, list):
        return [_beside(path, named) for named in files]
    if not isinstance(files, str):
        raise UserError(f"--tasks {path}: dataset_kwargs.data_files must name files, found {files!r}")
    return files if "://" in files else str(path.parent / files)


def compare_on_tasks(
    tasks: Tasks, models: Mapping[str, Model], tokenizer: Tokenizer, limit: int | None
) -> dict[str, Any]:
    """`models`: the "base" and the "student". `limit`: questions of each task.

    Raises RunError where a task cannot be run, for instance because its data cannot be downloaded.
    """
    samples = {name: _samples(model, tokenizer, tasks, limit) for name, model in models.items()}
    rows = [_row(task, found, samples["student"][task]) for task, found in samples["base"].items()]
    above = [row for row in rows if row["above_chance"]]
    return {"rows": rows, "average": _average(above) if above else None}


def _samples(model: Model, tokenizer: Tokenizer, tasks: Tasks, limit: int | None) -> dict[str, list[Sample]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    scorer = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH, softmax_dtype="float32")
    try:
        result = lm_eval.simple_evaluate(
            model=scorer,
            tasks=tasks.tasks,
            limit=limit,
            bootstrap_iters=0,
            task_manager=tasks.manager,
            log_samples=True,
        )
    except Exception as error:  # whatever data sets, templates and metrics raise
        raise RunError(f"--tasks {', '.join(tasks.names)}: {one_line(error)}") from error
    assert result is not None
    return {task: sorted(found, key=lambda sample: sample["doc_id"]) for task, found in result["samples"].items()}


def _row(task: str, base: list[Sample], student: list[Sample]) -> dict[str, Any]:
    metric = next((metric for metric in METRICS if metric in base[0]), None)
    if metric is None:
        raise RunError(f"--tasks {task}: has none of the metrics {', '.join(METRICS)}, but {base[0]['metrics']}")
    scores = {
        name: [float(sample[metric]) for sample in samples] for name, samples in (("base", base), ("student", student))
    }
    accuracy = {name: statistics.fmean(values) for name, values in scores.items()}
    difference, error = _paired(scores["student"], scores["base"])
    chance, likelihood, likelihood_error = 0.0, None, None
    if all(map(_is_choice, base)):
        chance = statistics.fmean(1 / len(sample["filtered_resps"]) for sample in base)
        likelihood, likelihood_error = _paired(
            *([_log_probability(sample) for sample in samples] for samples in (student, base))
        )
    own_error = math.sqrt(accuracy["base"] * (1 - accuracy["base"]) / len(base))
    return {
        "task": task,
        "metric": metric,
        "questions": len(base),
        "chance": chance,
        "above_chance": accuracy["base"] - chance > ABOVE_CHANCE * own_error,
        "base": accuracy["base"],
        "student": accuracy["student"],
        "difference": difference,
        "standard_error": error,
        "log_probability_difference": likelihood,
        "log_probability_standard_error": likelihood_error,
    }


def _average(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of tasks on which the base is above chance, each counting the same."""
    return {
        "tasks": len(rows),
        **{key: statistics.fmean(row[key] for row in rows) for key in ("base", "student", "difference")},
        "standard_error": math.sqrt(sum(row["standard_error"] ** 2 for row in rows)) / len(rows),
    }


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, and its standard error."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return statistics.fmean(differences), spread / math.sqrt(len(differences))


def _is_choice(sample: Sample) -> bool:
    """Whether it was answered by the log-likelihoods of several choices, of which `target` is the right one's index."""
    answers, target = sample["filtered_resps"], str(sample["target"])
    choices = len(answers) > 1 and all(isinstance(answer, tuple | list) for answer in answers)
    return choices and target.isdigit() and int(target) < len(answers)


def _log_probability(sample: Sample) -> float:
    """Of the right choice, among the choices."""
    values = [float(answer[0]) for answer in sample["filtered_resps"]]
    largest = max(values)
    return values[int(sample["target"])] - largest - math.log(sum(math.exp(value - largest) for value in values))
