"""Shapes to measure time on; the weights are random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """What a shape is measured with: dtype, sequences, tokens of each, ratio."""

    dtype: str = "bfloat16"
    batch: int = 20
    length: int = 1024
    ratio: float = 0.4


@dataclass(frozen=True)
class Preset:
    """A model's shape, and its default cases."""

    family: str
    """llama or opt."""
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    skipped_layers: tuple[int, ...] = ()
    """Layers that the PP paper does not prune; with fewer layers than ``layers`` all are pruned."""
    cases: tuple[Case, ...] = (Case(),)
    """All are measured by default; an option that is not given has the value of the first case."""
    vocabulary: int = 512
    """Tokens that can be embedded; small where it makes no difference, because no logits are computed."""

    def config(self, layers: int, length: int) -> Any:
        """The configuration of a model of ``layers`` layers; its output embeddings, never used, take no memory."""
        import transformers

        shared: dict[str, Any] = dict(
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            max_position_embeddings=max(length, 2048),
            hidden_size=self.hidden,
        )
        if self.family == "opt":
            shared |= {"ffn_dim": self.intermediate, "word_embed_proj_dim": self.hidden, "dropout": 0.0}
            return transformers.OPTConfig(**shared)
        shared |= {"intermediate_size": self.intermediate, "num_key_value_heads": self.kv_heads}
        return transformers.LlamaConfig(**shared)

    @property
    def words(self) -> str:
        """The shape, for a protocol."""
        heads = f"{self.heads} heads" + (f" in {self.kv_heads} groups" if self.kv_heads != self.heads else "")
        return f"hidden {self.hidden}, {heads}, MLP {self.intermediate}"


PAPER = (0, 1, 2)

SMALL = (
    Case("float32", length=256),
    Case("bfloat16", length=256),
    Case("bfloat16", length=256, ratio=0.2),
    Case("float32", batch=4, length=128),
    Case("bfloat16", batch=4, length=128),
)

SMOL = tuple(
    Case(dtype, *shape, ratio)
    for shape in ((20, 512), (4, 128))
    for ratio in (0.4, 0.2)
    for dtype in ("float32", "bfloat16")
)

PRESETS = {
    "llama-2-7b": Preset("llama", 4096, 11008, 32, 32, 32, PAPER),
    "llama-3-8b": Preset("llama", 4096, 14336, 32, 8, 32, PAPER),
    "opt-13b": Preset("opt", 5120, 20480, 40, 40, 40, PAPER),
    "smollm2-135m": Preset("llama", 576, 1536, 9, 3, 30, PAPER, SMOL, 49152),
    "cpu-small": Preset("llama", 1024, 2816, 16, 16, 2, cases=SMALL),
}
