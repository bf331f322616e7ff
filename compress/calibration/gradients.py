"""Gradients of the loss, reduced matrix by matrix: what a :class:`~prunekit.registry.GradientScorer` reads.

A backward pass visits the matrices one after the other. As soon as the gradient of one is there, it is reduced to a
vector, or added to a float32 sum, and freed: no two gradients are in memory at once. The model's flags, gradients and
forwards are as before afterwards, also after an error.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...registry import (
    DataError,
    GradientScorer,
    GroupPart,
    MatrixGradient,
    ModelError,
    NonFiniteError,
    PluginError,
    Producer,
)
from ...registry.errors import FINITE_REMEDY, is_out_of_memory
from ...registry.tensors.devices import device_of
from ...registry.tensors.linears import is_transposed
from ..engine.engine import Engine
from ..engine.shapes import checked
from ..engine.site_cut import SiteCut
from .covariance import free_memory
from .passes import Batch, Progress, differentiating

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
"""Factors of the loss where weights are float16, whose small gradients vanish; the next one is taken where gradients
overflow."""

Known = MutableMapping[str, tuple[GroupPart, ...]]
"""Reduced gradients of sites, by site and scorer."""


def gather_gradients(engine: Engine, batches: Sequence[Batch], progress: Progress, known: Known) -> None:
    """Give every site what its scorer makes of the gradients of its matrices on these batches.

    ``known`` has what this text has shown already, and gets what is gathered. Raises :class:`ModelError` for weights
    that cannot be differentiated, :class:`NonFiniteError` for a loss or a gradient that is not finite,
    :class:`DataError` for a text without a token to predict; they name the matrix or the batch.
    """
    scorer: Any = engine.strategy.scorer
    waiting = [cut for cut in engine.cuts if _key(cut, scorer) not in known]
    if waiting:
        matrices = [matrix for cut in waiting for matrix in matrices_of(cut, scorer)]
        _check(engine.model, matrices)
        _gather(engine, scorer, matrices, parts_of_text(batches, scorer.needs_squares), progress)
        for cut in waiting:
            mine = [matrix for matrix in matrices if matrix.cut is cut]
            known[_key(cut, scorer)] = tuple(part for matrix in mine for part in matrix.parts())
    for cut in engine.cuts:
        cut.state.gradients = known[_key(cut, scorer)]


def _key(cut: SiteCut, scorer: GradientScorer) -> str:
    return f"{cut.site.consumer} {cut.site.units} {scorer.identity_text}"


class Matrix:
    """A matrix of a site's group, with the sums of its gradients or the vector that they were reduced to."""

    def __init__(self, cut: SiteCut, scorer: GradientScorer, linear: nn.Linear, path: str, producer: Producer | None):
        self.cut, self.scorer, self.linear, self.path, self.producer = cut, scorer, linear, path, producer
        self.forget()

    @property
    def weight(self) -> nn.Parameter:
        return self.linear.get_parameter("weight")

    def forget(self) -> None:
        """Begin again."""
        self._gradient: Tensor | None = None
        self._squares: Tensor | None = None
        self._vector: Tensor | None = None

    def take(self, part: TextPart, scale: float, at_once: bool) -> None:
        """Take over the gradient that the weight has now, of the part's mean loss times ``scale``, and free it."""
        found, self.weight.grad = self.weight.grad, None
        assert found is not None  # called when it has been computed
        if not bool(torch.isfinite(found).all()):
            raise _NotFinite(self.path)
        gradient = found.float().div(scale)
        del found
        squares = gradient.square().mul_(part.share_of_rows) if self.scorer.needs_squares else None
        gradient.mul_(part.share_of_tokens)
        if at_once:
            vector = self._reduced(gradient, squares)
            self._vector = vector if self._vector is None else self._vector + vector
            return
        self._gradient = gradient if self._gradient is None else self._gradient.add_(gradient)
        if squares is not None:
            self._squares = squares if self._squares is None else self._squares.add_(squares)

    def finish(self) -> None:
        """Reduce the sums, once the whole text has been read."""
        if self._gradient is not None:
            self._vector = self._reduced(self._gradient, self._squares)
            self._gradient = self._squares = None
        if self._vector is None:
            raise ModelError(
                f"{self.path} got no gradient: the loss does not depend on it, or its block computes without "
                "differentiating (fused kernels, or a forward under no_grad); undo that, leave the layer out "
                "(skip_layers), or use a scorer without gradients, such as wanda_sp"
            )

    def _reduced(self, gradient: Tensor, squares: Tensor | None) -> Tensor:
        """The scorer's vector (R,)."""
        reads = self.producer is None
        turns = reads != is_transposed(self.linear)

        def turned(tensor: Tensor) -> Tensor:
            return tensor.t() if turns else tensor

        weight = turned(self.weight.detach().float())
        given = MatrixGradient(self.path, weight, turned(gradient), None if squares is None else turned(squares), reads)
        try:
            vector = self.scorer.reduce(given)
        except RuntimeError as error:  # else it would look like an error of the backward pass
            raise PluginError(f"scorer {self.scorer.name}: reduce failed at {self.path}: {error}") from error
        return checked(vector, weight.shape[:1], "reduce", "scorer", self.scorer, self.cut.site).float()

    def parts(self) -> Iterator[GroupPart]:
        """The vector by units, on the device of the site's consumer."""
        assert self._vector is not None
        site, vector = self.cut.site, self._vector.to(device_of(self.cut.binding.consumer))
        units = torch.arange(site.units, device=vector.device)
        columns = vector.numel() and self.weight.numel() // vector.numel()
        rows = [site.columns(units)] if self.producer is None else [s.of(units) for s in self.producer.segments]
        for mine in rows:
            values = vector[mine].view(site.units, -1)
            yield GroupPart(self.path, values, values.shape[1] * columns, self.producer is None)


