"""YAML as plain data, by the core rules of YAML 1.2, with bounds on size, depth, aliases and numbers."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ...registry import SpecError
from ..output.reading import LARGEST, brief
from .reader import Place

MOST_VALUES = 100_000
"""Values of a file, those that aliases repeat included."""

DEEPEST = 32

MOST_CHARACTERS = 2_000_000

TAG = "tag:yaml.org,2002:"

AMBIGUOUS = "!ambiguous"
"""Tag of words that YAML 1.1 and YAML 1.2 read differently."""

_RULES = {
    AMBIGUOUS: r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|[-+]?0[0-9_]+|[-+]?0b[01_]+"
    r"|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|[-+]?0x(?=.*_)[0-9a-fA-F_]+"
    r"|[-+]?(?=.*_)[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?",
    TAG + "null": r"~|null|Null|NULL|",
    TAG + "bool": r"true|True|TRUE|false|False|FALSE",
    TAG + "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    TAG + "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    TAG + "merge": r"<<",
}

RESOLVERS = [(tag, re.compile(f"(?:{rule})\\Z")) for tag, rule in _RULES.items()]

REMEDY = "put quotes around text, or write a plain number such as 10, or true or false"


class _Loader(yaml.SafeLoader):
    """Composes nodes whose words are resolved by the rules above; too many or too deep ones are refused."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._count += 1
        _check_size(self._depth, self._count)
        found = super().compose_node(parent, index)
        self._depth -= 1
        return found


class Dumper(yaml.SafeDumper):
    """Writes YAML whose words mean the same in YAML 1.1 and 1.2."""


_Loader.yaml_implicit_resolvers = {None: RESOLVERS}
Dumper.yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: RESOLVERS}


def plain_data(text: str, label: str, lines: dict[Place, int] | None = None) -> Any:
    """The data that a YAML text holds: mappings, lists, texts, numbers, true, false and null.

    ``lines`` is filled with the line of every place. Raises :class:`SpecError`, with ``label`` before the message, for
    what is not YAML or not plain data, for words that YAML 1.1 and 1.2 read differently, keys that are given twice,
    and for texts that are too large, too deep, or that hold too many values.
    """
    if len(text) > MOST_CHARACTERS:
        raise SpecError(f"{label}: has {len(text):,} characters, more than {MOST_CHARACTERS:,}; shorten it")
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _Builder(label, {} if lines is None else lines).build(node, ())
    except _TooLarge as error:
        raise SpecError(f"{label}: {error}; shorten it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise SpecError(f"{label}{where}: not valid YAML: {brief(error.problem or error.context)}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise SpecError(f"{label}: not valid YAML: {brief(error)}") from None


class _TooLarge(Exception):
    """More values or levels than a file may have."""


def _check_size(depth: int, count: int) -> None:
    if depth > DEEPEST:
        raise _TooLarge(f"nested more than {DEEPEST} levels deep")
    if count > MOST_VALUES:
        raise _TooLarge(f"holds more than {MOST_VALUES:,} values, those that aliases repeat included")


class _Builder:
    """Makes data of nodes, and notes their lines."""

    def __init__(self, label: str, lines: dict[Place, int]):
        self._label, self._lines, self._count = label, lines, 0

    def build(self, node: Node, place: Place, depth: int = 1) -> Any:
        self._count += 1
        _check_size(depth, self._count)
        self._lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, ScalarNode):
            return self._scalar(node, place)
        if node.tag not in (TAG + "map", TAG + "seq"):
            raise self._refused(node, f"not valid YAML: the tag {brief(node.tag)} is not plain data")
        if isinstance(node, MappingNode):
            return self._mapping(node, place, depth)
        return [self.build(item, (*place, index), depth + 1) for index, item in enumerate(node.value)]

    def _mapping(self, node: MappingNode, place: Place, depth: int) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        seen: dict[Any, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise self._refused(key_node, "a key must be a word")
            if key_node.tag == TAG + "merge":
                merged |= self._merged(value_node, place, depth + 1)
                continue
            key, line = self._scalar(key_node, place), key_node.start_mark.line + 1
            if key in seen:
                where = brief(".".join(map(str, (*place, key))))
                raise self._refused(key_node, f"{where} is given twice (first on line {seen[key]}); keep one")
            seen[key] = self._lines[(*place, key)] = line
            own[key] = self.build(value_node, (*place, key), depth + 1)
        return {**merged, **own}

    def _merged(self, node: Node, place: Place, depth: int) -> dict[Any, Any]:
        """The mapping, or the mappings, that ``<<`` takes over; the first of several counts."""
        found: dict[Any, Any] = {}
        for source in reversed(node.value if isinstance(node, SequenceNode) else [node]):
            self._count += 1
            _check_size(depth, self._count)
            if not isinstance(source, MappingNode):
                raise self._refused(source, "not valid YAML: << takes a mapping, or a list of mappings")
            found |= self._mapping(source, place, depth)
        return found

    def _scalar(self, node: ScalarNode, place: Place) -> Any:
        word, kind = node.value, node.tag.removeprefix(TAG)
        fits = next((rule for tag, rule in RESOLVERS if tag == node.tag), None)
        if node.tag == AMBIGUOUS:
            raise self._refused(
                node, f"{self._at(place)}{brief(word)} is read in two ways (YAML 1.1 and 1.2); {REMEDY}"
            )
        if kind in ("str", "merge"):
            return word
        if fits is None:
            raise self._refused(node, f"not valid YAML: the tag {brief(node.tag)} is not plain data")
        if not fits.match(word):
            raise self._refused(
                node, f"{self._at(place)}{brief(word)!r} is not valid YAML (no {kind}); put quotes around text"
            )
        if kind == "null":
            return None
        if kind == "bool":
            return word.lower() == "true"
        number = _number(word, kind)
        if number is None:
            raise self._refused(node, f"{self._at(place)}{brief(word)} is a larger number than can be computed with")
        return number

    def _at(self, place: Place) -> str:
        return f"{brief('.'.join(map(str, place)))}: " if place else ""

    def _refused(self, node: Node, message: str) -> SpecError:
        return SpecError(f"{self._label} line {node.start_mark.line + 1}: {message}")


def _number(word: str, kind: str) -> int | float | None:
    """The number that a word means; ``None`` where it is too large."""
    if kind == "float":
        number = float(word.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return None if abs(number) == float("inf") and "inf" not in word.lower() else number
    base = {"0o": 8, "0x": 16}.get(word[:2], 10)
    found = int(word, base) if len(word) <= 40 else LARGEST + 1
    return found if abs(found) <= LARGEST else None
