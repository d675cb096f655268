"""Train the demo teacher that ships in src/minitron/assets/demo-teacher: tokenizer and model, from nothing, on one CPU.

    python benchmarks/train_demo_teacher.py --out /tmp/demo-teacher [--tokens 24000000] [--threads 2]

The text is the running Python's standard library with its tests; the documents that the built-in corpus holds out
are never seen, neither by the tokenizer nor by the model.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minitron.cli.process import keep_freed_memory
from minitron.data.config import DataConfig
from minitron.data.corpus import Corpus, batch_rows
from minitron.data.sources import builtin_documents
from minitron.data.writing import is_heldout, prepare

SEED = 1407
VOCAB = 4096
BLOCK_TOKENS = 256
BATCH = 16
PEAK_LR, MIN_LR, WARMUP_STEPS, WEIGHT_DECAY = 2e-3, 1e-4, 200, 0.1


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Indentation and newlines are words of Python; digits are single so that numbers cost no vocabulary.
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_max_length=512, clean_up_tokenization_spaces=False
    )


def learning_rate(step: int, num_steps: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return MIN_LR + (PEAK_LR - MIN_LR) * (1 + math.cos(math.pi * progress)) / 2


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, blocks, num_blocks: int) -> float:
    rows = [torch.from_numpy(blocks.select(range(i, min(i + BATCH, num_blocks)))) for i in range(0, num_blocks, BATCH)]
    return sum(float(loss_of(model, tokens)) * len(tokens) for tokens in rows) / num_blocks


def card(corpus: Corpus, history: list[dict[str, float]]) -> str:
    """The model card: what it is, how it was trained, and its held-out loss as training went on."""
    last = history[-1]
    curve = "\n".join(
        f"| {row['tokens'] / 1e6:.1f}M | {row['train_loss']:.3f} | {row['heldout_loss']:.3f} |"
        for row in [*history[:-1][1::2], last]
    )
    return f"""---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
tags: [llama, python, demo]
---

# minitron demo teacher

A Llama of 6.5 million parameters (hidden 256, ffn 704, 6 layers, 4 heads, 2 kv heads, vocabulary 4096, untied) that
writes Python-like text. It is the teacher of `minitron demo`, and of no other use.

## Training

Trained from random weights by `benchmarks/train_demo_teacher.py` (`make demo-teacher`), seed {SEED}, on the source text
of the Python 3.11 standard library with its tests: {corpus.train_documents:,} files, {corpus.train_tokens:,} tokens
of a byte-level BPE tokenizer trained on the same files. {last["tokens"] / 1e6:.1f}M tokens were seen,
{last["tokens"] / corpus.train_tokens:.1f} passes, in blocks of {BLOCK_TOKENS} tokens, {BATCH} blocks a step: AdamW with
weight decay {WEIGHT_DECAY}, learning rate {PEAK_LR} after {WARMUP_STEPS} steps of warm-up and a cosine to {MIN_LR},
bfloat16 products and float32 weights, on two CPU cores.

{corpus.heldout_documents} library files ({corpus.heldout_tokens:,} tokens) were held out from tokenizer and model:
those that minitron's built-in corpus holds out by a hash of their path. Tests of the held-out modules were not.

Held-out loss at the end, over all of them: **{last["heldout_loss"]:.3f} nats per token**. On the way, over the first 64
blocks (the last row is over all):

| tokens | training batch | held out |
| ---: | ---: | ---: |
{curve}

Licence: the text is under the Python Software Foundation License Version 2, and so are these weights.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=24_000_000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)

    work = args.out.with_name(args.out.name + "-work")
    work.mkdir(parents=True, exist_ok=True)
    fraction = DataConfig().heldout_fraction
    train = [d for d in [*builtin_documents(), *builtin_documents(tests=True)] if not is_heldout(d, fraction)]
    held = [d for d in builtin_documents() if is_heldout(d, fraction)]
    for name, documents in (("train", train), ("heldout", held)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents))
    tokenizer = build_tokenizer([d.text for d in train])
    data = DataConfig(source=str(work / "train.jsonl"), heldout=str(work / "heldout.jsonl"))
    corpus = prepare(data, tokenizer, vocab=VOCAB, block_tokens=BLOCK_TOKENS, out=work)
    print(corpus, flush=True)

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    decay = [p for p in model.parameters() if p.ndim == 2]
    no_decay = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    num_steps = args.tokens // (BATCH * BLOCK_TOKENS)
    start, history = time.monotonic(), []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        rows = batch_rows(len(corpus.train), seed=SEED, step=step, batch=BATCH)
        loss = loss_of(model, torch.from_numpy(corpus.train.select(rows)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 500 == 0 or step + 1 == num_steps:
            full = step + 1 == num_steps
            blocks = len(corpus.heldout) if full else min(64, len(corpus.heldout))
            tokens = (step + 1) * BATCH * BLOCK_TOKENS
            held_loss = heldout_loss(model, corpus.heldout, blocks)
            history.append({"tokens": tokens, "train_loss": loss.item(), "heldout_loss": held_loss})
            print(json.dumps(history[-1] | {"seconds": round(time.monotonic() - start)}), flush=True)
        if (step + 1) % 500 == 0:
            model.save_pretrained(work / "latest")
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (work / "history.json").write_text(json.dumps(history, indent=2))
    (args.out / "README.md").write_text(card(corpus, history))


if __name__ == "__main__":
    main()
