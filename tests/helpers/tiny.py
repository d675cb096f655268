"""Tiny real models, tokenizers and plans, made by transformers' own classes with random weights."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from minitron.model.architecture import Shape
from minitron.pruning.plan import Plan

logging.disable_progress_bar()  # as the command line does: tests read what it prints

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GRANITE_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
# Name -> family and what differs from the plain config. `dtype` and `shard` say how the weights are saved.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head_dim": ("llama", {"head_dim": 6}),
    "llama-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "llama-sharded": ("llama", {"shard": "20KB"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-head_dim": ("mistral", {"sliding_window": None, "hidden_size": 36, "head_dim": 6}),
    "nemotron": ("nemotron", {"head_dim": 6}),
    "nemotron-biases": ("nemotron", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 6, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 6, "pad_token_id": 0}),
    "gemma2": ("gemma2", {"head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 7}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma3": ("gemma3_text", {"head_dim": 6, "sliding_window": 5, "sliding_window_pattern": 3}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "pad_token_id": 0}),
    "olmo2": ("olmo2", {"pad_token_id": 0}),
    "granite": ("granite", GRANITE_MULTIPLIERS),
}
# One variant of each family.
FIRST = {family: variant for variant, (family, _) in reversed(VARIANTS.items())}


def checkpoint(variant: str, path: Path, **changes: Any) -> Path:
    """Save a model of a variant into the directory `path`, with further config changes."""
    family, differs = VARIANTS[variant]
    options = SIZES | differs | changes
    dtype, shard = options.pop("dtype", torch.float32), options.pop("shard", "1GB")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    randomize(model)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights of a size that keeps activations near one; gains that are not all one, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.add_(0.3 * noise)  # some families store a gain as its difference from one
        else:
            parameter.copy_(0.3 * noise if parameter.ndim == 1 else noise / parameter.shape[1] ** 0.5)


def model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a directory."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()


@torch.no_grad()
def logits(of: Any, tokens: Tensor) -> Tensor:
    return of(input_ids=tokens, use_cache=False).logits


def tokens(num_samples: int, num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, SIZES["vocab_size"], (num_samples, num_tokens), generator=torch.Generator().manual_seed(seed)
    )


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, read by safetensors itself."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def identity_plan(shape: Shape) -> Plan:
    """The plan that keeps everything."""
    return plan(shape)


def plan(teacher: Shape, seed: int = 0, **sizes: int) -> Plan:
    """A random plan to a student of the given sizes: what stays is drawn, not scored."""
    student, draw = replace(teacher, **sizes), random.Random(seed)

    def some(total: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(total), count)))

    kv_heads = [some(teacher.kv_heads, student.kv_heads) for _ in range(student.layers)]
    heads = [
        tuple(kv * teacher.group + head for kv in kept for head in some(teacher.group, student.group))
        for kept in kv_heads
    ]
    return Plan(
        teacher=teacher,
        student=student,
        layers=some(teacher.layers, student.layers),
        hidden=some(teacher.hidden, student.hidden),
        ffn=tuple(some(teacher.ffn, student.ffn) for _ in range(student.layers)),
        heads=tuple(heads),
        kv_heads=tuple(kv_heads),
    )


def tokenizer(path: Path, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer saved into `path`: with an end token only, or one that puts a start token itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"] if adds_bos else ["</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(["the rain in the plain remains; le café, ein Über-Wort, 漢字 and 🙂\t "] * 4, trainer)
    if adds_bos:
        start = core.token_to_id("<s>")
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    else:
        core.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2 and Llama 3 have it
    names = {"bos_token": "<s>"} if adds_bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", **names)
    fast.save_pretrained(path)
    return fast


def sentencepiece(path: Path, *, bos: bool = True, special: bool = True) -> Path:
    """A Llama-like directory: a space is a letter that is put before the text, and BOS before all."""
    letters = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    special_tokens = ["<unk>", "<s>", "</s>"] if special else []
    vocabulary = {text: index for index, text in enumerate([*special_tokens, *letters, "▁t", "he", "▁the"])}
    merges = [["▁", "t"], ["h", "e"], ["▁t", "he"]]
    added = [token(text, index) for index, text in enumerate(special_tokens)]
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] if bos and special else []
    stored = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*template, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}} if template else {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>" if special else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    path.mkdir(parents=True, exist_ok=True)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} if special else {}
    (path / "tokenizer.json").write_text(json.dumps(stored))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, **roles})
    )
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(vocabulary)}))
    return path


def token(content: str, id: int, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **flags, "special": special}
