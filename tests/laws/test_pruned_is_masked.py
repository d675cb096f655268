"""The master law: cutting units out of the files is zeroing them in the teacher."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from minitron.core.errors import PlanError
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.pruning.cut import cut
from minitron.pruning.plan import Plan, compose

CUTS = {
    "ffn": {"ffn": 17},
    "heads": {"heads": 4},
    "kv_heads": {"kv_heads": 2, "heads": 4},
    "hidden": {"hidden": 24},
    "layers": {"layers": 2},
    "everything": {"layers": 3, "hidden": 24, "ffn": 23, "kv_heads": 3, "heads": 3},
}
# Where the config has no head_dim, heads must fill hidden.
FILLED = CUTS | {
    "heads": {"heads": 4, "hidden": 16},
    "kv_heads": {"kv_heads": 2, "heads": 4, "hidden": 16},
    "hidden": {"hidden": 24, "heads": 6, "kv_heads": 3},
    "everything": {"layers": 3, "hidden": 24, "ffn": 23, "kv_heads": 3, "heads": 6},
}


def a_plan(checkpoint: Checkpoint, sizes: str) -> Plan:
    """A random plan of the given kind that the family allows."""
    cuts = FILLED if checkpoint.architecture.heads_fill_hidden else CUTS
    return tiny.plan(checkpoint.shape, **cuts[sizes])


def cut_to(checkpoint: Checkpoint, plan: Plan, out: Path, **options: Any) -> Path:
    out.mkdir(exist_ok=True)
    cut(checkpoint, plan, out, **options)
    return out


@torch.no_grad()
def masked_teacher(path: Path, plan: Plan) -> Any:
    """transformers' own model of the teacher with everything that the plan drops set to zero where it is used."""
    model = tiny.model(path)
    core, teacher = model.model, plan.teacher
    for index in set(range(teacher.layers)) - set(plan.layers):
        _zero_outputs(core.layers[index], torch.zeros(teacher.hidden))
    kept_layers = [core.layers[index] for index in plan.layers]
    for layer, ffn, heads, kv_heads in zip(kept_layers, plan.ffn, plan.heads, plan.kv_heads, strict=True):
        queries, keys = (
            [head * teacher.head_dim + channel for head in kept for channel in range(teacher.head_dim)]
            for kept in (heads, kv_heads)
        )
        _zero_inputs(layer.mlp.down_proj, set(ffn))
        _zero_inputs(layer.self_attn.o_proj, set(queries))
        for name, kept, total in (("q_norm", queries, teacher.heads), ("k_norm", keys, teacher.kv_heads)):
            norm = getattr(layer.self_attn, name, None)
            if norm is not None and norm.weight.numel() == total * teacher.head_dim:  # over all heads at once
                setattr(layer.self_attn, name, KeptNorm(norm, kept))
    _zero_hidden(core, list(plan.hidden))
    return model


def _zero_inputs(module: nn.Module, kept: set[int]) -> None:
    mask = torch.tensor([float(index in kept) for index in range(module.in_features)])
    module.register_forward_pre_hook(lambda _, args: (args[0] * mask,))


def _zero_hidden(core: Any, kept: list[int]) -> None:
    """Zeros in the residual stream's dropped channels, and norms that average over the others."""
    mask = torch.zeros(core.embed_tokens.weight.shape[1])
    mask[kept] = 1
    core.embed_tokens.weight.mul_(mask)
    for layer in core.layers:
        _zero_outputs(layer, mask)
        for name in [name for name, _ in layer.named_children() if "layernorm" in name]:
            setattr(layer, name, KeptNorm(getattr(layer, name), kept))
    core.norm = KeptNorm(core.norm, kept)


def _zero_outputs(layer: Any, mask: torch.Tensor) -> None:
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        linear.weight.mul_(mask[:, None])
        if linear.bias is not None:
            linear.bias.mul_(mask)