def matrices_of(cut: SiteCut, scorer: GradientScorer) -> list[Matrix]:
    """The matrices of a site's group: its producers, and the consumer."""
    producers = [Matrix(cut, scorer, linear, each.path, each) for linear, each in cut.binding.producers]
    return [*producers, Matrix(cut, scorer, cut.binding.consumer, cut.site.consumer, None)]


class TextPart:
    """A part of the text that takes one backward pass."""

    def __init__(self, place: str, batch: Batch):
        self.place, self.batch = place, {key: value.clone() for key, value in batch.items()}
        real = self.batch.get("attention_mask", torch.ones_like(self.batch["input_ids"])).bool()
        self.targets = self.batch["input_ids"][:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
        self.predicted = int((self.targets != -100).sum())
        self.share_of_tokens = self.share_of_rows = 0.0
        """Of the predicted tokens of the text, and of its passes."""


def parts_of_text(batches: Sequence[Batch], by_row: bool) -> list[TextPart]:
    """The batches, or their rows one by one; those without a token to predict are left out.

    Raises :class:`DataError` where none is left.
    """
    parts = []
    for number, batch in enumerate(batches):
        place = f"calibration batch {number}"
        if by_row:
            rows = range(len(batch["input_ids"]))
            parts += [
                TextPart(f"{place}, row {row}", {key: value[row : row + 1] for key, value in batch.items()})
                for row in rows
            ]
        else:
            parts.append(TextPart(place, batch))
    parts = [part for part in parts if part.predicted]
    if not parts:
        raise DataError(
            "gradients are those of the loss of the next token, and no row of the calibration text has two tokens; "
            "calibrate with longer sequences"
        )
    total = sum(part.predicted for part in parts)
    for part in parts:
        part.share_of_tokens, part.share_of_rows = part.predicted / total, 1 / len(parts)
    return parts


def _check(model: nn.Module, matrices: Sequence[Matrix]) -> None:
    """Raise :class:`ModelError` for weights that have no gradients."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ModelError(
                f"{name} is offloaded, and gradients need the whole model in memory: load it in a smaller dtype or on "
                "larger devices, or use a scorer without gradients, such as wanda_sp"
            )
        if parameter.is_inference():
            raise ModelError(
                f"{name} was made in inference mode, so that it has no gradient; load the model outside of "
                "torch.inference_mode()"
            )
    for matrix in matrices:
        weight = matrix.weight
        if weight.dtype not in FLOATS:
            raise ModelError(
                f"{matrix.path}: a weight of {str(weight.dtype).removeprefix('torch.')} has no gradient; load the "
                "model unquantised, or use a scorer without gradients, such as wanda_sp"
            )
        if getattr(weight, "_post_accumulate_grad_hooks", None):
            raise ModelError(
                f"{matrix.path}: the weight has a hook that acts on its gradient (an optimizer in the backward pass, "
                "say), which would run here, too; remove that hook first"
            )


class _NotFinite(Exception):
    """A gradient is not finite; the argument is the path of its matrix."""


def _gather(
    engine: Engine, scorer: GradientScorer, matrices: Sequence[Matrix], parts: Sequence[TextPart], progress: Progress
) -> None:
    """Run every part of the text, forward and backward, and have every matrix take its gradients."""
    scales = SCALES if any(p.dtype == torch.float16 for p in engine.model.parameters()) else SCALES[-1:]
    at_once = scorer.additive or len(parts) == 1
    groups = [matrices] if at_once else grouped(matrices, scorer)
    for scale in scales:
        try:
            passes = ((group, part) for group in groups for part in parts)
            for group, part in progress(passes, "gradients", len(groups) * len(parts)):
                _pass(engine, scorer, group, part, scale, at_once)
                if part is parts[-1]:
                    for matrix in group:
                        matrix.finish()
            return
        except _NotFinite as error:
            path = error.args[0]
            for matrix in matrices:
                matrix.forget()
    raise NonFiniteError(
        f"{path}: NaN or infinity in the gradient of the loss on the calibration text; nothing was pruned. "
        f"{FINITE_REMEDY}"
    )


def grouped(matrices: Sequence[Matrix], scorer: GradientScorer) -> list[list[Matrix]]:
    """Matrices in groups whose float32 sums fit in memory together; a matrix that does not fit is alone."""
    groups: list[list[Matrix]] = []
    left: dict[torch.device, float] = {}
    for matrix in matrices:
        device, size = matrix.weight.device, 4 * (1 + scorer.needs_squares) * matrix.weight.numel()
        limit = free_memory(device) if scorer.memory_gib is None else scorer.memory_gib * 2**30
        if not groups or left.get(device, limit) < size:
            groups.append([])
            left.clear()
        groups[-1].append(matrix)
        left[device] = left.get(device, limit) - size
    return groups


def _pass(
    engine: Engine, scorer: GradientScorer, matrices: Sequence[Matrix], part: TextPart, scale: float, at_once: bool
) -> None:
    """One forward and backward pass."""

    def take(matrix: Matrix, weight: Tensor) -> None:
        with torch.no_grad():
            matrix.take(part, scale, at_once)

    with ExitStack() as stack:
        stack.enter_context(engine.mode_of("calibrate"))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(differentiating(engine.model, [matrix.weight for matrix in matrices]))
        if scorer.gradient_checkpointing:
            stack.enter_context(_checkpointed(engine.layers))
        for matrix in matrices:
            stack.callback(matrix.weight.register_post_accumulate_grad_hook(partial(take, matrix)).remove)
        try:
            loss = _loss(engine, part)
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(
                    f"{part.place}: the loss of the model is NaN or infinite, so it has no gradients; nothing was "
                    f"pruned. {FINITE_REMEDY}"
                )
            if loss.requires_grad:
                (loss * scale).backward()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise ModelError(
                    f"the backward pass of {part.place} {tuple(part.targets.shape)} does not fit in memory; lower "
                    f"calibration.batch_size, or set scorer: {{name: {scorer.name}, gradient_checkpointing: true}}, or "
                    "its memory_gib, the most that sums of gradients may take"
                ) from error
            raise ModelError(
                f"this {type(engine.model).__name__} cannot be differentiated (a fused kernel without gradients, say): "
                f"{str(error).splitlines()[0]:.200}; load it with another attention implementation "
                "(attn_implementation: eager), or use a scorer without gradients, such as wanda_sp"
            ) from error


def _loss(engine: Engine, part: TextPart) -> Tensor:
    """The mean loss of the part's predicted tokens, in float32."""
    device, model = device_of(engine.embeddings), engine.model
    logits = model(**{key: value.to(device) for key, value in part.batch.items()}, use_cache=False).logits
    targets = part.targets.to(logits.device).reshape(-1)
    return functional.cross_entropy(logits[:, :-1].reshape(len(targets), -1).float(), targets, ignore_index=-100)


@contextmanager
def _checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the backward pass computes every layer again, and no activation is kept between layers' ends."""
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward
