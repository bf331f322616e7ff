"""Accuracy on the tasks of lm-evaluation-harness, through its Python API on the live model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy
from pydantic import Field, field_validator, model_serializer

from ..registry import Evaluator, Measurement, SpecError, Subject, hookimpl, near
from ..registry.tensors.tokens import context_length
from .passes import setting

PRESETS: dict[str, tuple[str, ...]] = {
    "paper7": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
}
"""Names that stand for several tasks. paper7: the seven tasks in the tables of LLM-Pruner, FLAP and PP."""

LARGE_ERROR = 0.05
"""Standard error of an accuracy from which a note says that the questions are few."""

LLM_PRUNER: dict[str, str] = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "openbookqa": "acc_norm"}
"""Tasks with acc_norm in LLM-Pruner's table and in tables that repeat its dense row. All other tasks have acc."""


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """A context in which the two random generators that tasks use start from ``seed``; restores their states."""
    states = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _or_alone(schema: dict[str, Any]) -> None:
    """Change the JSON Schema of a list so that a single item needs no brackets."""
    listed = {key: schema.pop(key) for key in ("type", "items", "minItems") if key in schema}
    schema["anyOf"] = [listed["items"], listed]


class ZeroShot(Evaluator):
    """Accuracy on tasks of lm-evaluation-harness with its standard error, and the mean over the tasks.

    Answers are compared by their log-likelihood after the prompt, from a float32 log-softmax. lm-eval sorts a task's
    requests by length, longest first, and runs ``batch_size`` at a time. The answers of a strategy that probes depend
    on both, so both are fixed and recorded, and every task starts from the calibrated histories. Batches with rows of
    different lengths are padded on the right and get an attention mask, which lm-eval alone does not pass.
    """

    name: Literal["zero_shot"] = "zero_shot"
    tasks: tuple[str, ...] = Field(
        default=("true_continuation",),
        min_length=1,
        json_schema_extra=_or_alone,
        description="lm-eval's tasks or groups, those of task_folder, true_continuation (bundled), or paper7: BoolQ, "
        "PIQA, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA",
    )
    task_folder: tuple[Path, ...] = Field(
        default=(),
        json_schema_extra=_or_alone,
        description="folders with task files (.yaml) of your own; relative data files start at the task file's folder",
    )
    metric: str = Field(
        default="acc",
        description="the metric of every task, such as acc, acc_norm or exact_match; llm_pruner: acc_norm for "
        "HellaSwag, ARC-Challenge and OpenBookQA, else acc, as in LLM-Pruner's table",
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, description="solved examples before each question; null: the task's own"
    )
    limit: int | None = Field(default=None, ge=1, description="use at most this many documents of each task")
    batch_size: int = Field(default=32, ge=1, description="rows per batch; strategies that probe decide per batch")
    max_length: int | None = Field(
        default=None, ge=2, description="most tokens of a prompt, the last ones; null: the model's context"
    )
    seed: int = Field(
        default=1234,
        ge=0,
        lt=2**32,
        description="seed of the solved examples and of whatever tasks draw; 1234 is lm-eval's default",
    )
    apply_chat_template: bool = Field(
        default=False,
        description="ask as a user of the tokenizer's chat template, solved examples as turns of the chat; as "
        "lm-eval's option of this name",
    )

    @model_serializer(mode="wrap")
    def _without_later_default(self, handler: Any) -> dict[str, Any]:
        # The option is newer than stored trials, whose keys are made of what is written.
        return {key: value for key, value in handler(self).items() if key != "apply_chat_template" or value}

    @field_validator("tasks", "task_folder", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) else value

    @field_validator("task_folder")
    @classmethod
    def _has_tasks(cls, folders: tuple[Path, ...]) -> tuple[Path, ...]:
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"there is no folder {folder}; name one that holds lm-eval task files (.yaml)")
            if next(folder.rglob("*.yaml"), None) is None:
                raise ValueError(f"{folder} holds no lm-eval task file (.yaml); name a folder that does")
        return folders

    @property
    def _names(self) -> tuple[str, ...]:
        """Names of tasks and groups, each once, presets replaced by their tasks."""
        return tuple(dict.fromkeys(name for task in self.tasks for name in PRESETS.get(task, (task,))))

    def check_options(self) -> None:
        """Raise SpecError for an unknown task, and for a metric that the task's file does not list."""
        from . import harness

        with harness.quiet():
            listed = harness.listed_metrics(self._names, self.task_folder)
        for task, metrics in listed.items():
            self._key(task, {f"{metric},": None for metric in metrics})

    def check(self, model: Any) -> None:
        """Raise SpecError where ``max_length`` is beyond the model's context."""
        context = context_length(model)
        if self.max_length and context and self.max_length > context:
            raise SpecError(
                f"zero_shot.max_length: {self.max_length} tokens are more than the model's context of {context}; "
                f"set max_length to {context} or less"
            )

    def plan(self, subject: Subject) -> str:
        """The tasks, and how many documents of each."""
        count = "all documents, fewer with limit" if self.limit is None else f"{self.limit} documents each"
        return f"{', '.join(self._names)}: {count}"

    def evaluate(self, subject: Subject) -> Measurement:
        """Run the tasks.

        Raises SpecError (unknown task or metric, context exceeded) and DataError (data of a task that cannot be
        loaded, a prompt that cannot be used).
        """
        from . import harness

        self.check(subject.model)
        self._check_tokenizer(subject.tokenizer)
        context = context_length(subject.model)
        names = self._names
        with harness.quiet(), _drawing_from(self.seed):
            loaded = harness.load_tasks(names, self.task_folder, self.num_fewshot, self.seed)
            for name, task in [pair for one in loaded.values() for pair in one["tasks"].items()]:
                if task.OUTPUT_TYPE == "generate_until" and subject.tokenizer.eos_token_id is None:
                    raise SpecError(
                        f"zero_shot: task {name} generates text, and the tokenizer has no EOS token to end it"
                    )
                if not callable(task.config.process_results) and harness.has_named_metrics(task):
                    self._key(name, {f"{metric},": None for metric in task.aggregation()})
            lm = harness.MaskedLM(subject, self.batch_size, self.max_length or context)
            results = {name: self._run(lm, loaded[name]) for name in names}
        return self._measurement(subject, lm, results)

    def _check_tokenizer(self, tokenizer: Any) -> None:
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise SpecError(
                "zero_shot: the tokenizer has neither a BOS nor an EOS token, and lm-eval begins with one of them if a "
                "question has no context; set bos_token or eos_token in tokenizer_config.json, or leave zero_shot out"
            )
        if self.apply_chat_template and not tokenizer.chat_template:
            raise SpecError(
                "zero_shot.apply_chat_template: the tokenizer has no chat template; use an instruction-tuned model, or "
                "set apply_chat_template to false"
            )

    def _run(self, lm: Any, task_dict: Mapping[str, Any]) -> dict[str, Any]:
        from lm_eval.api.metrics import mean
        from lm_eval.evaluator import evaluate

        # The standard error of a mean has a formula; for all others lm-eval bootstraps for minutes.
        plain = all(each is mean for task in task_dict["tasks"].values() for each in task.aggregation().values())
        chat = self.apply_chat_template
        options = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
        try:
            return evaluate(
                lm=lm,
                task_dict=task_dict,
                limit=self.limit,
                bootstrap_iters=int(plain),
                log_samples=True,
                **options,
            )
        except (AssertionError, ValueError) as error:  # lm-eval raises these for bad settings of a task
            raise SpecError(f"zero_shot: lm-eval cannot run {', '.join(task_dict['tasks'])}: {error}") from error

    def _measurement(self, subject: Subject, lm: Any, results: Mapping[str, Any]) -> Measurement:
        scored: dict[str, float] = {}
        protocol_tasks: dict[str, dict[str, Any]] = {}
        scores: dict[str, list[float | None]] = {}
        errors: dict[str, float | None] = {}
        for name, result in results.items():
            measured = result["results"]
            whole = name in measured and any("," in key for key in measured[name])
            for task in (name,) if whole else tuple(result["samples"]):
                key = self._key(task, measured[task])
                scored[task] = measured[task][key]
                metric, _, filter_name = key.partition(",")
                error = measured[task].get(f"{metric}_stderr,{filter_name}")
                errors[f"{task}_stderr"] = error if isinstance(error, float) else None
                protocol_tasks[task] = {"metric": key, "version": str(result["versions"].get(task))}
            for task, documents in result["samples"].items():
                metric, _, filter_name = self._key(task, measured[task]).partition(",")
                chosen = [one[metric] for one in documents if one["filter"] == filter_name]
                scores[task] = [float(one) if isinstance(one, (int, float)) else None for one in chosen]
                protocol_tasks.setdefault(task, {"part_of": name, "version": str(result["versions"].get(task))})
                protocol_tasks[task] |= {"documents": len(chosen), "num_fewshot": result["n-shot"].get(task)}
        protocol = {
            "lm_eval": version("lm_eval"),
            "tasks": protocol_tasks,
            "limit": self.limit,
            "batch_size": self.batch_size,
            "order": "task by task from calibrated histories; within a task by length, longest first",
            "padding": "right, with attention mask (generation: left)",
            "logits_cache": True,
            "log_softmax": "float32",
            "max_length": lm.max_length,
            "bos": lm.adds_bos,
            "seed": self.seed,
            **({"chat_template": "the tokenizer's"} if self.apply_chat_template else {}),
            **setting(subject.model),
        }
        notes = [f"{lm.shortened} prompts did not fit in {lm.max_length} tokens and lost their beginning"]
        notes = notes if lm.shortened else []
        notes += [
            f"{task}: {protocol_tasks[task]['documents']} questions have a standard error of {100 * error:.1f} points; "
            "smaller differences show nothing (raise limit)"
            for task in scored
            if (error := errors[f"{task}_stderr"]) and error > LARGE_ERROR and "documents" in protocol_tasks[task]
        ]
        values = {**scored, **errors, "mean": fmean(scored.values())}
        return Measurement(values, protocol, notes, {"scores": scores})

    def _key(self, task: str, measured: Mapping[str, Any]) -> str:
        """The metric's key in lm-eval's results, with its filter, such as ``acc,none``; raises SpecError."""
        wanted = LLM_PRUNER.get(task, "acc") if self.metric == "llm_pruner" else self.metric
        keys = [key for key in measured if "," in key and "_stderr," not in key]
        for key in keys:
            metric, _, filter_name = key.partition(",")
            if wanted in (key, metric) or (not filter_name and wanted.partition(",")[0] == metric):
                return key
        known = ", ".join(dict.fromkeys(key.removesuffix(",none").rstrip(",") for key in keys))
        raise SpecError(
            f"zero_shot.metric: task {task} has no metric {wanted!r}{near(wanted, known.split(', '))}; it has "
            f"{known or 'none'}. List one zero_shot per metric"
        )


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [ZeroShot]
