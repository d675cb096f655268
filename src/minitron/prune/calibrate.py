"""One streamed pass over the calibration set that collects every sum the importance criteria need.

Sites, where activations are read (P1, "Importance Analysis"):

    attention_in    input of the query projection: the output of the norm before it, in families with one   [hidden]
    attention_out   input of the attention's output projection                                  [heads * head_dim]
    mlp_in          input of the MLP, the output of the norm before it, in families with one                [hidden]
    mlp_out         input of the down projection                                                            [ffn]
    head_in         output of the final norm                                                                [hidden]

A sample is one block. Each sample is first reduced over its real tokens, then samples are summed one by one in
float64, so neither the batch size nor padding matters.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minitron.config import Section
from minitron.device import Precision
from minitron.errors import RunError
from minitron.model.architecture import Architecture
from minitron.model.checkpoint import Checkpoint
from minitron.model.stream import Stream

# Reductions of |activation| over the tokens of a sample, in the order in which `Statistics.sums` holds them.
SEQUENCE_AGGREGATES = ("mean", "l2", "variance")


class CalibrateConfig(Section):
    samples: int = Field(default=1024, ge=1)
    """Calibration blocks, drawn from the training split. The papers use 1024."""
    batch: int = Field(default=8, ge=1)
    """Blocks per forward call; changes speed and memory, not the statistics."""
    precision: Precision = "auto"
    """Number format of the forward pass; sums are float32 or better in any case."""


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration set, all float64.

    sums: site -> [layers, 3, 2, channels] (head_in has one layer). Axis 1 is the reduction v of |a| over a sample's
        tokens (SEQUENCE_AGGREGATES), axis 2 is (sum of v, sum of v squared) over samples. The l2 reduction's sum of
        squares is the column square sum that an importance matrix needs.
    cosine: mean cosine between each layer's input and output [layers].
    second_moment: mean of u u' over tokens and over all reads of the residual stream x, u = x / rms(x) [hidden, hidden].
    mean: mean of u [hidden].
    samples, tokens: how many of each were seen, pads excluded.
    """

    sums: dict[str, Tensor]
    cosine: Tensor
    second_moment: Tensor
    mean: Tensor
    samples: int
    tokens: int

    def save(self, path: Path) -> None:
        tensors = {f"sums.{site}": tensor for site, tensor in self.sums.items()}
        tensors |= {"cosine": self.cosine, "second_moment": self.second_moment, "mean": self.mean}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "statistics.safetensors")
        (path / "statistics.json").write_text(json.dumps({"samples": self.samples, "tokens": self.tokens}))

    @staticmethod
    def load(path: Path) -> "Statistics":
        """Raises: RunError if the directory holds no statistics."""
        try:
            meta = json.loads((path / "statistics.json").read_text())
            tensors = load_file(path / "statistics.safetensors")
        except FileNotFoundError:
            raise RunError(f"{path} holds no statistics; make them with `minitron calibrate`") from None
        sums = {name.removeprefix("sums."): t for name, t in tensors.items() if name.startswith("sums.")}
        return Statistics(
            sums=sums,
            cosine=tensors["cosine"],
            second_moment=tensors["second_moment"],
            mean=tensors["mean"],
            samples=meta["samples"],
            tokens=meta["tokens"],
        )