class KeptNorm(nn.Module):
    """A norm over the kept channels alone, with zeros in the others."""

    def __init__(self, norm: Any, kept: list[int]):
        super().__init__()
        kind = type(norm).__name__
        self.weight, self.kept, self.centred = norm.weight, kept, "LayerNorm" in kind
        self.gain = norm.weight[kept] + (1 if kind.startswith("Gemma") or kind.endswith("1P") else 0)
        self.bias = norm.bias[kept] if self.centred else 0
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        kept = states[..., self.kept]
        kept = kept - kept.mean(-1, keepdim=True) if self.centred else kept
        normed = kept / (kept.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return torch.zeros_like(states).index_copy(-1, torch.tensor(self.kept), normed * self.gain + self.bias)


@pytest.mark.parametrize("sizes", CUTS)
def test_pruned_model_equals_masked_teacher(directory: Path, sizes: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    plan = a_plan(checkpoint, sizes)
    pruned = tiny.model(cut_to(checkpoint, plan, tmp_path / "student"))
    tokens = tiny.tokens(2, 12)
    expected = tiny.logits(masked_teacher(directory, plan), tokens)
    torch.testing.assert_close(tiny.logits(pruned, tokens), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert not torch.allclose(expected, tiny.logits(tiny.model(directory), tokens), atol=1e-2)


def test_identity_plan_returns_the_same_bits_and_config(directory: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    out = cut_to(checkpoint, tiny.identity_plan(checkpoint.shape), tmp_path / "student")
    before, after = tiny.tensors(directory), tiny.tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert json.loads((out / "config.json").read_text()) == json.loads((directory / "config.json").read_text())


def test_counted_parameters_of_the_pruned_model_are_the_real_ones(directory: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    plan = a_plan(checkpoint, "everything")
    out = cut_to(checkpoint, plan, tmp_path / "student")
    counted = open_checkpoint(out).parameters
    assert counted.total == sum(p.numel() for p in tiny.model(out).parameters())
    assert counted == checkpoint.architecture.count(plan.student, checkpoint.config)


@pytest.mark.parametrize("directory", ["llama", "llama-tied", "phi3"], indirect=True)
def test_sharded_and_single_file_outputs_hold_the_same_model(directory: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    plan = a_plan(checkpoint, "everything")
    single = cut_to(checkpoint, plan, tmp_path / "single")
    sharded = cut_to(checkpoint, plan, tmp_path / "sharded", shard_bytes=20_000)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    tokens = tiny.tokens(1, 9)
    assert torch.equal(tiny.logits(tiny.model(sharded), tokens), tiny.logits(tiny.model(single), tokens))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "derived"])
@pytest.mark.parametrize("variant", ["qwen2", "gemma2", "gemma3", "smollm3"])
def test_per_layer_lists_are_cut_with_the_layers(variant: str, stored: bool, tmp_path: Path) -> None:
    directory = tiny.checkpoint(variant, tmp_path / "teacher")
    config = json.loads((directory / "config.json").read_text())
    keys = open_checkpoint(directory).architecture.per_layer_keys
    lists = {key: config[key] for key in keys if config.get(key)}
    assert any(len(set(values)) > 1 for values in lists.values())
    if not stored:  # transformers derives them from the number of the layer
        (directory / "config.json").write_text(json.dumps({key: config[key] for key in config.keys() - set(keys)}))
    checkpoint = open_checkpoint(directory)
    plan = tiny.plan(checkpoint.shape, layers=2, seed=1)
    out = cut_to(checkpoint, plan, tmp_path / "student")
    new = json.loads((out / "config.json").read_text())
    assert {key: new[key] for key in lists} == {
        key: [values[layer] for layer in plan.layers] for key, values in lists.items()
    }


@pytest.mark.parametrize("sizes", ["layers", "everything"])
def test_cutting_by_the_composed_plan_is_cutting_twice(directory: Path, sizes: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    first = a_plan(checkpoint, sizes)
    once = open_checkpoint(cut_to(checkpoint, first, tmp_path / "once"))
    again = {"layers": {"layers": 1}, "everything": {"layers": 2, "ffn": 11}}[sizes]
    if sizes == "everything" and not checkpoint.architecture.heads_fill_hidden:
        again |= {"hidden": 12, "kv_heads": 2, "heads": 2}
    second = tiny.plan(once.shape, seed=1, **again)
    twice = cut_to(once, second, tmp_path / "twice")
    both = cut_to(checkpoint, compose(first, second), tmp_path / "both")
    assert json.loads((both / "config.json").read_text()) == json.loads((twice / "config.json").read_text())
    expected = tiny.tensors(twice)
    rescaled = {checkpoint.architecture.embedding, f"{checkpoint.architecture.final_norm}.weight"}
    for name, tensor in tiny.tensors(both).items():
        if checkpoint.architecture.embedding_times_sqrt_hidden and name in rescaled:  # two roundings, or one
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_plan_for_another_shape_is_refused(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    other = tiny.identity_plan(tiny.plan(checkpoint.shape, ffn=17).student)
    with pytest.raises(PlanError, match=r"plan is for a teacher of shape .*ffn=17.*has .*ffn=40"):
        cut(checkpoint, other, tmp_path)


LOAD_WITHOUT_MINITRON = """
import sys
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    model, notes = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(notes.values()), (path, notes)
    print(sum(p.numel() for p in model.parameters()))
assert "minitron" not in sys.modules
"""


def test_pruned_directories_load_without_minitron(tmp_path: Path) -> None:
    outs = []
    for variant in tiny.VARIANTS:
        checkpoint = open_checkpoint(tiny.checkpoint(variant, tmp_path / variant))
        plan = a_plan(checkpoint, "everything")
        outs.append(cut_to(checkpoint, plan, tmp_path / f"{variant}-student"))
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_MINITRON, *outs],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert loaded.returncode == 0, loaded.stderr
    assert [int(line) for line in loaded.stdout.split()] == [open_checkpoint(out).parameters.total for out in outs]
