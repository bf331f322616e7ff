"""Tokenizer training and packed training windows for the bundled model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts: Iterable[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE tokenizer with `vocab` entries that begins every text with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> torch.Tensor:
    """One stream of token ids in which `<s>` stands before every document."""
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer(document, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.long)


def windows(stream: torch.Tensor, context: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless passes over a stream in shuffled windows, the cutting points shifted anew for every pass."""
    while True:
        shift = int(torch.randint(min(context, max(1, len(stream) - context)), (1,), generator=generator))
        count = (len(stream) - shift) // context
        for index in torch.randperm(count, generator=generator).tolist():
            start = shift + index * context
            yield stream[start : start + context]


def batches(
    streams: dict[str, torch.Tensor], shares: dict[str, float], size: int, context: int, seed: int
) -> Iterator[torch.Tensor]:
    """Endless batches whose windows come from each stream with the probability that `shares` gives it."""
    generator = torch.Generator().manual_seed(seed)
    names = list(streams)
    weights = torch.tensor([shares[name] for name in names], dtype=torch.float64)
    sources = [windows(streams[name], context, generator) for name in names]
    while True:
        picks = torch.multinomial(weights, size, replacement=True, generator=generator).tolist()
        yield torch.stack([next(sources[pick]) for pick in picks])
