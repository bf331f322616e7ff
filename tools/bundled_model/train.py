"""Train the bundled language model, or a larger one of its kind, from public-domain books and Python's documentation.

`python -m tools.bundled_model.train --corpus DIR --out DIR --minutes 66` trains for a time;
the recipe it writes names the steps that this took, and `--steps N --decay-steps M` walks the same schedule again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from prunekit.compress.bundled import TEXTS
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.bundled_model.baselines import figures
from tools.bundled_model.data import batches, encode, train_tokenizer
from tools.bundled_model.measure import mean_loss
from tools.bundled_model.recipe import Recipe, training_documents


def arguments() -> argparse.Namespace:
    """The command line; the defaults are those of the bundled model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with book-*.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and recipe.json")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="time for the optimizer steps, start-up not counted")
    length.add_argument("--steps", type=int, help="number of optimizer steps")
    parser.add_argument("--decay-steps", type=int, help="last steps, with falling rate; 0.3 of the run if not given")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    for name, value in (
        ("vocab", 4096),
        ("hidden", 240),
        ("layers", 8),
        ("heads", 10),
        ("kv-heads", 5),
        ("head-dim", 32),
        ("intermediate", 512),
        ("context", 512),
        ("batch", 8),
        ("warmup", 200),
        ("seed", 0),
        ("log-every", 50),
        ("evaluate-every", 250),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=name.replace("-", " "))
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="on matrices only")
    parser.add_argument("--docs-share", type=float, default=0.35, help="share of windows from Python's documentation")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    return parser.parse_args()


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model of the requested size."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_dim,
            intermediate_size=args.intermediate,
            max_position_embeddings=args.context,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save a bfloat16 copy of the model and the tokenizer, each file readable for all and renamed into place."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],
    )
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        copy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = Path(folder, "tokenizer_config.json")  # the class under the name that other versions know as well
        settings = json.loads(config.read_text()) | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
        }
        config.write_text(json.dumps(settings, indent=2) + "\n")
        for file in sorted(Path(folder).iterdir()):
            file.chmod(0o644)
            os.replace(file, out / file.name)


class Schedule:
    """Warm-up, a constant rate, and a linear fall to zero, its end fixed by steps or, once, by the clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Take the number of steps from the command line, or leave it open."""
        self.warmup, self.rate, self.minutes, self.steps = args.warmup, args.rate, args.minutes, args.steps
        self.decay = args.decay_steps or (round(0.3 * args.steps) if args.steps else None)

    def look(self, step: int, seconds: float) -> None:
        """Fix the number of steps when 0.7 of the time is over, assuming the speed so far."""
        if self.steps is None and seconds >= 0.7 * 60 * self.minutes:
            self.decay = max(1, round(step * (60 * self.minutes / seconds - 1)))
            self.steps = step + self.decay

    def at(self, step: int) -> float:
        """The learning rate of one step, the first being 0."""
        value = self.rate * min(1.0, (step + 1) / self.warmup)
        return value if self.steps is None else min(value, self.rate * max(0, self.steps - step) / self.decay)

    def note(self) -> dict:
        """What is needed to walk the same schedule again."""
        return {
            "steps": self.steps,
            "warmup": self.warmup,
            "decay_steps": self.decay,
            "rate": self.rate,
            "formula": "rate(i) = peak * min((i + 1) / warmup, 1, (steps - i) / decay_steps), i from 0",
        }


def optimizer_for(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices and none on the norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=True)


def loss_function(model: LlamaForCausalLM, device: str, compiled: bool):
    """A function from a batch to its mean next-token loss, computed under bfloat16 autocast."""

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss of one batch."""
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())

    return torch.compile(loss_of) if compiled else loss_of


def train(args: argparse.Namespace, model: LlamaForCausalLM, source, recipe: Recipe, checkpoint) -> None:
    """Take the optimizer steps; `checkpoint` is called every `--evaluate-every` of them and at the end."""
    optimizer, schedule = optimizer_for(model, args), Schedule(args)
    loss_of = loss_function(model, recipe.device, args.compile)
    loss_of(next(source).to(recipe.device)).backward()  # compiles; this gradient is thrown away
    optimizer.zero_grad()
    recent, step, recipe.started = [], 0, time.time()
    while schedule.steps is None or step < schedule.steps:
        schedule.look(step, time.time() - recipe.started)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        loss = loss_of(next(source).to(recipe.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.detach())
        step += 1
        recipe.steps_done, recipe.schedule = step, schedule.note()
        if step % args.log_every == 0:
            recipe.train_loss.append([step, round(torch.stack(recent).mean().item(), 4)])
            recent.clear()
            print(
                f"step {step} loss {recipe.train_loss[-1][1]} rate {schedule.at(step - 1):.2e} "
                f"{time.time() - recipe.started:.0f} s",
                flush=True,
            )
        if step % args.evaluate_every == 0 or step == schedule.steps:
            pause = time.time()
            checkpoint()
            recipe.paused += time.time() - pause


def main() -> None:
    """Prepare the data, train, export at intervals and at the end, measure, and write the recipe."""
    args, begin = arguments(), time.time()
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    sources, note = training_documents(args.corpus)
    tokenizer = train_tokenizer(
        (text for documents in sources.values() for text in documents.values()), args.vocab, args.context
    )
    streams = {name: encode(tokenizer, documents.values()) for name, documents in sources.items()}
    note["tokens"] = {name: len(stream) for name, stream in streams.items()}
    texts = {
        key: tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"] for key, path in TEXTS.items()
    }
    shares = {"books": 1 - args.docs_share, "docs": args.docs_share}
    source = batches(streams, shares, args.batch, args.context, args.seed)
    model = new_model(args, tokenizer).to(device)
    recipe = Recipe(args, device, note, sum(p.numel() for p in model.parameters()), begin)

    def checkpoint() -> None:
        """Measure on the evaluation texts and write everything out."""
        losses = {
            key: round(mean_loss(model, ids, args.context)[0], 4)
            for key, ids in texts.items()
            if key.endswith("evaluation")
        }
        recipe.evaluation_loss.append({"step": recipe.steps_done} | losses)
        print(recipe.evaluation_loss[-1], flush=True)
        export(model, tokenizer, args.out)
        recipe.save(args.out / "recipe.json")

    train(args, model, source, recipe, checkpoint)
    recipe.save(args.out / "recipe.json", perplexity=figures(args.out, streams, texts, args.context))


if __name__ == "__main__":
    main()
