"""One streamed pass over the calibration samples, which collects every sum that importance criteria need.

Activations are read at these sites (P1, "Importance Analysis"):

    attention_in    input of the query projection: the output of the norm before it, if there is one        [hidden]
    attention_out   input of the attention's output projection                                  [heads * head_dim]
    mlp_in          input of the MLP: the output of the norm before it, if there is one                     [hidden]
    mlp_out         input of the down projection                                                            [ffn]
    head_in         output of the final norm                                                                [hidden]

A sample is one block. Each sample is first reduced over its real tokens in float32, then samples are summed in float64.
So the batch size, padding, and the number of processes that share the samples do not matter.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minitron.calibration.statistics import Statistics, site_sizes, weight_sizes, written_sizes
from minitron.core import parallel
from minitron.core.device import sums_device
from minitron.core.numerics import add_gram
from minitron.model.checkpoint import Checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass, Stream

# States are copied to float32 in pieces: of as many bytes as a CPU's cache holds, or larger where each piece is a call.
PIECE_BYTES, PIECE_BYTES_ON_DEVICE = 4 << 20, 64 << 20
SMALLEST_NORMS = 1e-16  # least product of two norms: the cosine with a state of zeros, such as an unused token's, is 0


def measure_statistics(
    checkpoint: Checkpoint,
    samples: Samples,
    pass_: Pass,
    *,
    second_moment: bool = False,
    valid: Bool[Tensor, "samples tokens"] | None = None,
) -> Statistics:
    """Stream the samples through the model once, one decoder layer at a time, and collect statistics.

    In a `parallel.process_group` each process takes a share of the samples, and all return the same statistics.

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
        with collector.watch(layer, index), _Writes(stream, layer, collector.written, index) as writes:
            for _, before, after in stream.run(index, layer):
                collector.add_cosines(index, before, after)
                writes.add(before, after, lengths[mine][stream.rows])
        parallel.require_all_well()
        pass_.progress(index + 1, checkpoint.shape.layers)
    with stream.final_norm() as norm, collector.watch_final(norm):
        for _, states in stream.batches():
            norm(states)
    return collector.statistics(len(samples), sum(lengths))


class _Collector:
    """Hooks that reduce the activations of each sample over its `lengths` real tokens, and sums of the results."""

    def __init__(self, stream: Stream, lengths: list[int], second_moment: bool):
        self.stream, self.lengths = stream, lengths
        self.shape, self.architecture = stream.checkpoint.shape, stream.checkpoint.architecture
        zeros = partial(torch.zeros, dtype=torch.float64, device=sums_device(stream.device))
        # All are allocated at once: between the large blocks of the layers they would keep the allocator from using
        # freed memory again.
        sites = site_sizes(stream.checkpoint)
        self.sums = {site: zeros(layers, 3, 2, width) for site, (layers, width) in sites.items()}
        self.cosine = zeros(self.shape.layers)
        self.weight_squares = {dim: zeros(*sizes) for dim, sizes in weight_sizes(self.shape).items()}
        self.written = {dim: zeros(*sizes) for dim, sizes in written_sizes(self.shape).items()}
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
        """Add the squared weights of a layer's matrices to the units of both axes."""
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
        """The statistics of all processes; `num_samples` and `num_tokens` are the numbers of all processes too."""
        for tensor in (*self.sums.values(), self.cosine, *self.written.values()):
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
            written={dim: tensor.cpu() / num_tokens for dim, tensor in self.written.items()},
        )

    def _real(self, states: Float[Tensor, "samples tokens channels"]) -> Iterator[Float[Tensor, "_ channels"]]:
        """The real tokens of each sample in the current batch."""
        for sample, length in zip(states, self.lengths[self.stream.rows], strict=True):
            yield sample[:length]

    def _watch_read(self, stack: ExitStack, module: nn.Module, number: int) -> None:
        if self.moment:
            stack.callback(module.register_forward_pre_hook(lambda _, args: self._add_read(args[0], number)).remove)

    def _add_site(self, site: str, index: int, activation: Tensor) -> None:
        for sums in sample_sums(list(self._real(activation.abs()))):
            self.sums[site][index] += sums

    def _add_read(self, states: Tensor, number: int) -> None:
        assert self.moment
        # Tokens differ far more than the two inputs of a layer: half of them for each is as good, in half the time.
        self.moment.add(sample[number % 2 :: 2] for sample in self._real(states))


