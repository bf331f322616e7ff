"""Models of unknown types: which known family they look like, and what to write for them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import nn

from ...registry import Architecture, Catalog, SpecError, near
from ...registry.catalog import Entry
from .architectures import PRUNED, Llama, PreNormDecoder
from .language import READ_IMAGES

ANY = "*"
"""As a model type: the architecture serves every model, because the user says so."""

LINES = """\
    from prunekit.compress import family
    from prunekit.registry import hookimpl

    Mine = family({fields})

    @hookimpl
    def architectures():
        return [Mine]"""


class Like(BaseModel):
    """The family whose names a model's layers have, whatever its own type."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    like: str = Field(description="a model type that prunekit families lists, or the name of an architecture")
    layers: str | None = Field(
        default=None, description="path of the decoder layers, such as transformer.h; null: that of the family"
    )

    def entry(self, catalog: Catalog) -> Entry:
        """The architecture that is meant; raises :class:`SpecError` for none or several."""
        known = catalog.of_role("architectures")
        found = [e for e in known if e.name == self.like] or [e for e in known if self.like in types_of(e)]
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(each.name for each in found)
            raise SpecError(f"architectures {names} serve {self.like!r}; name one of them")
        if self.like in READ_IMAGES:
            raise SpecError(
                f"{self.like!r} is a model that also reads images, and no family; the language model inside of it is "
                "found without this: leave architecture out, or name the type of that language model"
            )
        types = [kind for each in known for kind in types_of(each)]
        raise SpecError(f"no family is called {self.like!r}{near(self.like, types)}; prunekit families lists all")

    def only(self, catalog: Catalog) -> Catalog:
        """The catalog with this architecture alone, which then serves every model."""
        changes: dict[str, Any] = {"name": (str, self.like)}  # routed experts have the names of this very type
        if self.layers is not None:
            changes["layers"] = str, self.layers
        return with_types(catalog, self.entry(catalog), ANY, changes)


def with_types(catalog: Catalog, entry: Entry, kind: str, changes: dict[str, Any] | None = None) -> Catalog:
    """The catalog with one architecture alone, which serves the model type ``kind`` alone."""
    base: Any = entry.component
    made = create_model(
        base.__name__,
        __base__=base,
        __module__=base.__module__,
        __doc__=base.__doc__,
        model_types=(tuple[str, ...], (kind,)),
        **changes or {},
    )
    others = [each for each in catalog.entries if each.role != "architectures"]
    return replace(catalog, entries=[*others, replace(entry, component=made)])


def types_of(entry: Entry) -> list[str]:
    """The model types that an architecture serves, those of exported models left out."""
    made: Any = entry.component
    return [kind for kind in made().model_types if not kind.startswith(PRUNED)]


def advice(model: nn.Module, kind: str, known: Iterable[Architecture]) -> str:
    """What to do with a model of the unknown type ``kind``: the family that it looks like, and the lines of a new one.

    Empty for a model that has no list of equal layers with an attention and an MLP.
    """
    guess = guessed_family(model)
    if guess is None:
        return ""
    path, layer, names = guess
    decoders = [each for each in known if isinstance(each, PreNormDecoder)]
    plain = [
        each for each in decoders if each.mlp is not None and not (each.other_mlps or each.leaves or each.has_experts)
    ]
    order = sorted(plain, key=lambda each: (len(_missing(each, layer)), each.name != "llama"))
    found = order[0] if order else Llama()
    missing = _missing(found, layer)
    place = "" if found.layers == path else f", layers: {path}"
    run = f"run with architecture: {{like: {found.model_types[0]}{place}}}, which is checked on the model first; or "
    if missing:
        said, run = f"Its layers have no {', '.join(missing)}, which {found.name} has; ", ""
    else:
        more = _others(found, layer)
        said = f"It looks like {found.name}{f' with {more}' if more else ''}; "
        try:
            found.model_copy(update={"layers": path}).sites(model, "kv_group")
        except Exception as error:  # any model may come here
            said, run = f"{said[:-2]}, but {error}; ", ""
    lines = LINES.format(fields=_fields(kind, path, names))
    return f"{said}{run}write these lines into a plugin, with the names corrected (docs/architectures.md):\n\n{lines}"


def guessed_family(model: nn.Module) -> tuple[str, nn.Module, dict[str, dict[str, Any]]] | None:
    """Path of the decoder layers, the first of them, and the names in it; None where they cannot be guessed."""
    lists = [(path, stack) for path, stack in model.named_modules() if isinstance(stack, nn.ModuleList)]
    stacks = [(path, stack) for path, stack in lists if len({type(layer) for layer in stack}) == 1]
    if not stacks or not hasattr(model, "get_input_embeddings"):
        return None
    path, stack = max(stacks, key=lambda found: sum(each.numel() for each in found[1].parameters()))
    names = guessed_names(stack[0], _width(model))
    return None if names is None else (path, stack[0], names)


