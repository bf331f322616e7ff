"""Prompts: from Python or from a file of JSON lines, as the token ids that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...registry import DataError, SpecError
from ..output.reading import parse_json, read_text, shown
from .documents import chat_text

Message = Mapping[str, str]
"""A turn of a chat: its ``role`` (user, assistant, system) and its ``content``."""

FORM = 'write {"prompt": TEXT} or {"messages": [{"role": "user", "content": TEXT}, ...]}'


@dataclass(frozen=True)
class Prompt:
    """A text or the messages of a chat, and its place for messages of errors."""

    content: str | list[dict[str, str]]
    place: str

    @property
    def record(self) -> dict[str, Any]:
        """The prompt as a line of a file has it."""
        return {"prompt" if isinstance(self.content, str) else "messages": self.content}


def prompts_of(given: str | Prompt | Iterable[str | Prompt | Sequence[Message]]) -> list[Prompt]:
    """One text, or several texts and chats, as prompts; raises :class:`DataError` for anything else, and for none."""
    several = [given] if isinstance(given, (str, Prompt)) else list(given)
    if not several:
        raise DataError("there is no prompt; give at least one")
    return [
        each if isinstance(each, Prompt) else _prompt(each, f"prompt {number}")
        for number, each in enumerate(several, start=1)
    ]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file of JSON lines, blank lines left out.

    Raises :class:`DataError` that names the file and the line: a file that cannot be read, a line without a prompt.
    """
    try:
        lines = read_text(path.expanduser()).split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; name a file") from None
    found = [_line(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise DataError(f"{path} holds no prompt; {FORM}, one on each line")
    return found


def _line(line: str, place: str) -> Prompt:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise DataError(f"{place} cannot be read as JSON ({error}); {FORM}") from None
    known = [key for key in ("prompt", "messages") if isinstance(record, dict) and key in record]
    if len(known) != 1:
        found = "both" if known else "neither"
        raise DataError(f"{place} has {found} of prompt and messages; {FORM}")
    if (known == ["prompt"]) != isinstance(record[known[0]], str):
        raise DataError(f"{place}: {known[0]} is {shown(record[known[0]])}; {FORM}")
    return _prompt(record[known[0]], place)


def _prompt(content: Any, place: str) -> Prompt:
    if isinstance(content, str):
        return Prompt(content, place)
    turns = list(content) if isinstance(content, (list, tuple)) else []
    fine = all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not (turns and fine):
        raise DataError(f"{place}: {shown(content)} is neither a text nor a chat; {FORM}")
    if turns[-1]["role"] == "assistant":
        raise DataError(f"{place} ends with an answer (role assistant); end it with what is asked (role user)")
    return Prompt([{key: str(value) for key, value in turn.items()} for turn in turns], place)


def encoded(prompt: Prompt, tokenizer: Any, system: str | None = None, chat: bool = True) -> list[int]:
    """The ids that the model reads, by the tokenizer's chat template if it has one and ``chat`` is true.

    ``system`` is a system message before the chat. Without a template a text gets the special tokens that the
    tokenizer adds. Raises :class:`SpecError` (``system`` without a template) and :class:`DataError` (a chat without a
    template, what the template refuses, no tokens).
    """
    place, content = prompt.place, prompt.content
    template = bool(chat and getattr(tokenizer, "chat_template", None))
    if not template and system is not None:
        raise SpecError("a system message needs a chat template; use a tokenizer with one, or leave the message out")
    if not template and not isinstance(content, str):
        raise DataError(
            f"{place} has the messages of a chat, which need a chat template: "
            + ("the template is switched off" if not chat else "this model's tokenizer has none")
            + "; write the whole text as prompt"
        )
    if template:
        turns = [{"role": "user", "content": content}] if isinstance(content, str) else content
        if system is not None and turns[0]["role"] == "system":
            raise DataError(f"{place} has a system message of its own; leave out one of the two")
        system_turn = [] if system is None else [{"role": "system", "content": system}]
        text = chat_text([*system_turn, *turns], tokenizer, place, ask=True)
    else:
        text = str(content)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place} holds half of a surrogate pair, as broken emoji leave; write whole characters"
        ) from None
    ids = tokenizer(text, add_special_tokens=not template, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"{place} has no tokens; write a text")
    return list(ids)
