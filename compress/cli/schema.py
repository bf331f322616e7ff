"""The JSON Schema of pipeline and ablation files, with the installed components."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ...registry import ROLES, Catalog
from ..ablation.grid import field_names
from ..ablation.study import StudyFile
from ..files.spec import PipelineSpec
from ..output.records import Of

REFERENCE = "#/$defs/"
NO_OPTION = ("architectures", "export_formats")
"""Roles whose components no pipeline file names."""
NULL = {"type": "null"}
"""A section that is null takes all its defaults."""
OURS = "prunekit "
"""Begins the provider of what prunekit brings itself; its version follows."""
MEANING_OF = "what the ratio is a share of; decoder: of the decoder's parameters, as with match: parameters"
"""Of the key ``of``, which the section ``prune`` has besides the strategy's options."""


def pipeline_schema(catalog: Catalog) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a pipeline file; a component may be written as its bare name."""
    classes = {role: [entry.component for entry in catalog.of_role(role)] for role in ROLES if role not in NO_OPTION}
    roles = [ROLES[role] for role in classes]
    models: list[type[BaseModel]] = [PipelineSpec, *roles, *(c for found in classes.values() for c in found)]
    places, schema = models_json_schema([(model, "validation") for model in models], ref_template=REFERENCE + "{model}")
    names = {model: places[model, "validation"]["$ref"].removeprefix(REFERENCE) for model in models}
    definitions = schema["$defs"]
    for role, found in classes.items():
        for component in found:
            _mark(definitions[names[component]], role)
        choices: list[dict[str, Any]] = [{"$ref": REFERENCE + names[component]} for component in found]
        by_name = [c.model_fields["name"].default for c in found if not _needs_options(c)]
        if role != "strategies" and by_name:
            choices.insert(0, {"enum": by_name})
        definitions[names[ROLES[role]]] = {"title": ROLES[role].__name__, "anyOf": choices}
    whole = definitions.pop(names[PipelineSpec])
    whole["required"] = ["prune"]
    sections = whole["properties"]
    sections["model"] = _or(sections["model"], {"type": "string"})  # a bare name too
    for key, section in sections.items():
        if key != "prune" and NULL not in section.get("anyOf", ()):
            sections[key] = _or(section, NULL)
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "prunekit pipeline file"}
    return {**whole, **title, "$defs": definitions}


def ablation_schema(catalog: Catalog) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of an ablation file; its base may omit required fields, which axes can set."""
    pipeline = pipeline_schema(catalog)
    definitions = pipeline.pop("$defs")
    for definition in definitions.values():
        if "use" in definition.get("properties", {}):
            definition["required"] = []
    base = {key: value for key, value in pipeline.items() if key not in ("$schema", "title", "required")}
    whole = StudyFile.model_json_schema(ref_template=REFERENCE + "{model}")
    definitions.update(whole.pop("$defs"))
    base["properties"]["prune"] = _or(base["properties"]["prune"], NULL)
    properties = whole["properties"]
    properties["base"] = {"description": properties["base"]["description"], "anyOf": [{"type": "string"}, base]}
    values, labels = {"type": "array", "minItems": 1}, {"type": "object", "minProperties": 1}
    fields = {name: {"anyOf": [values, labels]} for name in sorted(field_names(catalog))}
    properties["vary"] |= {"properties": fields, "additionalProperties": {"anyOf": [values, labels]}}
    return {**whole, "$schema": pipeline["$schema"], "title": "prunekit ablation file", "$defs": definitions}


def without_installed(catalog: Catalog) -> Catalog:
    """The catalog without what installed plugins bring; plugin files stay."""
    return replace(catalog, entries=[e for e in catalog.entries if e.provider.startswith((OURS, "file "))])


def _mark(definition: dict[str, Any], role: str) -> None:
    """Add the key by which a mapping of this role names its component."""
    properties = definition["properties"]
    required = [key for key in definition.get("required", []) if key != "name"]
    if role == "strategies":
        properties["compensate"] = _or(properties["compensate"], NULL)  # null means the component none
        of = {"enum": list(get_args(Of)), "default": "units", "description": MEANING_OF}
        definition["properties"] = {"use": properties.pop("name"), **properties, "of": of}
        required.insert(0, "use")
    elif role == "evaluators" or required:
        required.insert(0, "name")
    definition["required"] = required


def _or(schema: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The schema of a value that may be something else too; its default and description stay where editors look."""
    about = {key: value for key, value in schema.items() if key in ("default", "description")}
    rest = {key: value for key, value in schema.items() if key not in about}
    return {**about, "anyOf": [*rest["anyOf"], other] if list(rest) == ["anyOf"] else [rest, other]}


def _needs_options(component: Any) -> bool:
    return any(info.is_required() for info in component.model_fields.values())
