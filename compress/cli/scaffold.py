"""The command that writes a package with a component: it installs, is listed, passes the checks and runs as it is."""

from __future__ import annotations

import ast
import builtins
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bundled import MODEL
from .options import Commands

if TYPE_CHECKING:
    from ...registry import Catalog

# The command imports torch and what needs it when it runs, so that --help and --version answer at once.

TEMPLATES = Path(__file__).parent / "templates"
KINDS = sorted(path.name.partition(".")[0] for path in (TEMPLATES / "plugin").iterdir())
PARTS = {
    "scorer": ("wanda_sp", "scorer"),
    "allocator": ("wanda_sp", "allocator"),
    "mask_applier": ("wanda_sp", "applier"),
    "compensator": ("wanda_sp", "compensate"),
    "probe_selector": ("pp", "selector"),
    "history_merger": ("pp", "merger"),
    "policy": ("griffin", "policy"),
    "grouping": ("pp", "group_by"),
}
"""The kinds that are a part of a strategy: the strategy that uses it in the package, and the part's key."""
WRITTEN = ("norm", "module", "query", "key", "value", "output")
"""Names of Llama's attention that a new family has in its code, to be changed."""
VOCABULARY = 4096
"""Tokens of the bundled tokenizer."""


def new(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name in pipeline files, such as my_scorer.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder to make; prunekit-NAME by default.")
    ] = None,
    model_type: Annotated[
        str | None,
        typer.Option("--model-type", metavar="TYPE", help="Of an architecture: model_type in the model's config.json."),
    ] = None,
) -> None:
    """Write a package with a component of your own, to begin from.

    It can be installed, and passes its tests, as it is.
    """
    from ...registry import SpecError
    from ...registry.catalog import near
    from ..output import printing

    printing.quiet()
    if kind not in KINDS:
        raise SpecError(f"no template is called {kind!r}{near(kind, KINDS)}; there are {', '.join(KINDS)}")
    if (kind == "architecture") != (model_type is not None):
        raise SpecError(
            "an architecture needs --model-type TYPE: what config.json of its models has as model_type"
            if model_type is None
            else f"--model-type is for architectures, and this is a new {kind}; leave it out"
        )
    name = name.replace("-", "_")
    folder = write_package(kind, name, out, model_type)
    where = shlex.quote(os.path.relpath(folder))
    printing.say(f"{folder} has {', '.join(sorted(path.name for path in folder.iterdir()))}", whole=True)
    if (folder / "model").is_dir():
        printing.say(f"The names in the layers of {model_type} are guessed; prunekit check says if they are right.")
    printing.say("Next:", whole=True)
    for command in (
        f"pip install -e {where if os.sep in where else f'./{where}'}",
        f"prunekit check {name}",
        first_use(kind, name, f"{where}/pipeline.yaml"),
    ):
        printing.say(f"  {command}", whole=True)


def write_package(kind: str, name: str, out: Path | None, model_type: str | None = None) -> Path:
    """Write the package of a component, whole or not at all, and return its folder.

    Raises :class:`SpecError` for a name that cannot be used, a folder that exists, and a model type that is served or
    whose layers have no known form.
    """
    from ...registry import PLUGIN_API, ROLES, Catalog, SpecError
    from ...registry.catalog import singular
    from ..output.folders import RunFolder, make_readable

    catalog, cls = Catalog.discover(block=""), "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    check_name(catalog, kind, name)
    project = f"prunekit-{name.replace('_', '-')}"
    target = Path(out or project).expanduser()
    if os.path.lexists(target):
        raise SpecError(f"{target} exists; choose another folder with --out")
    values = {"kind": kind, "name": name, "cls": cls, "project": project, "module": f"prunekit_{name}"}
    values |= {"first_use": first_use(kind, name, "pipeline.yaml")}
    values |= {"api": str(PLUGIN_API), "hook": next(role for role in ROLES if singular(role) == kind)}
    variant, model = kind, None
    if model_type is not None:
        names, model = family_of(catalog, model_type)
        values |= {"model_type": model_type, **names}
        variant = kind if model is not None else "unknown_type"
    elif kind == "strategy":
        variant = "part"
        values |= {"use": f"{name}, ratio: 0.4", "call": f"{cls}(ratio=0.5)"}
    elif kind in PARTS:
        variant, (strategy, key) = "part", PARTS[kind]
        values["use"] = f"{strategy}, ratio: 0.4, {key}: {name}"
        values["call"] = f'"{strategy}", ratio=0.5, {key}={cls}()'
    places = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "pipeline.yaml": f"pipeline/{variant}.yaml",
        f"prunekit_{name}.py": f"plugin/{kind}.py",
        f"test_prunekit_{name}.py": f"test/{variant}.py",
    }
    content = {file: Template(_template(place)).substitute(values) for file, place in places.items()}
    check_class(name, cls, values["module"], [text for file, text in content.items() if file.endswith(".py")])
    with RunFolder(target, what="package").open() as folder:
        for file, text in content.items():
            (folder / file).write_text(text, encoding="utf-8")
        if model is not None:
            from transformers import AutoTokenizer

            model.save_pretrained(folder / "model")
            make_readable(folder / "model" / "model.safetensors")
            AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "model")
    return target


