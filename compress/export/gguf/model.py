"""A GGUF run by llama.cpp behind the interface of a transformers model, to measure the written file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ....registry import ModelError
from ...models.loading import Loaded


class GgufModel:
    """Computes logits of a GGUF with llama.cpp on the CPU, with float32 caches, one row at a time.

    Needs llama-cpp-python. Raises :class:`ModelError` if llama.cpp does not load the file.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path):
        import llama_cpp

        cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        try:
            self.llama = llama_cpp.Llama(str(path), n_ctx=0, logits_all=True, flash_attn=False, verbose=False, **cache)
        except ValueError as error:
            raise ModelError(f"llama.cpp does not load {path} ({error}); export the model again") from error
        context, vocabulary = self.llama.n_ctx(), self.llama.n_vocab()
        text = SimpleNamespace(max_position_embeddings=context)
        self.config = SimpleNamespace(get_text_config=lambda: text, _attn_implementation="llama.cpp")
        self._embeddings = nn.Embedding(vocabulary, 1)

    def get_input_embeddings(self) -> nn.Embedding:
        """An embedding with one row for each token; its values have no meaning."""
        return self._embeddings

    def __call__(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """Logits (B, T, V) float32 of ids (B, T)."""
        rows = []
        for ids in input_ids.tolist():
            self.llama.reset()
            self.llama.eval(ids)
            rows.append(torch.from_numpy(numpy.array(self.llama.scores[: len(ids)], dtype=numpy.float32)))
        return SimpleNamespace(logits=torch.stack(rows))


def load_gguf(path: Path, tokenizer_folder: Path) -> Loaded:
    """A GGUF with the transformers tokenizer in its folder."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_folder), trust_remote_code=False)
    return Loaded(GgufModel(path), tokenizer, {"name": path.name, "revision": None, "commit": None})