def calibrate(
    checkpoint: Checkpoint,
    tokens: Int[Tensor, "samples tokens"],
    *,
    dtype: torch.dtype,
    batch: int,
    valid: Bool[Tensor, "samples tokens"] | None = None,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Stream the samples through the model once, one decoder layer in memory at a time.

    Args:
        valid: False for pads, which must be on the right; None when every token is real.
        progress: called with (layers done, layers).

    Paper: P1, "Importance Analysis"; the sums of all its aggregators are collected together.
    """
    valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    layers = checkpoint.shape.layers
    sites = _Sites(valid, layers)
    cosine = torch.zeros(layers, dtype=torch.float64)
    stream = Stream(checkpoint, tokens, dtype=dtype, batch=batch, scratch=scratch)
    stream.embed()
    for index, layer in stream.layers():
        with sites.watch(layer, index, checkpoint.architecture):
            for rows, before, after in stream.run(index, layer):
                sites.collect(rows)
                angle = torch.cosine_similarity(before.float(), after.float(), dim=-1)
                cosine[index] += (angle.double() * valid[rows]).sum()
        progress(index + 1, layers)
    with stream.final_norm() as norm, sites.watch_final(norm):
        for rows in stream.slices:
            norm(stream.states[rows])
            sites.collect(rows)
    num_tokens = int(valid.sum())
    return Statistics(
        sums=sites.sums,
        cosine=cosine / num_tokens,
        second_moment=sites.second_moment / (num_tokens * sites.num_reads),
        mean=sites.mean / (num_tokens * sites.num_reads),
        samples=len(tokens),
        tokens=num_tokens,
    )


class _Sites:
    """Hooks that keep the last batch's activations, and the sums that `collect` adds them to."""

    def __init__(self, valid: Tensor, layers: int):
        self.valid, self.layers = valid, layers
        # Allocated once for all layers: small tensors made layer by layer, and kept, would lie between the large freed
        # ones and keep the allocator from using that memory again.
        self.sums: dict[str, Tensor] = {}
        self.num_reads = 0
        self.second_moment = torch.zeros(0)
        self.mean = torch.zeros(0)
        self._layer = 0
        self._seen: dict[str, Tensor] = {}
        self._stream: list[Tensor] = []

    @contextmanager
    def watch(self, layer: nn.Module, index: int, architecture: Architecture) -> Iterator[None]:
        prefix = architecture.layer + "."
        self._layer = index
        with ExitStack() as stack:
            for name in architecture.stream_reads:
                self._watch(stack, layer.get_submodule(name.removeprefix(prefix)), self._keep_stream)
                self.num_reads += 1
            for site, name in architecture.sites.items():
                self._watch(stack, layer.get_submodule(name.removeprefix(prefix)), partial(self._keep_input, site))
            yield

    @contextmanager
    def watch_final(self, norm: nn.Module) -> Iterator[None]:
        self.layers, self._layer = 1, 0  # head_in is one site, not one per layer
        with ExitStack() as stack:
            self._watch(stack, norm, self._keep_stream)
            self.num_reads += 1
            stack.callback(norm.register_forward_hook(self._keep_final).remove)
            yield

    def collect(self, rows: slice) -> None:
        valid = self.valid[rows]
        for site, activation in self._seen.items():
            for sample, real in zip(activation, valid, strict=True):
                added = sample_sums(sample[real])
                if site not in self.sums:
                    self.sums[site] = torch.zeros(self.layers, *added.shape, dtype=torch.float64)
                self.sums[site][self._layer] += added
        for states in self._stream:
            for sample, real in zip(states, valid, strict=True):
                self._add_moment(sample[real].float())
        self._seen, self._stream = {}, []

    def _add_moment(self, states: Float[Tensor, "tokens hidden"]) -> None:
        unit = states * states.square().mean(-1, keepdim=True).rsqrt()
        if self.mean.numel() == 0:
            hidden = states.shape[-1]
            self.second_moment = torch.zeros(hidden, hidden, dtype=torch.float64)
            self.mean = torch.zeros(hidden, dtype=torch.float64)
        self.second_moment += unit.T @ unit
        self.mean += unit.sum(0)

    def _watch(self, stack: ExitStack, module: nn.Module, keep: Callable[..., None]) -> None:
        stack.callback(module.register_forward_pre_hook(keep).remove)

    def _keep_input(self, site: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen[site] = args[0]

    def _keep_stream(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._stream.append(args[0])

    def _keep_final(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._seen["head_in"] = output


def sample_sums(activation: Float[Tensor, "tokens channels"]) -> Float[Tensor, "3 2 channels"]:
    """One sample's contribution to `Statistics.sums`: (v, v squared) for each reduction v of |a| over its tokens."""
    absolute = activation.float().abs()
    mean = absolute.sum(0).double() / len(absolute)
    squares = absolute.square().sum(0).double()
    reductions = torch.stack([mean, squares.sqrt(), squares / len(absolute) - mean.square()])
    return torch.stack([reductions, reductions.square()], dim=1)
