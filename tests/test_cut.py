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

from minitron.errors import PlanError
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.prune.cut import cut
from minitron.prune.plan import Plan, identity_plan

CUTS = {
    "ffn": {"ffn": 17},
    "heads": {"heads": 4},
    "kv_heads": {"kv_heads": 2, "heads": 4},
    "hidden": {"hidden": 24},
    "layers": {"layers": 2},
    "everything": {"layers": 3, "hidden": 24, "ffn": 23, "kv_heads": 3, "heads": 3},
}


def cut_to(checkpoint: Checkpoint, plan: Plan, out: Path, **options: Any) -> Path:
    out.mkdir(exist_ok=True)
    cut(checkpoint, plan, out, **options)
    return out


@torch.no_grad()
def masked_teacher(path: Path, plan: Plan) -> Any:
    """transformers' own model of the teacher with everything that the plan drops set to zero where it is used."""
    model = tiny.model(path)
    core = model.model
    core.layers = nn.ModuleList(core.layers[index] for index in plan.layers)
    model.config.num_hidden_layers = len(plan.layers)
    for layer, ffn, heads in zip(core.layers, plan.ffn, plan.heads, strict=True):
        channels = [head * plan.teacher.head_dim + c for head in heads for c in range(plan.teacher.head_dim)]
        _zero_inputs(layer.mlp.down_proj, set(ffn))
        _zero_inputs(layer.self_attn.o_proj, set(channels))
    _zero_hidden(core, set(plan.hidden), plan.teacher.hidden)
    return model


def _zero_inputs(module: nn.Module, kept: set[int]) -> None:
    mask = torch.tensor([float(index in kept) for index in range(module.in_features)])
    module.register_forward_pre_hook(lambda _, args: (args[0] * mask,))


def _zero_hidden(core: Any, kept: set[int], hidden: int) -> None:
    """Zeros in the residual stream's dropped channels; norms corrected, as a mean over fewer channels is larger."""
    share = len(kept) / hidden
    mask = torch.tensor([float(index in kept) for index in range(hidden)])
    core.embed_tokens.weight.mul_(mask)
    for layer in core.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.mul_(mask[:, None])
            if linear.bias is not None:
                linear.bias.mul_(mask)
    for norm in [core.norm, *(n for x in core.layers for n in (x.input_layernorm, x.post_attention_layernorm))]:
        norm.weight.mul_(share**0.5)
        norm.variance_epsilon *= share


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_pruned_model_equals_masked_teacher(directory: Path, sizes: dict[str, int], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    plan = tiny.plan(checkpoint.shape, **sizes)
    pruned = tiny.model(cut_to(checkpoint, plan, tmp_path / "student"))
    tokens = tiny.tokens(2, 12)
    expected = tiny.logits(masked_teacher(directory, plan), tokens)
    torch.testing.assert_close(tiny.logits(pruned, tokens), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, tiny.logits(tiny.model(directory), tokens), atol=1e-2)


def test_identity_plan_returns_the_same_bits_and_config(directory: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    out = cut_to(checkpoint, identity_plan(checkpoint.shape), tmp_path / "student")
    before, after = tiny.tensors(directory), tiny.tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert json.loads((out / "config.json").read_text()) == json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_counted_parameters_of_the_pruned_model_are_the_real_ones(
    directory: Path, sizes: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(directory)
    plan = tiny.plan(checkpoint.shape, **sizes)
    out = cut_to(checkpoint, plan, tmp_path / "student")
    counted = open_checkpoint(out).parameters
    assert counted.total == sum(p.numel() for p in tiny.model(out).parameters())
    assert counted == checkpoint.architecture.count(plan.student, checkpoint.config)


def test_sharded_and_single_file_outputs_hold_the_same_model(directory: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    plan = tiny.plan(checkpoint.shape, **CUTS["everything"])
    single = cut_to(checkpoint, plan, tmp_path / "single")
    sharded = cut_to(checkpoint, plan, tmp_path / "sharded", shard_bytes=20_000)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    tokens = tiny.tokens(1, 9)
    assert torch.equal(tiny.logits(tiny.model(sharded), tokens), tiny.logits(tiny.model(single), tokens))


def test_per_layer_lists_are_cut_with_the_layers(tmp_path: Path) -> None:
    directory = tiny.checkpoint("llama", tmp_path / "teacher")
    config = json.loads((directory / "config.json").read_text())
    config["layer_types"] = ["a", "b", "c", "d"]
    (directory / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(directory)
    plan = tiny.plan(checkpoint.shape, layers=2)
    out = cut_to(checkpoint, plan, tmp_path / "student")
    assert json.loads((out / "config.json").read_text())["layer_types"] == ["abcd"[layer] for layer in plan.layers]


def test_plan_for_another_shape_is_refused(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    other = identity_plan(tiny.plan(checkpoint.shape, ffn=17).student)
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
        plan = tiny.plan(checkpoint.shape, **CUTS["everything"])
        outs.append(cut_to(checkpoint, plan, tmp_path / f"{variant}-student"))
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_MINITRON, *outs],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert loaded.returncode == 0, loaded.stderr
    assert [int(line) for line in loaded.stdout.split()] == [open_checkpoint(out).parameters.total for out in outs]