def first_use(kind: str, name: str, file: str) -> str:
    """The command that uses a component with the pipeline file of its package."""
    if kind == "export_format":
        return f"prunekit export {file} --profile {name} --out exported"
    return f"prunekit run {file}"


def check_name(catalog: Catalog, kind: str, name: str) -> None:
    """Raise :class:`SpecError` for a name that a component or a plugin has, or that Python or YAML read otherwise."""
    import yaml

    from ...registry import SpecError

    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*", name):
        raise SpecError(f"the name {name!r} is not made of words of letters and digits, such as my_{kind}")
    taken = [each for each in catalog.entries if name.lower() in (each.name.lower(), each.plugin.lower())]
    if taken:
        raise SpecError(f"{taken[0].provider} has a component or a plugin called {name!r}; choose another name")
    if yaml.safe_load(name) != name:
        raise SpecError(f"YAML reads the name {name!r} as {yaml.safe_load(name)!r}; choose another")


def check_class(name: str, cls: str, module: str, sources: Iterable[str]) -> None:
    """Raise :class:`SpecError` for a class that has a name of Python's own, or one that its module or its tests have.

    ``sources`` are these two, which define the class in ``module`` and import it from there.
    """
    from ...registry import SpecError

    words = set(dir(builtins))
    for node in (node for source in sources if cls not in words for node in ast.walk(ast.parse(source))):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", None) != module:
            words |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            words.add(node.id)
    if cls in words:
        raise SpecError(
            f"the class of {name!r} would be called {cls}, as another name in its module or its tests; choose another, "
            f"such as my_{name}"
        )


def family_of(catalog: Catalog, model_type: str) -> tuple[dict[str, str], Any]:
    """The names in the layers of a model type, as code, and a small random model of it.

    A type that the installed transformers lacks gets the names of Llama, and no model. Raises :class:`SpecError` for a
    type that is served, and for one whose names cannot be guessed.
    """
    from transformers import CONFIG_MAPPING

    from ...registry import SizeFields, SpecError
    from ..models.architectures import Llama
    from ..models.language import READ_IMAGES
    from ..models.likeness import guessed_family, types_of, written
    from ..models.small import small_model

    remedy = "write the family by hand (docs/plugins.md, architectures)"
    if not re.fullmatch(r"[\w.-]+", model_type):
        raise SpecError(f"--model-type {model_type!r} is not a model type; config.json of the model has it")
    for entry in catalog.of_role("architectures"):
        if model_type in types_of(entry):
            raise SpecError(f"models of type {model_type!r} are served by {entry.provider}; prune one as it is")
    if model_type in READ_IMAGES:
        raise SpecError(f"models of type {model_type!r} also read images; name the type of the language model inside")
    if model_type in CONFIG_MAPPING:
        try:
            model = small_model(model_type, vocab_size=VOCABULARY)
        except Exception as error:  # the recipe does not fit every type
            why = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise SpecError(f"no small model of type {model_type!r} can be made ({why}); {remedy}") from None
        guess = guessed_family(model)
        if guess is None:
            raise SpecError(f"the layers of type {model_type!r} have not one attention and one MLP each; {remedy}")
        layers, _, names = guess
        width = _width_field(model, model_type, f"{layers}.0.{names['mlp']['consumer']}")
    else:
        model, layers, width = None, Llama().layers, SizeFields().width
        names = {"attention": {key: getattr(Llama().attention, key) for key in WRITTEN}}
        names["mlp"] = Llama().mlp.model_dump(exclude_defaults=True)
    lines = {
        block: "".join(f"\n        {key}={written(value)}," for key, value in found.items()) + "\n    "
        for block, found in names.items()
    }
    other = "" if width == SizeFields().width else f'width="{width}"'
    return {"layers": layers, "sizes": "None" if width is None else f"SizeFields({other})", **lines}, model


def _width_field(model: Any, model_type: str, consumer: str) -> str | None:
    """The field of the configuration that holds the number of MLP channels, which ``consumer`` reads.

    None where there is none: a field that holds this number by chance changes nothing in another small model.
    """
    from ...registry import SizeFields
    from ..models.small import small_model

    channels, usual = model.get_submodule(consumer).in_features, SizeFields().width
    if getattr(model.config, usual, None) == channels:
        return usual
    for field, value in model.config.to_dict().items():
        if type(value) is int and value == channels:
            try:
                other = small_model(model_type, **{field: 2 * channels})
            except Exception:  # a size on which others depend
                continue
            if other.get_submodule(consumer).in_features == 2 * channels:
                return field
    return None


def _template(place: str) -> str:
    return (TEMPLATES / f"{place}.txt").read_text(encoding="utf-8")


COMMANDS: Commands = {"new": new}
