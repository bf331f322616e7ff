"""Unigram and interpolated Kneser-Ney 3-gram models over the same tokens, to judge the bundled model by."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import torch
from transformers import AutoModelForCausalLM

from tools.bundled_model.measure import mean_loss, text_windows


class Level:
    """Discounted relative frequencies of one n-gram order, and the mass that they leave to the order below."""

    def __init__(self, keys: numpy.ndarray, counts: numpy.ndarray, vocab: int) -> None:
        """Take the distinct n-grams, packed into sorted integers, and their counts."""
        self.keys, self.counts, self.vocab = keys, counts, vocab
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self.discount = once / max(1, once + 2 * twice)
        self.contexts, first = numpy.unique(keys // vocab, return_index=True)
        self.totals = numpy.add.reduceat(counts, first)
        self.types = numpy.diff(numpy.append(first, len(keys)))

    @staticmethod
    def look_up(keys: numpy.ndarray, values: numpy.ndarray, wanted: numpy.ndarray) -> numpy.ndarray:
        """The value of every wanted key, 0 where it does not occur."""
        place = numpy.minimum(numpy.searchsorted(keys, wanted), len(keys) - 1)
        return numpy.where(keys[place] == wanted, values[place], 0)

    def probability(self, wanted: numpy.ndarray, lower: numpy.ndarray) -> numpy.ndarray:
        """Probability of the last token of every packed n-gram, given that of the order below."""
        total = self.look_up(self.contexts, self.totals, wanted // self.vocab)
        types = self.look_up(self.contexts, self.types, wanted // self.vocab)
        own = numpy.maximum(self.look_up(self.keys, self.counts, wanted) - self.discount, 0)
        return numpy.where(total > 0, (own + self.discount * types * lower) / numpy.maximum(total, 1), lower)


class KneserNey:
    """Interpolated Kneser-Ney 3-gram model with one discount per order, ending in the uniform distribution."""

    def __init__(self, stream: numpy.ndarray, vocab: int) -> None:
        """Count a stream of token ids; the lower orders count distinct continuations."""
        self.vocab = vocab
        packed = (stream[:-2] * vocab + stream[1:-1]) * vocab + stream[2:]
        triples, counts = numpy.unique(packed, return_counts=True)
        pairs, pair_counts = numpy.unique(triples % vocab**2, return_counts=True)
        singles, single_counts = numpy.unique(pairs % vocab, return_counts=True)
        self.levels = [
            Level(singles, single_counts, vocab),
            Level(pairs, pair_counts, vocab),
            Level(triples, counts, vocab),
        ]

    def probabilities(self, window: numpy.ndarray) -> numpy.ndarray:
        """Probability of every token of a window but the first, from the tokens of the window alone."""
        single = self.levels[0].probability(window[1:], numpy.full(len(window) - 1, 1 / self.vocab))
        pair = self.levels[1].probability(window[:-1] * self.vocab + window[1:], single)
        triple = (window[:-2] * self.vocab + window[1:-1]) * self.vocab + window[2:]
        return numpy.append(pair[:1], self.levels[2].probability(triple, pair[1:]))


def unigram(stream: numpy.ndarray, vocab: int) -> numpy.ndarray:
    """Relative frequencies with one added to every count."""
    counts = numpy.bincount(stream, minlength=vocab) + 1
    return counts / counts.sum()


def perplexity_of(probabilities: numpy.ndarray) -> float:
    """The exponential of the mean negative logarithm."""
    return round(math.exp(-numpy.log(probabilities).mean()), 2)


def figures(folder: Path, streams: dict[str, torch.Tensor], texts: dict[str, list[int]], context: int) -> dict:
    """Perplexities of the saved model, loaded in float32, and of the baselines, on the same tokens of every text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocab = model.config.vocab_size
    parts = {name: stream.numpy() for name, stream in streams.items()}
    everything = numpy.concatenate(list(parts.values()))
    frequencies, trigram = unigram(everything, vocab), KneserNey(everything, vocab)
    books, docs = (KneserNey(parts[name], vocab) for name in ("books", "docs"))
    rows = {}
    for key, ids in texts.items():
        loss, count = mean_loss(model, ids, context)
        windows = [numpy.array(window) for window in text_windows(ids, context)]
        tokens = numpy.concatenate([window[1:] for window in windows])
        from_all, from_books, from_docs = (
            numpy.concatenate([counts.probabilities(window) for window in windows]) for counts in (trigram, books, docs)
        )
        mixtures = [perplexity_of(w * from_docs + (1 - w) * from_books) for w in numpy.linspace(0, 1, 21)]
        rows[key] = {
            "tokens": count,
            "model": round(math.exp(loss), 2),
            "unigram": perplexity_of(frequencies[tokens]),
            "trigram": perplexity_of(from_all),
            "trigram_mixture": min(mixtures),
        }
    return {
        "windows": f"`<s>` once before the text, consecutive windows of {context} tokens without overlap, the last one "
        "shorter; the first token of a window is context only; every scored token weighs the same",
        "model": "bfloat16 weights of this folder, loaded and run in float32",
        "unigram": "add-one relative frequencies in books and documentation, every training token once",
        "trigram": "interpolated Kneser-Ney, one discount n1 / (n1 + 2 n2) per order, counted on the same tokens",
        "trigram_mixture": "two such models, of the books and of the documentation, mixed with the weight (in steps of "
        "0.05) that suits the text itself best, a favour to the baseline",
        "texts": rows,
    }
