"""One streamed pass over the calibration set that collects every sum the importance criteria need.

Sites, where activations are read (P1, "Importance Analysis"):

    attention_in    input of the query projection: the output of the norm before it, in families with one   [hidden]
    attention_out   input of the attention's output projection                                  [heads * head_dim]
    mlp_in          input of the MLP, the output of the norm before it, in families with one                [hidden]
    mlp_out         input of the down projection                                                            [ffn]
    head_in         output of the final norm                                                                [hidden]

A sample is one block. Each sample is first reduced over its real tokens in float32, then samples are summed in float64,
so neither the batch size nor padding matters, nor how many processes share the samples.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from minitron.calibration import layouts
from minitron.core import parallel
from minitron.core.config import Section
from minitron.core.device import Precision, compute_dtype, pick_device, sums_device
from minitron.core.errors import PlanError, RunError
from minitron.core.typed_files import read_tensors, read_typed
from minitron.model.architecture import LAYER_DIMS, Shape
from minitron.model.checkpoint import Checkpoint
from minitron.model.logits import matmul_precision
from minitron.model.samples import Samples
from minitron.model.stream import Pass, Stream

# Reductions of |activation| over the tokens of a sample, in the order in which `Statistics.sums` holds them.
SEQUENCE_AGGREGATES = ("mean", "l2", "variance")
# States are copied to float32 in pieces: a CPU's cache holds so many bytes, and elsewhere each piece costs a call.
PIECE_BYTES, PIECE_BYTES_ON_DEVICE = 1 << 20, 64 << 20
SMALLEST_NORMS = 1e-16  # a product of two norms: the cosine with a state of zeros, such as an unused token's, is 0
MOMENT_STRIPS = 8
COLLECT = "collect them again with `minitron calibrate`"


class CalibrateConfig(Section):
    samples: int = Field(default=1024, ge=1)
    """Calibration blocks, drawn from the training split. The papers use 1024."""
    batch: int | None = Field(default=None, ge=1)
    """Blocks per forward call; changes speed and memory, not the statistics. Default: as many as keep the widest
    activations within 256 MiB, at most 8."""
    precision: Precision = "auto"
    """Number format of the forward pass; sums are float32 or better in any case."""
    second_moment: bool = False
    """Also average the products of all pairs of residual channels: a hidden x hidden matrix, for about a tenth more
    time."""

    def as_pass(
        self, scratch: Path | None = None, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Pass:
        """How every streamed pass over the calibration samples runs."""
        device = pick_device()
        return Pass(compute_dtype(self.precision, device), self.batch, device, scratch, progress)


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration set, all float64.

    sums: site -> [layers, 3, 2, channels] (head_in has one layer). Axis 1 is the reduction v of |a| over a sample's
        tokens (SEQUENCE_AGGREGATES), axis 2 is (sum of v, sum of v squared) over samples. The l2 reduction's sum of
        squares is the column square sum that an importance matrix needs.
    cosine: mean cosine between each layer's input and output [layers].
    second_moment: mean of u u' over tokens and over all reads of the residual stream x, u = x / rms(x), or None where
        it was not asked for [hidden, hidden]. Each read takes every second token, those before attention and the final
        norm the first of a sample and so on, those before the MLP the others.
    mean: mean of u, or None likewise [hidden].
    samples, tokens: how many of each were seen, pads excluded.
    weight_squares: dim -> sum of the squares of the weights in the layers' matrices that belong to each of its units;
        of ffn, heads and kv_heads [layers, units], of hidden [hidden], of layers [layers]. A weight belongs to the
        units of both its axes. Empty in files of a version that did not collect them.
    model: `Checkpoint.fingerprint` of the model that they are of.
    """

    sums: dict[str, Tensor]
    cosine: Tensor
    second_moment: Tensor | None
    mean: Tensor | None
    samples: int
    tokens: int
    weight_squares: dict[str, Tensor] = field(default_factory=dict)
    model: str = ""

    def save(self, path: Path) -> None:
        save_file({name: t.contiguous() for name, t in self._tensors().items()}, path / "statistics.safetensors")
        facts = {"samples": self.samples, "tokens": self.tokens, "model": self.model}
        (path / "statistics.json").write_text(json.dumps(facts))

    def _tensors(self) -> dict[str, Tensor]:
        """By their names in a file."""
        named = {"cosine": self.cosine, "second_moment": self.second_moment, "mean": self.mean}
        named |= {f"sums.{site}": tensor for site, tensor in self.sums.items()}
        named |= {f"weight_squares.{dim}": tensor for dim, tensor in self.weight_squares.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def column_squares(self) -> dict[str, Float[Tensor, "layers channels"]]:
        """Site -> sum over all tokens of each channel's square."""
        return {site: sums[:, SEQUENCE_AGGREGATES.index("l2"), 1] for site, sums in self.sums.items()}

    def covariance(self) -> Float[Tensor, "hidden hidden"]:
        """Of the normalised residual stream.

        Raises: PlanError if the statistics were collected without its second moment.
        """
        require_second_moment(self)
        assert self.second_moment is not None and self.mean is not None
        return self.second_moment - self.mean.outer(self.mean)

    @staticmethod
    def load(path: Path) -> "Statistics":
        """Raises: RunError if the directory holds no statistics, or damaged ones."""
        facts, file = path / "statistics.json", path / "statistics.safetensors"
        if not facts.exists() or not file.exists():
            raise RunError(
                f"{path} holds no statistics; make them with `minitron calibrate` "
                f"(there is no {(file if facts.exists() else facts).name})"
            )
        meta = read_typed(facts, layouts.STATISTICS, RunError, way_out=COLLECT)
        tensors = read_tensors(file, RunError)
        if "cosine" not in tensors:
            raise RunError(f"{file} has no tensor cosine: it is damaged, or holds something else; {COLLECT}")

        def group(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        return Statistics(
            sums=group("sums."),
            weight_squares=group("weight_squares."),
            cosine=tensors["cosine"],
            second_moment=tensors.get("second_moment"),
            mean=tensors.get("mean"),
            samples=meta.samples,
            tokens=meta.tokens,
            model=meta.model,
        )

    @staticmethod
    def load_of_shape(checkpoint: Checkpoint, path: Path) -> "Statistics":
        """The statistics in a directory, which must be of a model of this shape.

        Raises: RunError if there are none, or they are damaged or of another shape.
        """
        statistics = Statistics.load(path)
        _require_of_shape(statistics._tensors(), checkpoint, path / "statistics.safetensors")
        return statistics

    @staticmethod
    def load_for(checkpoint: Checkpoint, path: Path) -> "Statistics":
        """The statistics in a directory that must have been collected from this model.

        Raises: RunError if there are none, or another model's.
        """
        statistics = Statistics.load(path)
        if statistics.model != checkpoint.fingerprint():
            raise RunError(
                f"the statistics in {path} were not collected from the model in {checkpoint.path}: "
                "collect them again with `minitron calibrate`, or give the model that they are of"
            )
        _require_of_shape(statistics._tensors(), checkpoint, path / "statistics.safetensors")
        return statistics


def _require_of_shape(tensors: dict[str, Tensor], checkpoint: Checkpoint, file: Path) -> None:
    """Raises: RunError for a tensor that is missing, of another size or type, or not finite."""
    shape = checkpoint.shape
    wanted: dict[str, tuple[int, ...]] = {"cosine": (shape.layers,)}
    wanted |= {f"sums.{site}": (layers, 3, 2, width) for site, (layers, width) in site_sizes(checkpoint).items()}
    optional: dict[str, tuple[int, ...]] = {"second_moment": (shape.hidden, shape.hidden), "mean": (shape.hidden,)}
    optional |= {f"weight_squares.{dim}": sizes for dim, sizes in weight_sizes(shape).items()}
    for name, sizes in (wanted | {name: sizes for name, sizes in optional.items() if name in tensors}).items():
        if name not in tensors:
            raise RunError(f"{file} has no tensor {name}: it is damaged, or of another model; {COLLECT}")
        found = tensors[name]
        if (found.dtype, tuple(found.shape)) != (torch.float64, sizes):
            raise RunError(
                f"{file}: {name} is {str(found.dtype).removeprefix('torch.')} {list(found.shape)}, and of the model in "
                f"{checkpoint.path} it is float64 {list(sizes)}: it is damaged, or of another model; {COLLECT}"
            )
        if not found.isfinite().all():
            raise RunError(f"{file}: {name} holds numbers that are not finite; {COLLECT}")
    if ("mean" in tensors) != ("second_moment" in tensors):
        raise RunError(f"{file} has only one of second_moment and mean: it is damaged; {COLLECT}")


def site_sizes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Site -> layers that have it, and its channels."""
    shape, architecture = checkpoint.shape, checkpoint.architecture
    widths = {spec.name: spec.shape(shape)[-1] for spec in checkpoint.specs()}
    sites = {
        site: (shape.layers, widths[f"{module.format(layer=0)}.weight"]) for site, module in architecture.sites.items()
    }
    return {**sites, "head_in": (1, shape.hidden)}


def weight_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Dim -> the sizes of its `weight_squares`."""
    per_layer = {dim: (shape.layers, getattr(shape, dim)) for dim in LAYER_DIMS}
    return {"layers": (shape.layers,), "hidden": (shape.hidden,), **per_layer}


def require_second_moment(statistics: Statistics) -> None:
    """Raises: PlanError if the statistics were collected without it."""
    if statistics.second_moment is None:
        raise PlanError(
            "the statistics hold no second moment of the residual stream, which repair step basis needs; "
            "collect it with `minitron calibrate --second-moment` (calibrate.second_moment)"
        )


def calibrate(
    checkpoint: Checkpoint,
    samples: Samples,
    pass_: Pass,
    *,
    second_moment: bool = False,
    valid: Bool[Tensor, "samples tokens"] | None = None,
) -> Statistics:
    """Stream the samples through the model once, one decoder layer at work at a time.

    In a `parallel.process_group` each process takes a share of the samples, and all return the statistics of all.

    Args:
        second_moment: also average the products of all pairs of residual channels.
        valid: False for pads, which must be on the right; None when every token is real.

    Paper: P1, "Importance Analysis"; the sums of all its aggregators are collected together.
    """
    lengths = [samples.block_tokens] * len(samples) if valid is None else valid.sum(1).tolist()
    mine = parallel.joined().share(len(samples), pass_.batch_of(checkpoint.shape, samples))
    stream = Stream(checkpoint, samples[mine], pass_)
    collector = _Collector(stream, lengths[mine], second_moment)
    stream.embed()
    for index, layer in stream.layers():
        collector.add_weights(layer, index)
        with collector.watch(layer, index):
            for _, before, after in stream.run(index, layer):
                collector.add_cosines(index, before, after)
        parallel.require_all_well()
        pass_.progress(index + 1, checkpoint.shape.layers)
    with stream.final_norm() as norm, collector.watch_final(norm):
        for _, states in stream.batches():
            norm(states)
    return collector.statistics(len(samples), sum(lengths))


class _Collector:
    """Sums over what flows through a watched module, reduced sample by sample and not kept."""

    def __init__(self, stream: Stream, lengths: list[int], second_moment: bool):
        """
        Args:
            lengths: real tokens of each sample.
        """
        self.stream, self.lengths = stream, lengths
        self.shape, self.architecture = stream.checkpoint.shape, stream.checkpoint.architecture
        zeros = partial(torch.zeros, dtype=torch.float64, device=sums_device(stream.device))
        # All at once: made layer by layer, they would lie between the large freed blocks and keep the allocator from
        # using that memory again.
        sites = site_sizes(stream.checkpoint)
        self.sums = {site: zeros(layers, 3, 2, width) for site, (layers, width) in sites.items()}
        self.cosine = zeros(self.shape.layers)
        self.weight_squares = {dim: zeros(*sizes) for dim, sizes in weight_sizes(self.shape).items()}
        self.moment = _Moment(self.shape.hidden, stream.device) if second_moment else None

    @contextmanager
    def watch(self, layer: nn.Module, index: int) -> Iterator[None]:
        prefix = self.architecture.layer + "."
        with ExitStack() as stack:
            for number, name in enumerate(self.architecture.stream_reads):
                self._watch_read(stack, layer.get_submodule(name.removeprefix(prefix)), number)
            for site, name in self.architecture.sites.items():
                module, add = layer.get_submodule(name.removeprefix(prefix)), partial(self._add_site, site, index)
                stack.callback(module.register_forward_pre_hook(lambda _, args, add=add: add(args[0])).remove)
            yield

    @contextmanager
    def watch_final(self, norm: nn.Module) -> Iterator[None]:
        add = partial(self._add_site, "head_in", 0)
        with ExitStack() as stack:
            self._watch_read(stack, norm, 0)
            stack.callback(norm.register_forward_hook(lambda _, args, output: add(output)).remove)
            yield

    def add_weights(self, layer: nn.Module, index: int) -> None:
        """The squares of a layer's matrices, each added to the units of both its axes."""
        prefix = self.architecture.layer.format(layer=index) + "."
        for spec in self.stream.checkpoint.specs():
            if spec.layer != index or len(spec.axes) != 2:
                continue
            of_axes = squares(layer.get_parameter(spec.name.removeprefix(prefix)))
            self.weight_squares["layers"][index] += of_axes[0].sum().to(self.cosine)
            for axis, of_axis in zip(spec.axes, of_axes, strict=True):
                for segment, part in zip(axis, of_axis.split([s.size(self.shape) for s in axis]), strict=True):
                    sums = self.weight_squares[segment.unit]
                    own = sums if segment.unit == "hidden" else sums[index]
                    own += part.to(own).unflatten(0, (len(own), -1)).sum(1)

    def add_cosines(self, index: int, before: Tensor, after: Tensor) -> None:
        for one, other in zip(self._real(before), self._real(after), strict=True):
            self.cosine[index] += cosine_sum(one, other).to(self.cosine)

    def statistics(self, num_samples: int, num_tokens: int) -> Statistics:
        """The sums of all processes, as means where they are; `num_samples` and `num_tokens` are those of all, too."""
        for tensor in (*self.sums.values(), self.cosine):
            parallel.all_reduce_sum(tensor)
        second_moment, mean = self.moment.means() if self.moment else (None, None)
        return Statistics(
            sums={site: tensor.cpu() for site, tensor in self.sums.items()},
            cosine=self.cosine.cpu() / num_tokens,
            second_moment=second_moment,
            mean=mean,
            samples=num_samples,
            tokens=num_tokens,
            model=self.stream.checkpoint.fingerprint(),
            weight_squares={dim: tensor.cpu() for dim, tensor in self.weight_squares.items()},
        )

    def _real(self, states: Float[Tensor, "samples tokens channels"]) -> Iterator[Float[Tensor, "_ channels"]]:
        """The real tokens of each sample that is on its way through the model."""
        for sample, length in zip(states, self.lengths[self.stream.rows], strict=True):
            yield sample[:length]

    def _watch_read(self, stack: ExitStack, module: nn.Module, number: int) -> None:
        if self.moment:
            stack.callback(module.register_forward_pre_hook(lambda _, args: self._add_read(args[0], number)).remove)

    def _add_site(self, site: str, index: int, activation: Tensor) -> None:
        for sample in self._real(activation):
            self.sums[site][index] += sample_sums(sample)

    def _add_read(self, states: Tensor, number: int) -> None:
        assert self.moment
        # Tokens differ far more than the two reads of a layer do: half of them for each is as good, in half the time.
        self.moment.add(sample[number % 2 :: 2] for sample in self._real(states))


class _Moment:
    """Sums of n n' and of n over tokens, n = x / |x|."""

    def __init__(self, hidden: int, device: torch.device):
        zeros = partial(torch.zeros, dtype=torch.float64, device=sums_device(device))
        self.products, self.total, self.count = zeros(hidden, hidden), zeros(hidden), zeros(())
        self._of_batch, self._unit = torch.empty(hidden, hidden, device=device), torch.empty(0, hidden, device=device)
        # The products are symmetric: only those from each strip's diagonal block on are summed.
        size = -(-hidden // MOMENT_STRIPS)
        self._strips = [(slice(start, start + size), slice(start, None)) for start in range(0, hidden, size)]

    def add(self, samples: Iterator[Float[Tensor, "_ hidden"]]) -> None:
        """Add a batch: sums are float32 in it, and products of values that are rounded as the model rounds its own."""
        for number, sample in enumerate(samples):
            unit = self._normalized(sample)
            with matmul_precision(sample.dtype):
                for rows, columns in self._strips:
                    self._of_batch[rows, columns].addmm_(unit[:, rows].T, unit[:, columns], beta=min(number, 1))
            self.total += unit.sum(0).to(self.total)
            self.count += len(unit)
        for strip in self._strips:
            self.products[strip] += self._of_batch[strip].to(self.products.device)

    def _normalized(self, states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """In float32, in the same memory again and again: fresh pages cost more than the arithmetic."""
        if len(self._unit) < len(states):
            self._unit = states.new_empty(states.shape, dtype=torch.float32)
        unit = self._unit[: len(states)].copy_(states)
        norms = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        return unit.div_(norms.clamp_min_(SMALLEST_NORMS))

    def means(self) -> tuple[Tensor, Tensor]:
        """Over all processes, of u u' and u."""
        hidden = len(self.total)
        for tensor in (self.products, self.total, self.count):
            parallel.all_reduce_sum(tensor)
        count = self.count.cpu()
        upper = self.products.cpu().triu() * (hidden / count)
        return upper + upper.triu(1).T, self.total.cpu() * (hidden**0.5 / count)


def sample_sums(activation: Float[Tensor, "tokens channels"]) -> Float[Tensor, "3 2 channels"]:
    """One sample's contribution to `Statistics.sums`: (v, v squared) for each reduction v of |a| over its tokens."""
    moments = torch.stack(mean_and_variance(activation.abs()))
    mean, variance = moments.to(sums_device(activation.device)).double()
    reductions = torch.stack([mean, ((variance + mean.square()) * len(activation)).sqrt(), variance])
    return torch.stack([reductions, reductions.square()], dim=1)


def mean_and_variance(
    values: Float[Tensor, "tokens channels"],
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Over the tokens, summed in float32."""
    if values.device.type != "cpu":
        variance, mean = torch.var_mean(values.float(), dim=0, correction=0)
        return mean, variance
    # What a batch norm begins with. It sums bfloat16 in float32 without the copy that would take most of the time here,
    # provided that the running statistics, which are of no use, are float32.
    running = values.new_zeros(2, values.shape[1], dtype=torch.float32)
    return torch.batch_norm_update_stats(values, running[0], running[1], 1.0)


def cosine_sum(one: Float[Tensor, "tokens channels"], other: Float[Tensor, "tokens channels"]) -> Float[Tensor, ""]:
    """Sum over the tokens of the cosine between the two, in float32."""
    size = PIECE_BYTES if one.device.type == "cpu" else PIECE_BYTES_ON_DEVICE
    rows = max(1, size // (4 * one.shape[1]))
    buffers = one.new_empty(2, min(rows, len(one)), one.shape[1], dtype=torch.float32)
    total = buffers.new_zeros(())
    for pieces in zip(one.split(rows), other.split(rows), strict=True):
        x, y = (buffer[: len(piece)].copy_(piece) for buffer, piece in zip(buffers, pieces, strict=True))
        norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
        total += (torch.linalg.vecdot(x, y) / norms.clamp_min(SMALLEST_NORMS)).sum()
    return total


def squares(matrix: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Sums of the squares along each axis: of every row, and of every column; in float32."""
    size = PIECE_BYTES if matrix.device.type == "cpu" else PIECE_BYTES_ON_DEVICE
    num_rows = max(1, size // (4 * matrix.shape[1]))
    buffer = matrix.new_empty(min(num_rows, len(matrix)), matrix.shape[1], dtype=torch.float32)
    of_rows, of_columns = [], buffer.new_zeros(matrix.shape[1])
    for piece in matrix.split(num_rows):
        x = buffer[: len(piece)].copy_(piece).square_()
        of_rows.append(x.sum(1))
        of_columns += x.sum(0)
    return torch.cat(of_rows), of_columns
