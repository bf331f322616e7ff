"""Models in GGUF files: what a file says about itself, and what transformers makes of it."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from ...registry import ModelError
from ..output.reading import brief, shown
from .origin import is_own

ENDING = ".gguf"

NAME = f"model{ENDING}"

PLAIN = ("F32", "F16", "BF16")
"""Types of tensors that are not quantised."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor with the divisors of Llama 3's rotary frequencies."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What a GGUF leaves out of Llama 3's rotary scaling; equal in all of Meta's releases."""

UNQUANTISED = "name the model's folder or hub id without gguf"


@dataclass(frozen=True)
class GgufFacts:
    """What a GGUF file says about itself."""

    architecture: str
    weights: str
    """How the weights are stored, as results state it: ``dequantised from GGUF Q4_1``."""
    tensors: frozenset[str]
    rope_scaling: str | None
    rope_factors: tuple[float, ...] | None
    tokenizer: str | None
    """``tokenizer.ggml.model``; None for a file without tokenizer."""
    splitting: str | None
    """``tokenizer.ggml.pre``: llama.cpp's name for the rule that splits text before the merges."""


def find(folder: Path, name: str) -> Path:
    """The GGUF file ``name`` in ``folder``; raises :class:`ModelError` where there is none."""
    path = folder / name
    if not path.is_file():
        others = sorted(each.name for each in folder.glob(f"*{ENDING}"))
        there = f"there are {', '.join(map(brief, others[:3]))}" if others else "the folder has no GGUF"
        raise ModelError(f"model.gguf: there is no file {brief(name)} in {folder}; {there}")
    if not is_own(path, folder):
        raise ModelError(
            f"model.gguf: {path} lies outside of {folder}, or is a link to there; only files of the model's own folder "
            "are read. Name the folder that holds the file"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"model.gguf: {path} is not a GGUF (it does not begin with GGUF); name a file that is")
    return path


