"""A transformers tokenizer as GGUF metadata: byte-level BPE, and BPE over characters with byte fallback."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ....registry import ModelError
from .byte_level import pre_tokenizer_name
from .sentencepiece import merge_scores, spaces

REMEDY = "Use profile hf-hetero or hf-uniform, which keep the tokenizer as it is"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's vocabulary and rules in the form of llama.cpp."""

    model: str
    """``gpt2`` (byte-level, merges) or ``llama`` (characters, scores)."""
    pre: str
    """llama.cpp's name of the rule that splits text into words."""
    tokens: list[str]
    types: list[int]
    """A ``gguf.TokenType`` for each token."""
    scores: list[float] | None
    merges: list[str] | None
    space_prefix: bool
    """Whether a space is added before text."""
    special: dict[str, int | None]
    """Ids by role: bos, eos, unk, pad."""
    add_bos: bool
    add_eos: bool
    chat_template: str | dict[str, str] | None
    notes: tuple[str, ...]
    """Differences from transformers in the splitting of text, one sentence each."""

    def add_to(self, writer: Any, config: Any) -> None:
        """Add it to a GGUF writer; special tokens that the tokenizer lacks are taken from the model's config."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            token = getattr(config, f"{role}_token_id", None) if token is None else token
            if isinstance(token, int) and 0 <= token < len(self.tokens):
                getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.model == "llama":
            writer.add_add_space_prefix(self.space_prefix)
        if isinstance(self.chat_template, dict):
            named = [{"name": name, "template": text} for name, text in self.chat_template.items()]
            writer.add_chat_template(named)
        elif self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """A fast tokenizer's vocabulary, padded with unused tokens to the ``rows`` of the embedding.

    Raises ModelError for tokenizers whose rules llama.cpp does not have.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"profile gguf: a GGUF file holds the tokenizer, and {type(tokenizer).__name__} is not a fast tokenizer; "
            "load the model from a folder with a tokenizer.json"
        )
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError(
            f"profile gguf: the tokenizer is a {model['type']} model of a kind that llama.cpp's Llama does not read; "
            f"byte-level BPE and BPE with byte fallback can be written. {REMEDY}"
        )
    tokens, types = _tokens(state, rows)
    merges = [tuple(pair) for pair in model["merges"]]
    notes: list[str] = []
    scores: list[float] | None = None
    joined: list[str] | None = None
    space_prefix = False
    if model["byte_fallback"]:
        kind, pre = "llama", "default"
        space_prefix, found = spaces(state)
        notes += found
        by_token, found = merge_scores(model["vocab"], merges)
        notes += found
        scores = [by_token.get(token, -float(len(merges))) for token in tokens]
    else:
        kind, (pre, notes) = "gpt2", pre_tokenizer_name(state)
        joined = [" ".join(pair) for pair in merges]
    add_bos, add_eos = _added_around(tokenizer)
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=joined,
        space_prefix=space_prefix,
        special={role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")},
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=getattr(tokenizer, "chat_template", None),
        notes=tuple(notes),
    )


def _tokens(state: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Texts and types of all rows (tokens), by id."""
    from gguf import TokenType

    model = state["model"]
    added = {token["id"]: token for token in state["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    if max(texts) >= rows:
        raise ModelError(
            f"profile gguf: the tokenizer has {max(texts) + 1} tokens, but the embedding has {rows} rows; "
            "resize the model's embeddings (model.resize_token_embeddings) or load the tokenizer that belongs to it"
        )

    def kind(index: int) -> TokenType:
        if index not in texts:
            return TokenType.UNUSED
        if texts[index] == model.get("unk_token"):
            return TokenType.UNKNOWN
        if index in added:
            return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        if model["byte_fallback"] and texts[index] in _BYTES:
            return TokenType.BYTE
        return TokenType.NORMAL

    tokens, taken = [], set(texts.values())
    for index in range(rows):
        # Every text must be unique: llama.cpp refuses two tokens with the same text.
        unused = f"[PAD{index}]"
        while unused in taken:
            unused = f"[{unused}]"
        tokens.append(texts.get(index, unused))
    return tokens, [int(kind(index)) for index in range(rows)]


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos token before a text and its eos token after it, found by an example."""
    text = "a"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    for add_bos in (False, True):
        for add_eos in (False, True):
            before = [tokenizer.bos_token_id] if add_bos else []
            after = [tokenizer.eos_token_id] if add_eos else []
            if full == before + plain + after:
                return add_bos, add_eos
    raise ModelError(
        f"profile gguf: the tokenizer makes {tokenizer.convert_ids_to_tokens(full)} of {text!r}; llama.cpp can put "
        f"only its bos token ({tokenizer.bos_token!r}) before and its eos token ({tokenizer.eos_token!r}) after a "
        f"text. {REMEDY}"
    )


_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
