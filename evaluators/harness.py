"""lm-evaluation-harness: the model it calls, and the tasks it runs. Import it late: lm-eval takes seconds to import."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import load_yaml
from torch import Tensor
from torch.nn.functional import pad

from ..registry import DataError, NonFiniteError, SpecError, Subject, near
from ..registry.tensors.tokens import check_token_ids
from .passes import device_of, setting, vocabulary_size
from .tasks import FOLDER

LOGGERS = ("lm_eval", "transformers.tokenization_utils_base", "datasets", "huggingface_hub")


class MaskedLM(HFLM):
    """The subject's model for lm-eval, with an attention mask for every batch that has padding.

    lm-eval pads shorter rows with token 0 on the right and passes no mask, but token 0 may be a real token. So lm-eval
    gets all ids plus one: 0 is then padding and nothing else. The model gets the original ids, and the logits get one
    more column in front to match lm-eval's ids. The order of the requests, by length and then by ids, does not change.

    Requests run task by task. Each task starts from the calibrated histories, so that no result depends on the other
    tasks.
    """

    def __init__(self, subject: Subject, batch_size: int, max_length: int | None):
        # lm-eval adds a padding token where there is none; the subject's tokenizer must not change.
        tokenizer = copy.deepcopy(subject.tokenizer)
        super().__init__(
            pretrained=subject.model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            logits_cache=True,
            softmax_dtype="float32",
        )
        self._device = device_of(subject.model)
        self._subject = subject
        self._task = ""
        self._steps: Iterator = iter(())
        self.shortened = 0
        """Number of prompts that lost their beginning because they, and what they generate, exceed ``max_length``."""

    @property
    def adds_bos(self) -> bool:
        """Whether lm-eval starts prompts with the tokenizer's BOS token."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tok_encode("a")[:1] == [bos]

    # The methods that lm-eval calls. Its progress bars are off: the subject's shows the batches.

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._by_task(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        return self._by_task(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        def run(chosen: list, disable_tqdm: bool) -> list[str]:
            with self._progress(math.ceil(len(chosen) / self.batch_size)):
                return super(MaskedLM, self).generate_until(chosen, disable_tqdm=disable_tqdm)

        return self._by_task(run, requests)

    def tok_batch_encode(self, strings: list[str], *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Ids (B, T) of prompts that are answered in words, and their mask; those without room lose their beginning."""
        room = options.get("left_truncate_len")
        self.shortened += sum(len(self.tok_encode(text)) > room for text in strings) if room else 0
        return super().tok_batch_encode(strings, *args, **options)

    def _by_task(self, run: Callable[..., list], requests: list) -> list:
        answers: list[Any] = [None] * len(requests)
        for self._task in dict.fromkeys(request.task_name for request in requests):
            chosen = [index for index, request in enumerate(requests) if request.task_name == self._task]
            self._subject.reset()
            found = run([requests[index] for index in chosen], disable_tqdm=True)
            for index, answer in zip(chosen, found, strict=True):
                answers[index] = answer
        return answers

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each (key, context ids, continuation ids), and whether it is the greedy choice."""
        requests = list(requests)
        self._check(requests)
        shifted = [(key, [i + 1 for i in context], [i + 1 for i in then]) for key, context, then in requests]
        # lm-eval computes requests that differ only in their last token as one row.
        rows = len({(*context, *then[:-1]) for _, context, then in shifted})
        # Rolling log-likelihoods come in one call per batch, too short to show progress.
        with self._progress(0 if override_bs else math.ceil(rows / self.batch_size)):
            answers = super()._loglikelihood_tokens(shifted, disable_tqdm=True, override_bs=override_bs)
        if any(math.isnan(value) for value, _ in answers):
            raise NonFiniteError(
                f"task {self._task}: a log-likelihood is NaN in {setting(self.model)['dtype']}; try model.dtype: "
                "float32 (or bfloat16 for float16)"
            )
        return answers

    def _check(self, requests: list) -> None:
        longest = max((len(then) for *_, then in requests), default=0)
        if longest > self.max_length:
            raise DataError(
                f"task {self._task}: an answer of {longest} tokens does not fit into max_length: {self.max_length}; "
                "raise it, or leave the task out"
            )
        if not all(context and then for _, context, then in requests):
            raise DataError(f"task {self._task}: an answer, or the context before it, has no tokens; fix the task")
        ids = [(min(part), max(part)) for _, *parts in requests for part in parts]
        check_token_ids(torch.tensor(ids), vocabulary_size(self.model), f"task {self._task}")
        self.shortened += sum(len(context) + len(then) > self.max_length + 1 for _, context, then in requests)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, 1 + V) of ids (B, T) that are the tokenizer's plus one, 0 for padding."""
        real = inps != 0
        masked = {} if bool(real.all()) else {"attention_mask": real.long()}
        next(self._steps, None)
        with torch.no_grad(), self._explained():
            logits = self.model(input_ids=(inps - 1).clamp(min=0), use_cache=False, **masked).logits
        return pad(logits.to(inps.device), (1, 0), value=-torch.inf)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        next(self._steps, None)
        with torch.no_grad(), self._explained():
            return super()._model_generate(*args, **kwargs)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Adds the task and the remedy to the error of a prompt that the pruned model cannot process."""
        try:
            yield
        except DataError as error:
            raise DataError(
                f"task {self._task}, with prompts of up to {self.max_length} tokens: {error}. For zero_shot: lower its "
                "max_length, or raise calibration.length"
            ) from error

    @contextmanager
    def _progress(self, batches: int) -> Iterator[None]:
        label = f"zero_shot {self._task}"
        self._steps = iter(self._subject.progress(range(batches), label, batches)) if batches else iter(())
        try:
            yield
            for _ in self._steps:  # closes the progress display
                pass
        finally:
            self._steps = iter(())


@contextmanager
def quiet() -> Iterator[None]:
    """A context in which lm-eval and the libraries that load its data print nothing."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    tqdm = lm_eval.api.task.tqdm
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, *args, **kwargs: items
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_tasks(names: Sequence[str], folders: Sequence[Path], fewshot: int | None, seed: int) -> dict[str, dict]:
    """The tasks behind each name, in the form that lm-eval's ``evaluate`` takes.

    ``fewshot`` is the number of examples before each question, for tasks that do not fix it; ``seed`` chooses them.
    Relative data files of a task in ``folders`` start at the folder of its file. Raises :class:`SpecError` for an
    unknown name or a task that lm-eval cannot build, and :class:`DataError` for data that cannot be loaded.
    """
    local, manager = _managers(names, folders)
    loaded = {}
    with _data_next_to(local):
        for name in names:
            try:
                loaded[name] = manager.load([name])
            except DataError:
                raise
            except Exception as error:
                raise SpecError(
                    f"zero_shot.tasks: lm-eval cannot load {name!r}: {first_line(error)}; fix its file"
                ) from error
    for found in loaded.values():
        for task in found["tasks"].values():
            fixed = task.get_config("num_fewshot")
            if fixed is None or (fewshot is not None and fixed != 0):
                task.set_config(key="num_fewshot", value=fewshot or 0)
            task.set_fewshot_seed(seed=seed)
    return loaded


def listed_metrics(names: Sequence[str], folders: Sequence[Path]) -> dict[str, list[str]]:
    """The metrics of each task behind ``names`` whose file lists them, from lm-eval's index; no data is loaded.

    Raises :class:`SpecError` for an unknown name.
    """
    index = _managers(names, folders)[1].task_index
    found: dict[str, list[str]] = {}
    asked, seen = list(names), set()
    while asked:
        entry = index.get(asked.pop())
        if entry is None or entry.name in seen:  # a group may define members in its own file: loading checks those
            continue
        seen.add(entry.name)
        if entry.kind.name == "TAG":
            asked += sorted(entry.tags)
        elif entry.kind.name == "GROUP":
            members = entry.cfg.get("task")
            asked += [name for name in members if isinstance(name, str)] if isinstance(members, list) else []
        elif metrics := _metrics(entry.cfg):
            found[entry.name] = metrics
    return found


def has_named_metrics(task: Any) -> bool:
    """Whether a loaded task's scores have the names that it lists: a function that scores texts may name its own."""
    if task.OUTPUT_TYPE != "generate_until":
        return True
    return all(isinstance(metric.get("metric"), str) for metric in task.config.metric_list or ())


def _metrics(config: Mapping[str, Any]) -> list[str]:
    """The metrics that a task's file lists; none where only loading or running the task tells them."""
    if config.keys() & {"class", "process_results"} or config.get("output_type") == "generate_until":
        return []
    names = [str(metric.get("metric")) for metric in config.get("metric_list") or () if isinstance(metric, Mapping)]
    # The index has the path of its file for a function, whose name is known only after it is loaded.
    return [] if any("/" in name or "\\" in name for name in names) else names


def _managers(names: Sequence[str], folders: Sequence[Path]) -> tuple[TaskManager, TaskManager]:
    """lm-eval's index of the bundled tasks and ``folders``, and one that has all ``names``: the same where it can be.

    Indexing all of lm-eval's own 14,000 tasks takes a minute. So only the folders are indexed whose files define a
    name; where that does not suffice (groups, tags), all of them. Raises :class:`SpecError` for an unknown name, and
    for a file in ``folders`` that cannot be read where a name is not local.
    """
    places = (FOLDER, *folders)
    local = TaskManager(include_path=[str(place) for place in places], include_defaults=False)
    # A group is not enough: its members may be lm-eval's own.
    missing = set(names) - {*local.all_subtasks, *local.all_tags}
    if not missing:
        return local, local
    for path in [path for folder in folders for path in sorted(folder.rglob("*.yaml"))]:
        try:  # the index leaves out a file with an error
            load_yaml(path, resolve_func=False)
        except Exception as error:
            raise SpecError(f"zero_shot.task_folder: lm-eval cannot read {path}: {first_line(error)}; fix it") from None
    files = _task_files()
    for name in sorted(missing - files.keys() - set(local.all_tasks)):
        if not _mentioned(name):
            raise _unknown(name, [*files, *local.all_tasks])
    if all(len(files.get(name, ())) == 1 for name in missing):
        needed = sorted({files[name][0].parent for name in missing})
        some = TaskManager(include_path=[str(place) for place in (*needed, *places)], include_defaults=False)
        if missing <= set(some.all_subtasks):
            return local, some
    everything = _everything(places, tuple(local.all_tasks))
    for name in names:
        if name not in everything.all_tasks:
            raise _unknown(name, everything.all_tasks)
    return local, everything


def _unknown(name: str, known: Sequence[str]) -> SpecError:
    return SpecError(
        f"zero_shot.tasks: lm-eval knows no task or group {name!r}{near(name, known)}; "
        "`lm_eval ls tasks` lists its own, and task_folder adds yours"
    )


def _task_texts() -> Iterator[tuple[Path, str]]:
    """Each of lm-eval's own task files, and of the files that they include, with its text."""
    root = Path(lm_eval.tasks.__file__).parent
    return ((path, path.read_text("utf-8", "replace")) for path in sorted(root.rglob("*yaml*")) if path.is_file())


@lru_cache(maxsize=1)
def _task_files() -> dict[str, list[Path]]:
    """The files with a line that defines each task or group, found in their text, without reading them as YAML."""
    found: dict[str, list[Path]] = {}
    for path, text in _task_texts():
        for name in re.findall(r"""^(?:task|group):[ \t]*["']?([^\s"'#\[\]{}]+)""", text, re.MULTILINE):
            found.setdefault(name, []).append(path)
    return found


def _mentioned(name: str) -> bool:
    """Whether a name occurs in any of lm-eval's files; else it is not a tag either."""
    return any(name in text for _, text in _task_texts())


@lru_cache(maxsize=2)
def _everything(folders: tuple[Path, ...], local: tuple[str, ...]) -> TaskManager:
    """lm-eval's tasks and those of ``folders``; ``local`` are their names, so that a new task makes a new index."""
    return TaskManager(include_path=[str(folder) for folder in folders])


@contextmanager
def _data_next_to(local: TaskManager) -> Iterator[None]:
    """A context in which relative data files of ``local`` tasks start at the folder of the task's file.

    lm-eval starts at the current folder, and does not tell a task where its file is.
    """
    stock = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        options, name = dict(dataset_kwargs or {}), task.config.task
        if name in local.task_index:
            folder = local.task_index[name].yaml_path.parent
            options |= {key: _located(options[key], folder) for key in ("data_files", "data_dir") if key in options}
        try:
            stock(task, options, **kwargs)
        except Exception as error:
            source = " ".join(str(part) for part in (task.config.dataset_path, task.config.dataset_name) if part)
            raise DataError(
                f"zero_shot: the data of task {name} ({source}) cannot be loaded: {first_line(error)}; without a "
                "network, fetch it once where there is one, or describe a local copy in a task_folder"
            ) from error

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = stock


def _located(files: Any, folder: Path) -> Any:
    """Paths of data files in nested lists and dicts, relative ones from ``folder``; addresses do not change."""
    if isinstance(files, Mapping):
        return {key: _located(value, folder) for key, value in files.items()}
    if isinstance(files, (list, tuple)):
        return [_located(value, folder) for value in files]
    if not isinstance(files, str) or "://" in files:
        return files
    return str(folder / Path(files).expanduser())


def first_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