def facts_of(path: Path) -> GgufFacts:
    """What the file says about itself; read again only when its size or time has changed.

    Raises :class:`ModelError` if the file is damaged, or the package ``gguf`` is missing.
    """
    stat = path.stat()
    return _facts(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _facts(path: Path, size: int, changed: int) -> GgufFacts:
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            "model.gguf: reading a GGUF needs the package gguf, which is not installed: pip install gguf"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        found = {key: reader.fields[key].contents() for key in reader.fields if not _is_long(key)}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        counts = Counter[str]()
        for tensor in reader.tensors:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
        architecture = found["general.architecture"]
        factors = tensors.get(ROPE_FACTORS)
        names = {each.value: each.name for each in gguf.LlamaFileType}
        stored = names.get(found.get("general.file_type", -1), "").removeprefix("MOSTLY_").removeprefix("ALL_")
        stored = stored or counts.most_common(1)[0][0]
        return GgufFacts(
            architecture=architecture,
            weights=f"{'read' if set(counts) <= set(PLAIN) else 'dequantised'} from GGUF {stored}",
            tensors=frozenset(tensors),
            rope_scaling=found.get(f"{architecture}.rope.scaling.type"),
            rope_factors=None if factors is None else tuple(map(float, factors.data)),
            tokenizer=found.get("tokenizer.ggml.model"),
            splitting=found.get("tokenizer.ggml.pre"),
        )
    except Exception as error:  # a damaged file fails anywhere, with any error
        raise _damaged(path, error) from error


def _is_long(key: str) -> bool:
    return key.startswith("tokenizer.ggml.") and key.endswith(("tokens", "scores", "token_type", "merges"))


def _damaged(path: Path, error: Exception) -> ModelError:
    reason = brief(" ".join(str(error).split())) or type(error).__name__
    return ModelError(f"model.gguf: {path} is damaged or cut off ({reason}); download or copy it again")


@contextmanager
def alone(path: Path) -> Iterator[str]:
    """A temporary folder with nothing but ``path``, as :data:`NAME`: transformers reads other files next to a GGUF.

    Within it transformers' bar for dequantised tensors, which has no switch, is not drawn.
    """
    with tempfile.TemporaryDirectory(prefix="prunekit-gguf-") as folder, redirect_stderr(StringIO()):
        os.symlink(path.resolve(), Path(folder) / NAME)
        yield folder


def loading_options() -> dict[str, Any]:
    """Options of ``from_pretrained`` in a folder of :func:`alone`; no weight stays quantised."""
    import transformers

    blocks = getattr(transformers, "GgufConfig", None)  # versions without it always dequantise
    return {"gguf_file": NAME} | ({} if blocks is None else {"quantization_config": blocks(dequantize=True)})


def config_of(path: Path) -> Any:
    """transformers' configuration of the model, rotary scaling included; a new copy in every call.

    Raises :class:`ModelError` for an architecture or a scaling that transformers does not read.
    """
    stat = path.stat()
    return deepcopy(_config(path, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=8)
def _config(path: Path, size: int, changed: int) -> Any:
    import transformers

    facts = facts_of(path)
    try:
        with alone(path) as place:
            config = transformers.AutoConfig.from_pretrained(place, gguf_file=NAME)
    except Exception as error:
        kind = shown(facts.architecture)
        if "support" in str(error) or isinstance(error, KeyError):
            export = ", which prunekit's export writes for llama.cpp" if facts.architecture == "deci" else ""
            raise ModelError(
                f"model.gguf: {path} is of architecture {kind}{export}, which transformers {transformers.__version__} "
                f"does not read from a GGUF; {UNQUANTISED}"
            ) from error
        raise _damaged(path, error) from error
    if facts.rope_scaling not in (None, "none"):
        raise ModelError(
            f"model.gguf: {path} scales its rotary embeddings ({facts.architecture}.rope.scaling.type: "
            f"{shown(facts.rope_scaling)}), which transformers does not read from a GGUF; {UNQUANTISED}"
        )
    if facts.rope_factors is not None:
        config.rope_parameters = _llama3(config, torch.tensor(facts.rope_factors), path)
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path  # the file's general.name
    return config


def _llama3(config: Any, factors: torch.Tensor, path: Path) -> dict[str, Any]:
    """Llama 3's rotary scaling with these divisors of the frequencies, (head size / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = config.rope_parameters["rope_theta"]
    scaled = deepcopy(config)
    scaled.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factors.max().item(), **LLAMA3}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")
    expected = 1.0 / theta ** (torch.arange(len(factors)) / len(factors)) / factors
    if frequencies.shape != expected.shape or not torch.allclose(frequencies, expected, rtol=1e-4, atol=0):
        raise ModelError(
            f"model.gguf: {path} has rotary factors ({ROPE_FACTORS}) that are not those of Llama 3; {UNQUANTISED}"
        )
    return scaled.rope_parameters


def check_tensors(model: Any, path: Path) -> None:
    """Raise :class:`ModelError` for tensors of the file that have no place in the model: transformers skips them."""
    import gguf

    facts = facts_of(path)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[facts.architecture], model.config.get_text_config().num_hidden_layers)
    read = {names.get_name(key, try_suffixes=(".weight", ".bias")) for key in model.state_dict()}
    skipped = sorted(facts.tensors - read - {ROPE_FACTORS})
    if skipped:
        raise ModelError(
            f"model.gguf: {path} has {len(skipped)} tensors that transformers' {type(model).__name__} does not have "
            f"({brief(skipped[0])}), and without them this is another model; {UNQUANTISED}"
        )


def make_plain(model: Any) -> None:
    """Remove the marks of a quantised checkpoint from a model whose weights were dequantised."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def tokenizer_of(path: Path) -> Any:
    """The file's tokenizer; raises :class:`ModelError` for one that would not split text as in training."""
    import transformers
    from tokenizers import pre_tokenizers

    facts = facts_of(path)
    remedy = "give the model's own tokenizer: tokenizer: FOLDER_OR_HUB_ID in the section model"
    if facts.tokenizer is None:
        raise ModelError(f"model.gguf: {path} holds no tokenizer (tokenizer.ggml.model); {remedy}")
    try:
        with alone(path) as place:
            found = transformers.AutoTokenizer.from_pretrained(place, gguf_file=NAME)
        found.name_or_path = str(path)
        backend = found.backend_tokenizer
    except Exception as error:  # whatever a vocabulary of any origin makes transformers raise
        reason = brief(" ".join(str(error).split())) or type(error).__name__
        raise ModelError(
            f"model.gguf: transformers cannot read the tokenizer in {path} (tokenizer.ggml.model: "
            f"{shown(facts.tokenizer)}; {reason}); {remedy}"
        ) from error
    # Where transformers does not know the rule, it silently splits as GPT-2 does.
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and facts.splitting != "gpt-2":
        if facts.splitting != "smollm":
            raise ModelError(
                f"model.gguf: transformers does not know the rule by which the tokenizer in {path} splits text "
                f"(tokenizer.ggml.pre: {shown(facts.splitting)}); {remedy}"
            )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return found
