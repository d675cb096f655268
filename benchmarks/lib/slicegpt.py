"""SliceGPT (Ashkboos et al. 2024) for Llama models, written from the paper: a peer, held in memory.

Every block of the model gets its own orthogonal basis of the residual stream, the principal components of what its norm
hands on, and keeps the leading directions. Since the bases differ, two matrices a layer turn the stream from one basis
into the next, so no plain checkpoint holds such a model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from minitron.data.corpus import Blocks, batch_rows
from minitron.distillation.schedule import Schedule


class _Layer(LlamaDecoderLayer):
    """A layer whose residual stream changes its basis behind the attention and behind the MLP."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        size = config.hidden_size
        self.after_attention = nn.Parameter(torch.empty(size, size))
        self.after_mlp = nn.Parameter(torch.empty(size, size))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states @ self.after_attention + attended
        return hidden_states @ self.after_mlp + self.mlp(self.post_attention_layernorm(hidden_states))


def size_of_target(config: LlamaConfig, share: float) -> int:
    """The hidden size, a multiple of the heads, that leaves about this share of the layers' parameters."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    rows = 2 * (heads + config.num_key_value_heads) * head_dim + 3 * config.intermediate_size
    sizes = range(heads, hidden + 1, heads)
    return min(sizes, key=lambda size: abs((rows * size + 2 * size * size) / (rows * hidden) - share))


@torch.no_grad()
def sliced(model: LlamaForCausalLM, tokens: Tensor, size: int) -> tuple[LlamaForCausalLM, int]:
    """Slice a model to that hidden size; returns it in float32, and the parameters that are no embedding.

    Args:
        tokens: calibration blocks [blocks, tokens].
    """
    config = model.config
    bases = [basis[:, :size].float() for basis in _bases(model, tokens)]
    changed = LlamaConfig(
        **{**config.to_dict(), "hidden_size": size, "head_dim": model.model.layers[0].self_attn.head_dim}
    )
    changed.tie_word_embeddings = False
    made = LlamaForCausalLM(changed).float()
    made.model.layers = nn.ModuleList(_Layer(changed, number) for number in range(changed.num_hidden_layers))
    # The norm of a sliced vector is taken over the size that it had.
    gain = torch.full((size,), (config.hidden_size / size) ** 0.5)
    made.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.float() @ bases[0])
    for number, (own, layer) in enumerate(zip(made.model.layers, model.model.layers, strict=True)):
        before, between, after = bases[2 * number : 2 * number + 3]
        for name in ("q_proj", "k_proj", "v_proj"):
            _read(getattr(own.self_attn, name), getattr(layer.self_attn, name), layer.input_layernorm, before)
        own.self_attn.o_proj.weight.copy_(between.T @ layer.self_attn.o_proj.weight.float())
        for name in ("gate_proj", "up_proj"):
            _read(getattr(own.mlp, name), getattr(layer.mlp, name), layer.post_attention_layernorm, between)
        own.mlp.down_proj.weight.copy_(after.T @ layer.mlp.down_proj.weight.float())
        own.input_layernorm.weight.copy_(gain)
        own.post_attention_layernorm.weight.copy_(gain)
        own.after_attention.copy_(before.T @ between)
        own.after_mlp.copy_(between.T @ after)
    _read(made.lm_head, model.lm_head, model.model.norm, bases[-1])
    made.model.norm.weight.copy_(gain)
    return made, sum(weight.numel() for weight in made.model.layers.parameters())


def train(student: LlamaForCausalLM, teacher: LlamaForCausalLM, blocks: Blocks, schedule: Schedule) -> None:
    """Distil on logits with AdamW, by the same schedule and on the same batches as every other student."""
    config = schedule.config
    teacher, student = teacher.to(torch.bfloat16), student.float()
    optimizer = torch.optim.AdamW(student.parameters(), betas=config.betas, weight_decay=config.weight_decay)
    for step in range(schedule.steps):
        rows = batch_rows(len(blocks), seed=schedule.seed, step=step, batch=schedule.batch_blocks)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rates.at(step)
        for row in torch.from_numpy(blocks.select(rows)):
            with torch.no_grad():
                wanted = teacher(row[None]).logits[0, :-1].float().log_softmax(-1)
            with torch.autocast("cpu", torch.bfloat16):
                logits = student(row[None]).logits[0, :-1]
            loss = kl_div(logits.float().log_softmax(-1), wanted, reduction="batchmean", log_target=True)
            (loss / len(rows)).backward()
        nn.utils.clip_grad_norm_(student.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()


def _read(own: nn.Linear, of_teacher: nn.Linear, norm: nn.Module, basis: Tensor) -> None:
    own.weight.copy_((of_teacher.weight.float() * norm.weight.float()) @ basis)


def _bases(model: LlamaForCausalLM, tokens: Tensor) -> list[Tensor]:
    """The principal components of each norm's outputs, without its gain: two for each layer, and the last norm's."""
    layers = model.model.layers
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(model.model.norm)
    size = model.config.hidden_size
    sums = [torch.zeros(size, size, dtype=torch.float64) for _ in norms]

    def note(number: int, states: Tensor) -> None:
        flat = states.flatten(0, 1).float()
        unit = flat * flat.square().mean(-1, keepdim=True).rsqrt()
        sums[number] += (unit.T @ unit).double()

    hooks = [
        norm.register_forward_pre_hook(lambda _, args, number=number: note(number, args[0]))
        for number, norm in enumerate(norms)
    ]
    for row in tokens:
        model(row[None].long(), logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return [torch.linalg.eigh(of_norm).eigenvectors.flip(1) for of_norm in sums]