def guessed_names(layer: nn.Module, width: int) -> dict[str, dict[str, Any]] | None:
    """Names of attention and MLP in a layer, as far as the order and the shapes of its modules tell.

    None where it has not one attention and one MLP.
    """
    children: dict[str, Any] = dict(layer.named_children())
    linears = {name: _linears(child) for name, child in children.items() if not hasattr(child, "in_features")}
    blocks = [name for name, inside in linears.items() if len(inside) > 1]
    attention = next((name for name in blocks if "att" in name.lower()), None)
    mlp = next((name for name in blocks if name != attention), "")
    inside = linears[mlp] if mlp else {name: child for name, child in children.items() if hasattr(child, "in_features")}
    norms = [name for name in children if "norm" in name.lower() or "ln" in name.lower()]
    if attention is None or len(inside) < 2 or not norms:
        return None
    made, output = _split(linears[attention], width)
    first, last = _split(inside, width)
    names: dict[str, Any] = {"norm": norms[0], "module": attention, "output": output}
    letters = {name[0].lower(): name for name in made}
    if letters.keys() >= {"q", "k", "v"}:
        names |= {"query": letters["q"], "key": letters["k"], "value": letters["v"]}
    else:
        names |= {"query": made[0], "key": None, "value": None, "query_parts": 3}
    counts = {"head_count": "num_heads", "kv_head_count": "num_key_value_heads"}
    names |= {field: name for field, name in counts.items() if hasattr(children[attention], name)}
    if "query_parts" not in names and (stored := _stored_width(children[attention], names["query"])):
        names["width"] = stored
    before = f"{mlp}." if mlp else ""
    block: dict[str, Any] = {"norm": norms[min(1, len(norms) - 1)], "entry": mlp or first[0]}
    block |= {"producers": tuple(f"{before}{name}" for name in first), "consumer": f"{before}{last}"}
    if not mlp:
        block["activation"] = next((name for name in children if "act" in name.lower()), None)
    if len(first) == 1 and inside[first[0]].out_features == 2 * inside[last].in_features:
        block["fused"] = True
    return {"attention": names, "mlp": block}


def _stored_width(attention: nn.Module, query: str) -> str | None:
    """The attribute by which the forward gives the queries' rows back their shape; None where it reads none."""
    try:
        forward = inspect.getsource(type(attention).forward)
    except (OSError, TypeError):  # made while the program ran
        return None
    rows: Any = attention.get_submodule(query)
    read = re.findall(r"\.(?:view|reshape)\([^()]*\bself\.(\w+)\)", forward)
    return next((name for name in read if getattr(attention, name, None) == rows.out_features), None)


def _width(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[-1]


def _linears(module: nn.Module) -> dict[str, Any]:
    return {name: inside for name, inside in module.named_modules() if hasattr(inside, "in_features")}


def _split(linears: dict[str, Any], width: int) -> tuple[list[str], str]:
    """The linear layers that make channels, and the last that returns the hidden size, which reads them."""
    last = [name for name, linear in linears.items() if linear.out_features == width][-1:] or [*linears][-1:]
    return [name for name in linears if name != last[0]], last[0]


def _paths(architecture: PreNormDecoder) -> list[str]:
    """The modules of a layer that a family names."""
    names, mlp = architecture.attention, architecture.mlp
    inside = [f"{names.module}.{name}" for name in (names.query, names.key, names.value, names.output) if name]
    rest = [mlp.norm, *mlp.producers, mlp.consumer] if mlp else []
    return [path for path in (names.norm, *inside, *rest) if path]


def _missing(architecture: PreNormDecoder, layer: nn.Module) -> list[str]:
    there = {name for name, _ in layer.named_modules()}
    return [path for path in _paths(architecture) if path not in there]


def _others(architecture: PreNormDecoder, layer: nn.Module) -> str:
    """Modules of a layer with weights that a family does not name, such as "self_attn.q_norm"."""
    known, found = {*_paths(architecture)}, list[str]()
    for name, _ in layer.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in known:
            found.append(owner if owner not in (architecture.attention.module, "") else name)
    return " and ".join(dict.fromkeys(found))


def _fields(kind: str, layers: str, names: dict[str, dict[str, Any]]) -> str:
    """The arguments of ``family`` for these names, those of Llama left out."""
    llama, parts = Llama(), [f'"{kind}"']
    if layers != llama.layers:
        parts.append(f'layers="{layers}"')
    for key, found in names.items():
        own = {name: value for name, value in found.items() if value != getattr(getattr(llama, key), name)}
        if own:
            pairs = ", ".join(f'"{name}": {written(value)}' for name, value in own.items())
            parts.append(f"{key}={{{pairs}}}")
    return ", ".join(parts) if len(parts) == 1 else "\n        " + ",\n        ".join(parts) + ",\n    "


def written(value: Any) -> str:
    """A value as Python writes it, with double quotes."""
    return repr(value).replace("'", '"')
