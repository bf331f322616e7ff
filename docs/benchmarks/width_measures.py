"""Parts A and B of compensation_width.py: each function runs in its own process and returns plain numbers."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import transformers
from prunekit.compress.pruning.prune import prune
from prunekit.compress.pruning.pruned import Pruned
from prunekit.evaluators.cost import formulas
from prunekit.registry import ChannelMoments, Site, SiteCovariance, complement
from prunekit.registry.tensors.moments import CHUNK
from prunekit.strategies.compensation import LeastSquares
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from width_sizes import HEADS, RIDGE, Sizes

VOCABULARY = 1000


def build(sizes: Sizes) -> Any:
    """A LLaMA of one layer with random weights, float32."""
    torch.set_num_threads(sizes.threads)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.outputs,
        intermediate_size=sizes.channels,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=sizes.length,
        tie_word_embeddings=True,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids (rows, length)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def cut_one(model: Any, strategy: str, kind: str, ratio: float, **options: Any) -> Pruned:
    """The model with one kind of site cut, the other whole."""
    shares = {"attention": (0.0,), "mlp": (0.0,), kind: (ratio,)}
    return prune(model, strategy, allocator={"name": "explicit", **shares}, **options)


def site_of(pruned: Pruned, kind: str) -> Site:
    return next(site for site in pruned.sites if site.kind == kind)


class Memory:
    """The process's resident memory over :attr:`start`, sampled every 5 ms and at the ends of every phase."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.start = self.peak = 0

    def sample(self) -> int:
        now = self.process.memory_info().rss
        self.peak = max(self.peak, now)
        return now

    @contextmanager
    def watched(self) -> Iterator[None]:
        self.start = self.peak = self.process.memory_info().rss
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.005):
                self.sample()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.sample()

    def growth(self) -> int:
        """Peak over the start since the last call."""
        now = self.sample()
        grown, self.peak = self.peak - self.start, now
        return grown


def static_cut(sizes: Sizes, kind: str, ratio: float) -> dict[str, Any]:
    """Part A: seconds and memory of gathering, solving and folding one site's compensation, through ``prune``."""
    model = build(sizes)
    rows = sizes.tokens // sizes.length
    batches = [tokens_of(sizes.calibration_rows, sizes.length, seed) for seed in range(rows // sizes.calibration_rows)]
    memory, seconds, grown, folded = Memory(), {}, {}, []

    def timed(items: Any, label: str, total: int) -> Iterator[Any]:
        began = time.perf_counter()
        memory.growth()
        yield from items
        seconds[label], grown[label] = time.perf_counter() - began, memory.growth()
        seconds["ended"] = time.perf_counter()

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        folded.append(time.perf_counter() - began if name == "compensate" else 0)

    compensate, covariance = LeastSquares(ridge=RIDGE, memory_gib=8), ChannelMoments.bytes_of(sizes.width(kind))
    model.model(input_ids=batches[0], use_cache=False)  # the first pass needs more: it is not measured
    with memory.watched():
        pruned = cut_one(model, "wanda_sp", kind, ratio, calibration=batches, compensate=compensate, progress=timed)
        seconds["solve"], grown["solve"] = time.perf_counter() - seconds.pop("ended"), memory.growth()
        with pruned.watch(stage), torch.no_grad():
            model.model(input_ids=tokens_of(1, 2), use_cache=False)
        grown["fold"] = memory.growth()
    site = site_of(pruned, kind)
    dropped = (site.units - pruned.counts[0, kind]) * site.unit_size
    return {
        "kind": kind,
        "ratio": ratio,
        "channels": site.channels,
        "dropped": dropped,
        "tokens": sum(batch.numel() for batch in batches),
        "plain_pass": seconds["calibrating"],
        "gather": seconds["covariances"],
        "solve": seconds["solve"],
        "fold": sum(folded),
        "memory": {"gather": grown["covariances"], "solve": grown["solve"], "fold": grown["fold"]},
        "stated": covariance + compensate.memory_plan(site.channels, dropped, per_batch=False).working,
        "process": memory.start + max(grown.values()),
    }


class Activations:
    """Correlated channels with heavy tails, scales over three orders of magnitude, and means far above their spread."""

    def __init__(self, channels: int, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.channels, factors = channels, max(channels // 8, 1)
        self.loadings = self._normal(factors, channels) / factors**0.5
        self.means = self._normal(channels).mul(1.5).exp() * self._normal(channels).sign()
        self.scales = self._normal(channels).mul(1.5).exp()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def sample(self, tokens: int) -> Tensor:
        """(tokens, C) float32."""
        x = self._normal(tokens, len(self.loadings)) @ self.loadings
        x += 0.5 * self._normal(tokens, self.channels)
        x *= self._normal(tokens, 1).mul(0.7).exp()
        return x.add_(self.means).mul_(self.scales)


def covariances(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (N, C): as in calibration, in float64 about the exact mean, and in float32 without centring."""
    moments = ChannelMoments(x.shape[1], x.device)
    exact = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    raw = torch.zeros_like(exact, dtype=torch.float32)
    mean = torch.stack([chunk.double().sum(0) for chunk in x.split(CHUNK)]).sum(0) / len(x)
    for chunk in x.split(CHUNK):
        moments.observe(chunk[None], None)
        raw.addmm_(chunk.T, chunk)
        centred = chunk.double() - mean
        exact.addmm_(centred.T, centred)
    single = x.mean(0)
    return moments.take_covariance(), exact.div_(len(x)), raw.div_(len(x)).addr_(single, single, alpha=-1)


def accuracy(sizes: Sizes, kind: str, ratio: float) -> dict[str, Any]:
    """Part B: float32 against float64, from the covariance to the output of the folded weight."""
    torch.set_num_threads(sizes.threads)
    channels = sizes.width(kind)
    source = Activations(channels)
    gathered, exact, raw = covariances(source.sample(sizes.tokens))
    found = {
        "channels": channels,
        "ratio": ratio,
        "covariance": _error(gathered, exact),
        "uncentred": _error(raw, exact),
    }
    del raw
    kept = torch.randperm(channels, generator=source.generator)[: channels - int(ratio * channels)].sort().values
    dropped = complement(kept, channels)
    weight = torch.randn(sizes.outputs, channels, generator=source.generator) / channels**0.5
    compensator = LeastSquares(ridge=RIDGE)
    slopes = []
    for matrix in (gathered, exact):
        prepared = compensator.prepare(SiteCovariance(matrix, sizes.tokens, kept, once=True))
        slopes.append(compensator.slope(prepared, kept, dropped)[0])
    del gathered, exact
    found["slope"] = _error(*slopes)
    mean = source.means.double() * source.scales.double()
    x = source.sample(min(1024, sizes.tokens)).double() - mean
    dense = x @ weight.double().T
    outputs = []
    for slope in slopes:
        part = weight.to(slope.dtype)
        folded = part[:, kept] + part[:, dropped] @ slope
        outputs.append(x[:, kept] @ folded.double().T)
    bare = x[:, kept] @ weight[:, kept].double().T
    return found | {"output": _error(*outputs), "left": _error(outputs[1], dense), "bare": _error(bare, dense)}


def _error(one: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((one.double() - exact).norm() / exact.norm())


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of ``repeats`` runs."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def operations_of(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        work()
    return counter.get_total_flops()
