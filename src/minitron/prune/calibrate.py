"""One streamed pass over the calibration set that collects every sum the importance criteria need.

Sites, where activations are read (P1, "Importance Analysis"):

    attention_in    output of the norm before attention     [hidden]
    attention_out   input of the output projection          [heads * head_dim]
    mlp_in          output of the norm before the MLP       [hidden]
    mlp_out         input of the down projection            [ffn]
    head_in         output of the final norm                [hidden]

A sample is one block. Each sample is first reduced over its real tokens, then samples are summed one by one in
float64, so neither the batch size nor padding matters.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    second_moment: mean of u u' over tokens and over all norm inputs, u = x / rms(x) [hidden, hidden].
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
        second_moment=sites.second_moment / (num_tokens * sites.num_norms),
        mean=sites.mean / (num_tokens * sites.num_norms),
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
        self.num_norms = 0
        self.second_moment = torch.zeros(0)
        self.mean = torch.zeros(0)
        self._layer = 0
        self._seen: dict[str, Tensor] = {}
        self._norm_inputs: list[Tensor] = []

    @contextmanager
    def watch(self, layer: nn.Module, index: int, architecture: Architecture) -> Iterator[None]:
        norms, projections = _layer_sites(architecture)
        self._layer = index
        with ExitStack() as stack:
            for site, name in norms.items():
                self._watch_norm(stack, site, layer.get_submodule(name))
            for site, name in projections.items():
                hook = layer.get_submodule(name).register_forward_pre_hook(self._keep_input(site))
                stack.callback(hook.remove)
            yield

    @contextmanager
    def watch_final(self, norm: nn.Module) -> Iterator[None]:
        self.layers, self._layer = 1, 0  # head_in is one site, not one per layer
        with ExitStack() as stack:
            self._watch_norm(stack, "head_in", norm)
            yield

    def collect(self, rows: slice) -> None:
        valid = self.valid[rows]
        for site, activation in self._seen.items():
            for sample, real in zip(activation, valid, strict=True):
                added = sample_sums(sample[real])
                if site not in self.sums:
                    self.sums[site] = torch.zeros(self.layers, *added.shape, dtype=torch.float64)
                self.sums[site][self._layer] += added
        for states in self._norm_inputs:
            for sample, real in zip(states, valid, strict=True):
                self._add_moment(sample[real].float())
        self._seen, self._norm_inputs = {}, []

    def _add_moment(self, states: Float[Tensor, "tokens hidden"]) -> None:
        unit = states * states.square().mean(-1, keepdim=True).rsqrt()
        if self.mean.numel() == 0:
            hidden = states.shape[-1]
            self.second_moment = torch.zeros(hidden, hidden, dtype=torch.float64)
            self.mean = torch.zeros(hidden, dtype=torch.float64)
        self.second_moment += unit.T @ unit
        self.mean += unit.sum(0)

    def _watch_norm(self, stack: ExitStack, site: str, norm: nn.Module) -> None:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._norm_inputs.append(args[0])
            self._seen[site] = output

        stack.callback(norm.register_forward_hook(keep).remove)
        self.num_norms += 1

    def _keep_input(self, site: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._seen[site] = args[0]

        return keep


def sample_sums(activation: Float[Tensor, "tokens channels"]) -> Float[Tensor, "3 2 channels"]:
    """One sample's contribution to `Statistics.sums`: (v, v squared) for each reduction v of |a| over its tokens."""
    absolute = activation.float().abs()
    mean = absolute.sum(0).double() / len(absolute)
    squares = absolute.square().sum(0).double()
    reductions = torch.stack([mean, squares.sqrt(), squares / len(absolute) - mean.square()])
    return torch.stack([reductions, reductions.square()], dim=1)


def _layer_sites(architecture: Architecture) -> tuple[dict[str, str], dict[str, str]]:
    """Names inside a layer of the norms and of the projections that are watched, by site."""
    prefix = architecture.layer + "."
    norms = [name.removeprefix(prefix) for name in architecture.norms if name.startswith(prefix)]
    projections = {}
    for name, line in architecture.tensors.items():
        reads = line.split()[1] if not line.startswith("vocab") and len(line.split()) > 1 else ""
        for site, axis in (("attention_out", "heads*head_dim"), ("mlp_out", "ffn")):
            if reads == axis:
                projections[site] = name.removeprefix(prefix).removesuffix(".weight")
    return dict(zip(("attention_in", "mlp_in"), norms, strict=True)), projections
