"""LoRA on every linear layer of a decoder, trained with transformers' Trainer and added to the weights.

Low-rank updates are from Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022, arXiv 2106.09685);
recovering a pruned model with them is from Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models"
(NeurIPS 2023, arXiv 2305.11627).
"""

from __future__ import annotations

import importlib.metadata
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ...registry import ModelError, NonFiniteError, SpecError
from ..calibration.passes import Progress
from ..files.recover import Recover

OPTIONS = ("rank", "alpha", "dropout", "steps", "learning_rate", "batch_size", "accumulate", "seed")
"""Those of the options that a description of the training repeats."""

AVERAGED = 10
"""Largest number of steps over which the first and the last recorded loss are averaged."""


def train(model: Any, sequences: Sequence[Tensor], lora: Recover, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """Train the linear weights in the decoder layers of ``model``; returns the model and a description of the training.

    Shapes, names, dtype and biases stay. ``sequences`` are token ids (t,). ``lora.seed`` sets the random state of
    Python, numpy and torch, which is afterwards what it was. Raises :class:`NonFiniteError` for a loss or a weight that
    is NaN or infinite, :class:`ModelError` for a model that is partly on disk, out of memory, or without an nn.Linear.
    """
    import peft
    import transformers

    check_in_memory(model)
    targets = linear_layers(model)
    if not targets:
        raise ModelError(
            f"recover: no decoder layer of this {type(model).__name__} has an nn.Linear, and updates are trained for "
            "those alone; leave recovery out"
        )
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft declares int and takes any number
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    began = time.perf_counter()
    with _random_state_kept(), torch.inference_mode(False), torch.enable_grad():
        transformers.set_seed(_seed(lora))  # the updates start with random values
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=True)  # float32 updates for half precision
        trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        losses = _run(adapted, sequences, lora, progress)
        try:
            merged = adapted.merge_and_unload(safe_merge=True).eval().requires_grad_(False)
        except ValueError as error:  # peft raises it for weights that are not finite
            raise _not_finite("a weight", lora.steps, lora) from error
    several = max(1, min(AVERAGED, len(losses) // 2))
    first, last = (sum(some) / several for some in (losses[:several], losses[-several:]))
    return merged, {
        "method": "lora",
        "peft": importlib.metadata.version("peft"),
        **{key: getattr(lora, key) for key in OPTIONS},
        "layers": sorted({name.rpartition(".")[2] for name in targets}),
        "schedule": "linear",
        "warmup_steps": lora.warmup,
        "trainable_parameters": trainable,
        "epochs": round(lora.taken / len(sequences), 3),
        "loss": {"first": first, "last": last, "averaged_over_steps": several},
        "seconds": round(time.perf_counter() - began, 1),
    }


def check_in_memory(model: nn.Module) -> None:
    """Raise :class:`ModelError` for a model with weights that lie elsewhere until they are computed with."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ModelError(
            "recover: the model does not fit on the devices here, and offloaded weights cannot be trained; free some "
            "memory, or take a smaller model"
        )


def _seed(lora: Recover) -> int:
    """The seed as numpy takes it."""
    return lora.seed % 2**32


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A context after which Python, numpy and torch draw what they would have drawn without it."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)


def linear_layers(model: Any) -> list[str]:
    """Full names of all linear layers in the decoder layers, without embeddings and output layer."""
    layers = model.get_decoder().layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return [f"{prefix}.{name}" for name, module in layers.named_modules() if isinstance(module, nn.Linear)]


def _run(model: Any, sequences: Sequence[Tensor], lora: Recover, progress: Progress) -> list[float]:
    """Train in place, and return the loss of every step."""
    import transformers

    kind = model.device.type
    with tempfile.TemporaryDirectory(prefix="prunekit-recover-") as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=lora.steps,
            per_device_train_batch_size=lora.batch_size,
            gradient_accumulation_steps=lora.accumulate,
            learning_rate=lora.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=lora.warmup,
            seed=_seed(lora),
            data_seed=_seed(lora),
            use_cpu=kind == "cpu",
            # float16 gradients vanish unless the loss is scaled, and only CUDA has the scaler.
            fp16=model.dtype == torch.float16 and kind == "cuda",
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=kind == "cuda",
        )
        _check_device(arguments, model)
        arguments._n_gpu = min(1, arguments.n_gpu)  # otherwise every CUDA device gets a copy and the batch grows
        watch = _watching(lora, progress)
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in sequences],
            callbacks=[watch],
        )
        trainer.remove_callback(transformers.PrinterCallback)  # it prints to stdout
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"recover: training does not fit in the memory of {model.device} with batch_size: {lora.batch_size}; "
                "lower it and raise accumulate by as much, or shorten length"
            ) from error
        finally:
            watch.close()
    return watch.losses


def _check_device(arguments: Any, model: Any) -> None:
    """Raise :class:`SpecError` if the Trainer would move the model to another device."""
    wanted, taken = model.device, arguments.device
    if (wanted.type, wanted.index or 0) != (taken.type, taken.index or 0):
        raise SpecError(
            f"device {wanted}: transformers' Trainer uses {taken} here; set CUDA_VISIBLE_DEVICES={wanted.index or 0} "
            "and the device cuda, or use the device cpu"
        )


def _watching(lora: Recover, progress: Progress) -> Any:
    """A callback that moves the bar, keeps the losses, and raises at one that is not finite."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self._bar = iter(progress(iter(range(lora.steps + 1)), "training", lora.steps))

        def on_train_begin(self, args, state, control, **kwargs):
            next(self._bar, None)

        def on_step_end(self, args, state, control, **kwargs):
            next(self._bar, None)

        def on_log(self, args, state, control, logs=None, **kwargs):
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(float(loss)):
                raise _not_finite("the loss", state.global_step, lora)
            self.losses.append(float(loss))

        def close(self) -> None:
            getattr(self._bar, "close", lambda: None)()

    return Watch()


def _not_finite(what: str, step: int, lora: Recover) -> NonFiniteError:
    return NonFiniteError(
        f"recover: {what} is NaN or infinite at step {step} of {lora.steps}, so nothing was written; lower "
        f"learning_rate (found {lora.learning_rate:g}), or take the model in float32 or bfloat16 if it is float16"
    )