class _Writes:
    """Adds what the units of a layer write to the residual stream to `Statistics.written`, not yet divided by tokens.

    What a unit writes is its share of the output of its matrix. Where a norm or a factor stands between that matrix and
    the stream, it counts as much smaller or larger as the output gets on the way.
    """

    def __init__(self, stream: Stream, layer: nn.Module, sums: dict[str, Tensor], index: int):
        architecture, shape = stream.checkpoint.architecture, stream.checkpoint.shape
        self.sums, self.index, self.heads = sums, index, shape.heads
        writers, prefix = [architecture.sites[site] for site in ("attention_out", "mlp_out")], architecture.layer + "."
        self.writers = [layer.get_submodule(name.removeprefix(prefix)) for name in writers]
        self.second_read = layer.get_submodule(architecture.stream_reads[1].removeprefix(prefix))
        heads_matrix, ffn_matrix = (writer.get_parameter("weight").float() for writer in self.writers)
        of_heads = heads_matrix.unflatten(1, (self.heads, -1)).transpose(0, 1)
        self.grams = of_heads.mT @ of_heads  # [heads, head_dim, head_dim]
        self.column_squares = squares(ffn_matrix)[1]
        self.seen: list[tuple[Tensor, Tensor]] = []  # inputs and outputs of attention's writer, then of the MLP's
        self.middle = torch.empty(0)

    def __enter__(self) -> "_Writes":
        self.stack = ExitStack()
        for writer in self.writers:
            self.stack.callback(writer.register_forward_hook(self._see).remove)
        self.stack.callback(self.second_read.register_forward_pre_hook(self._see_middle).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _see(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen.append((args[0], output))

    def _see_middle(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.middle = args[0]

    def add(self, before: Tensor, after: Tensor, lengths: list[int]) -> None:
        """Add a batch.

        Args:
            before, after: the stream before and after the layer [samples, tokens, hidden].
            lengths: the number of real tokens of each sample.
        """
        of_heads, of_ffn = self.seen
        for sample, length in enumerate(lengths):
            states = [tensor[sample, :length].float() for tensor in (before, self.middle, after)]
            inputs = [tensor[sample, :length].float() for tensor, _ in (of_heads, of_ffn)]
            outputs = [tensor[sample, :length].float() for _, tensor in (of_heads, of_ffn)]
            added = [states[1] - states[0], states[2] - states[1]]
            weights = [
                _ratio(_square(adds), _square(made) * _square(then))
                for adds, made, then in zip(added, outputs, states[1:], strict=True)
            ]
            per_head = (inputs[0] * weights[0].sqrt()[:, None]).unflatten(1, (self.heads, -1)).transpose(0, 1)
            found = {
                "layers": _ratio(_square(states[2] - states[0]), _square(states[2])).sum(),
                "heads": (per_head.mT @ per_head * self.grams).sum((1, 2)),
                "ffn": weights[1] @ inputs[1].square_() * self.column_squares,
            }
            for dim, sums in found.items():
                self.sums[dim][self.index] += sums.to(self.sums[dim])
        self.seen.clear()


def _square(states: Float[Tensor, "tokens channels"]) -> Float[Tensor, " tokens"]:
    return states.square().sum(-1)


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    return one / other.clamp_min(torch.finfo(one.dtype).tiny)


class _Moment:
    """Sums of n n' and of n over tokens, n = x / |x|."""

    def __init__(self, hidden: int, device: torch.device):
        zeros = partial(torch.zeros, dtype=torch.float64, device=sums_device(device))
        self.products, self.total, self.count = zeros(hidden, hidden), zeros(hidden), zeros(())
        self._of_batch, self._unit = torch.empty(hidden, hidden, device=device), torch.empty(0, hidden, device=device)

    def add(self, samples: Iterator[Float[Tensor, "_ hidden"]]) -> None:
        """Add a batch, within which sums are float32 and inputs of products are rounded as in the model."""
        self._of_batch.zero_()
        for sample in samples:
            unit = self._normalized(sample)
            add_gram(self._of_batch, unit, sample.dtype)
            self.total += unit.sum(0).to(self.total)
            self.count += len(unit)
        self.products += self._of_batch.to(self.products.device)

    def _normalized(self, states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """The states divided by their norms, in float32, always in the same memory: fresh pages cost more than sums."""
        if len(self._unit) < len(states):
            self._unit = states.new_empty(states.shape, dtype=torch.float32)
        unit = self._unit[: len(states)].copy_(states)
        norms = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        return unit.div_(norms.clamp_min_(SMALLEST_NORMS))

    def means(self) -> tuple[Tensor, Tensor]:
        """The means of u u' and of u over all processes."""
        hidden = len(self.total)
        for tensor in (self.products, self.total, self.count):
            parallel.all_reduce_sum(tensor)
        count = self.count.cpu()
        upper = self.products.cpu().triu() * (hidden / count)
        return upper + upper.triu(1).T, self.total.cpu() * (hidden**0.5 / count)


def sample_sums(samples: list[Float[Tensor, "_ channels"]]) -> Float[Tensor, "samples 3 2 channels"]:
    """Each sample's contribution to `Statistics.sums`: (v, v squared) for each reduction v of |a| over its tokens.

    Args:
        samples: |a| of each sample's tokens.
    """
    moments = torch.stack([torch.stack(mean_and_variance(sample)) for sample in samples])
    mean, variance = moments.to(sums_device(moments.device)).double().unbind(1)
    tokens = mean.new_tensor([len(sample) for sample in samples])[:, None]
    reductions = torch.stack([mean, ((variance + mean.square()) * tokens).sqrt(), variance], dim=1)
    return torch.stack([reductions, reductions.square()], dim=2)


def mean_and_variance(
    values: Float[Tensor, "tokens channels"],
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """The mean and the variance of each channel over the tokens, summed in float32."""
    if values.device.type != "cpu":
        variance, mean = torch.var_mean(values.float(), dim=0, correction=0)
        return mean, variance
    # The first step of a batch norm. It sums bfloat16 in float32 without a copy, which would take most of the time,
    # provided that the running statistics, which are not used, are float32.
    running = values.new_zeros(2, values.shape[1], dtype=torch.float32)
    return torch.batch_norm_update_stats(values, running[0], running[1], 1.0)


def cosine_sum(one: Float[Tensor, "tokens channels"], other: Float[Tensor, "tokens channels"]) -> Float[Tensor, ""]:
    """The sum over tokens of the cosine between the two, in float32."""
    size = PIECE_BYTES if one.device.type == "cpu" else PIECE_BYTES_ON_DEVICE
    rows = max(1, size // (4 * one.shape[1]))
    buffers = one.new_empty(2, min(rows, len(one)), one.shape[1], dtype=torch.float32)
    total = buffers.new_zeros(())
    for pieces in zip(one.split(rows), other.split(rows), strict=True):
        x, y = (buffer[: len(piece)].copy_(piece) for buffer, piece in zip(buffers, pieces, strict=True))
        norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
        total += (x.mul_(y).sum(-1) / norms.clamp_min_(SMALLEST_NORMS)).sum()
    return total


def squares(matrix: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """The sum of squares of every row and of every column, in float32."""
    size = PIECE_BYTES if matrix.device.type == "cpu" else PIECE_BYTES_ON_DEVICE
    num_rows = max(1, size // (4 * matrix.shape[1]))
    buffer = matrix.new_empty(min(num_rows, len(matrix)), matrix.shape[1], dtype=torch.float32)
    of_rows, of_columns = [], buffer.new_zeros(matrix.shape[1])
    for piece in matrix.split(num_rows):
        x = buffer[: len(piece)].copy_(piece).square_()
        of_rows.append(x.sum(1))
        of_columns += x.sum(0)
    return torch.cat(of_rows), of_columns
