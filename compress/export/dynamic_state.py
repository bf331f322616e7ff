"""The profile dynamic: the state of a pruning in one file, and its restoration on the dense model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...registry import Catalog, Compensator, DataError, SpecError, Strategy
from ..engine.runtime import Runtime
from ..engine.site_cut import SiteCut
from ..output.folders import make_readable
from ..output.reading import check_regular, parse_json
from ..pruning.prune import engine_of
from ..pruning.pruned import Pruned

FORMAT = "prunekit pruning state 1"
STATE = "pruning_state.safetensors"
HISTORY = ("table", "rows", "mean")


def save_state(pruned: Pruned, folder: Path) -> None:
    """Write the calibrated histories, counts, kept units and compensations of all sites.

    Raises :class:`SpecError` for a compensator that has prepared something other than tensors.
    """
    pruned.reset()
    tensors: dict[str, Tensor] = {}
    sites: dict[str, Any] = {}
    for cut in pruned.cuts:
        label = cut.site.consumer
        history, compensation = cut.history, cut.compensation
        if history.positions:
            _put(tensors, f"{label}.table", history.table)
            _put(tensors, f"{label}.rows", history.rows)
        _put(tensors, f"{label}.mean", history.mean)
        _put(tensors, f"{label}.fixed", cut.fixed)
        _put(tensors, f"{label}.fitted", cut.state.fitted)
        for number, matrix in enumerate(compensation.fixed or ()):
            _put(tensors, f"{label}.slope.{number}", matrix)
        _put(tensors, f"{label}.shift", compensation.shift)
        prepared = _parts(compensation.prepared, compensation.compensator)
        for number, matrix in enumerate(prepared):
            _put(tensors, f"{label}.prepared.{number}", matrix)
        sites[label] = {
            "count": cut.count,
            "tokens": history.tokens,
            "positions": history.positions,
            "slope": None if compensation.fixed is None else len(compensation.fixed),
            "prepared": len(prepared),
            "diagnostics": compensation.diagnostics,
            "fell_back": compensation.fell_back,
            "covariance_tokens": compensation.tokens,
        }
    path = folder / STATE
    save_file(tensors, path, {"format": FORMAT, "sites": json.dumps(sites)})
    make_readable(path)


def restore(model: nn.Module, strategy: Strategy, catalog: Catalog, folder: Path, runtime: Runtime) -> Pruned:
    """Prune ``model`` with the state that :func:`save_state` wrote to ``folder``, without calibration.

    Raises :class:`DataError` for a file that is damaged or of a model with other sites.
    """
    engine, _ = engine_of(model, strategy, catalog, None, runtime)
    path = folder / STATE
    try:
        with _opened(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise DataError(f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}; export again")
            sites = parse_json(metadata["sites"])
            if sorted(sites) != sorted(cut.site.consumer for cut in engine.cuts):
                raise DataError(f"{path} is of a model with other sites than this one; check the base model")
            names = set(file.keys())
            with torch.inference_mode(False), torch.no_grad():
                for cut in engine.cuts:
                    _restore(cut, sites[cut.site.consumer], file, names, strategy)
                if names:
                    raise ValueError(f"{len(names)} tensors have no place, such as {min(names)}")
                engine.start()
        return Pruned(engine, catalog)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        engine.remove()
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); export the model again") from error
    except BaseException:
        engine.remove()
        raise


def _restore(cut: SiteCut, about: dict[str, Any], file: Any, names: set[str], strategy: Strategy) -> None:
    """Set a site's state from a file; the names of the tensors that are read leave ``names``."""
    label, device = cut.site.consumer, cut.history.device

    def tensor(name: str) -> Tensor | None:
        key = f"{label}.{name}"
        return taken(key) if key in names else None

    def numbered(name: str, count: int) -> tuple[Tensor, ...]:
        return tuple(taken(f"{label}.{name}.{number}") for number in range(count))

    def taken(key: str) -> Tensor:
        names.discard(key)
        return file.get_tensor(key).to(device)

    stored = strategy.history if strategy.dynamic and f"{label}.table" in names else cut.history.storage
    positions = about["positions"] if stored != cut.history.storage else 0
    table, rows, mean = (tensor(name) for name in HISTORY)
    for name, found in (("table", table), ("mean", mean)):
        if found is not None and found.shape[-1] != cut.site.channels:
            raise ValueError(f"{label}.{name} is {tuple(found.shape)}")
    history = replace(
        cut.history,
        table=cut.history.table if table is None else table,
        rows=cut.history.rows if rows is None else rows,
        mean=mean,
        tokens=float(about["tokens"]),
        storage=stored,
        stored_positions=positions,
    )
    count = int(about["count"])
    if not 0 <= count <= cut.site.units:
        raise ValueError(f"{label} keeps {count} of {cut.site.units} units")
    cut.state.restore(history, count, tensor("fixed"))
    cut.state.use_fitted(tensor("fitted"))
    slope = None if about["slope"] is None else numbered("slope", about["slope"])
    parts = numbered("prepared", about["prepared"])
    prepared = (parts[0] if len(parts) == 1 else parts) if parts else None
    # Files written by 0.1 have the site's compensator, with the ridge that calibration chose, instead of diagnostics.
    if "diagnostics" in about:
        diagnostics = about["diagnostics"]
    else:
        ridge = {**dict(strategy.compensate), **(about["compensator"] or {})}.get("ridge")
        diagnostics = {} if ridge is None else {"ridge": ridge}
    cut.compensation.restore(
        slope, prepared, about["fell_back"], about["covariance_tokens"], diagnostics, tensor("shift")
    )


def _parts(prepared: Any, compensator: Compensator) -> tuple[Tensor, ...]:
    parts = () if prepared is None else prepared if isinstance(prepared, tuple) else (prepared,)
    if not all(isinstance(part, Tensor) for part in parts):
        raise SpecError(
            f"compensator {compensator.name} has prepared a {type(prepared).__name__}, and only tensors can be "
            "written; let its prepare give a tensor or a tuple of tensors"
        )
    return parts


def _put(tensors: dict[str, Tensor], name: str, tensor: Tensor | None) -> None:
    if tensor is not None:
        tensors[name] = tensor.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory


def _opened(path: Path) -> Any:
    try:
        check_regular(path)
        return safe_open(path, framework="pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); export the model again") from error
