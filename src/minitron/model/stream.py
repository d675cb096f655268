"""Run a model one decoder layer at a time, so that models larger than memory can be read, scored and evaluated.

The skeleton is transformers' own model with its matrices on the meta device. Each layer is called with exactly the
arguments of the model's own forward, which are recorded with stand-ins for the layers.
"""

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from minitron.core.device import copying_beside, free_bytes, helper_thread, pick_device
from minitron.core.direct_io import ALIGNED, aligned_bytes
from minitron.core.files import scratch_errors, temporary_directory
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint
from minitron.model.hub import CPU, empty_model
from minitron.model.samples import Batch, Samples
from minitron.model.weights import bytes_of, require_fits

# Hidden states are kept on an accelerator up to this share of its free memory, else in memory up to this
# size, else in a memory-mapped file.
STATES_SHARE_OF_DEVICE = 0.25
STATES_IN_MEMORY_BYTES = 512 << 20
# The rows of the embedding that are in memory at a time.
EMBEDDING_BYTES = 512 << 20
# The rows of the output projection that are in memory at a time, in float32.
HEAD_BYTES = 256 << 20
# The next layer is read in advance if free memory is this many times its size.
ROOM_TO_READ_AHEAD = 3
# Larger batches are no faster: a call has thousands of tokens already.
LARGEST_DEFAULT_BATCH = 8
ACTIVATION_BYTES = 256 << 20


def default_batch(shape: Shape, num_tokens: int, dtype: torch.dtype) -> int:
    """The samples per forward call whose widest activations, three of ffn in a gated MLP, fit ACTIVATION_BYTES."""
    return max(1, min(LARGEST_DEFAULT_BATCH, ACTIVATION_BYTES // (3 * shape.ffn * num_tokens * dtype.itemsize)))


class _AllHaveRun(Exception):
    """Ends the forward pass of a layer early."""


@dataclass(frozen=True)
class Pass:
    """The settings of a streamed pass over samples, on which its results depend only through rounding.

    dtype: the dtype of weights and states during the pass.
    batch: the samples per forward call; default `default_batch`.
    device: the device of the layers; default `pick_device`.
    scratch: an existing directory for states that do not fit into memory; default the system's temporary directory.
    progress: called with (layers done, layers).
    """

    dtype: torch.dtype
    batch: int | None = None
    device: torch.device = field(default_factory=pick_device)
    scratch: Path | None = None
    progress: Callable[[int, int], None] = lambda done, total: None

    def batch_of(self, shape: Shape, samples: Samples) -> int:
        """The samples per forward call."""
        return self.batch or default_batch(shape, samples.block_tokens, self.dtype)


class Stream:
    """A pass of samples through a checkpoint, one layer at a time.

    `states` [samples, tokens, hidden] is the residual stream before the next layer; `rows` are the samples of the
    current batch. `num_states` sets of states (see `more_states`) share the memory for states.
    """

    def __init__(self, checkpoint: Checkpoint, samples: Samples, pass_: Pass, *, num_states: int = 1):
        self.checkpoint, self.samples, self.tokens = checkpoint, samples, samples.tokens
        self.dtype, self.device = pass_.dtype, pass_.device
        self.model = skeleton(checkpoint, self.dtype, self.device)
        batch, count = pass_.batch_of(checkpoint.shape, samples), len(samples)
        self.slices = [slice(start, min(start + batch, count)) for start in range(0, count, batch)]
        self.rows = slice(0, 0)
        self._scratch, self._num_states = pass_.scratch, num_states
        # The keyword arguments of each layer by the size of the batch. Where documents are kept apart, they are stored
        # by first sample, for the last batch only: the masks of all batches would be larger than their states.
        self._calls: dict[int, list[Mapping[str, Any]]] = {}

    @torch.no_grad()
    def embed(self) -> None:
        """Fill `states` with the inputs of the first layer."""
        self.states = self.more_states()
        weight = self.checkpoint.architecture.embedding
        # Its index refers to the whole vocabulary, and only gradients depend on it.
        self.model.get_submodule(weight.removesuffix(".weight")).padding_idx = None
        with self._stand_ins() as stand_ins:
            for slices, known in self._parts_of_vocabulary(self.slices):
                rows = self.checkpoint.gather_rows(weight, known)
                with _filled(self.model, {weight: rows.to(self.device, self.dtype)}):
                    for samples in slices:
                        indices = torch.searchsorted(known, self.tokens[samples].contiguous())
                        inputs = self._inputs(samples) | {"input_ids": indices.to(self.device)}
                        self.model.model(**inputs, use_cache=False)
                        self.states[samples] = stand_ins[0].seen
                        self._remember(samples, stand_ins)
        _return_freed_memory()

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield each decoder layer with its weights, which it has until the next layer is asked for.

        The next layer is read while this one computes, if memory suffices for both.

        Raises: CheckpointError if a layer cannot be read, when it would be yielded.
        """
        unused: list[dict[str, Tensor]] = [{}, {}]  # memory for two layers, allocated when it is first needed
        largest = max(self.checkpoint.stored[name].num_bytes for name in self._names(0))
        read = partial(self._read_layer, staging=aligned_bytes(largest + 2 * ALIGNED))
        with helper_thread() as reader:
            coming: Future[dict[str, Tensor]] | None = None
            for index, layer in enumerate(self._layers):
                weights = coming.result() if coming else read(index, unused.pop())
                with _filled(layer, weights):
                    coming = None
                    if index + 1 < self.checkpoint.shape.layers and (unused[0] or self._has_room()):
                        coming = reader.submit(read, index + 1, unused.pop())
                    yield index, layer
                unused.append(weights)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Yield one decoder layer with its weights, beside the layer that `layers` yields at the time."""
        largest = max(self.checkpoint.stored[name].num_bytes for name in self._names(index))
        staging = aligned_bytes(largest + 2 * ALIGNED)
        layer = self._layers[index]
        with _filled(layer, self._read_layer(index, {}, staging)):
            yield layer

    def batches(self, states: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield the samples of each batch and their states on the device; `states` defaults to this stream's states."""
        states = self.states if states is None else states
        for rows in self.slices:
            self.rows = rows
            yield rows, states[rows].to(self.device, non_blocking=True)

    @torch.no_grad()
    def peek(
        self, index: int, layer: nn.Module, states: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Run one layer over all samples, and yield (samples, states before, states after) of each batch.

        Hooks on the layer's modules run just before their batch is yielded.

        Args:
            states: a set of states from `more_states`, instead of this stream's states.
        """
        for rows, before in self.batches(states):
            after = layer(before, **self._arguments(rows, before)[index])
            yield rows, before, after[0] if isinstance(after, tuple) else after

    @torch.no_grad()
    def peek_at(self, index: int, layer: nn.Module, modules: Sequence[nn.Module]) -> Iterator[slice]:
        """Run one layer over all samples, and yield the samples of each batch once all of `modules` have run.

        What comes after them in the layer does not run. Hooks on the modules that are there before run before that.
        """
        for rows, before in self.batches():
            waiting = set(modules)

            def stop(module: nn.Module, *_: Any, waiting: set[nn.Module] = waiting) -> None:
                waiting.discard(module)
                if not waiting:
                    raise _AllHaveRun

            with ExitStack() as stack:
                for module in modules:
                    stack.callback(module.register_forward_hook(stop).remove)
                with suppress(_AllHaveRun):
                    layer(before, **self._arguments(rows, before)[index])
            assert not waiting, "all modules are called in a forward pass of the layer"
            yield rows

    def run(self, index: int, layer: nn.Module, states: Tensor | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Run one layer as `peek` does, and store the states after it."""
        kept = self.states if states is None else states
        for rows, before, after in self.peek(index, layer, states):
            yield rows, before, after
            kept[rows] = after

    def advance(self, index: int, layer: nn.Module, states: Tensor | None = None) -> None:
        """Run one layer over all samples, and store the states after it."""
        for _ in self.run(index, layer, states):
            pass

    def run_to_end(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Fill `states` with the outputs of the last layer; `progress` is called with (layers done, layers)."""
        self.embed()
        for index, layer in self.layers():
            self.advance(index, layer)
            progress(index + 1, self.checkpoint.shape.layers)

    def more_states(self) -> Tensor:
        """Allocate another set of states, for samples that pass through the layers in several ways."""
        return self._buffer((*self.tokens.shape, self.checkpoint.shape.hidden))

    @contextmanager
    def final_norm(self) -> Iterator[nn.Module]:
        """Yield the norm before the output projection, with its weights."""
        name = self.checkpoint.architecture.final_norm
        names = [spec.name for spec in self.checkpoint.specs() if spec.name.startswith(f"{name}.")]
        module = self.model.get_submodule(name)
        weights = {own.removeprefix(f"{name}."): self.checkpoint.read(own).to(self.device, self.dtype) for own in names}
        with _filled(module, weights):
            yield module

    def head_pieces(self) -> Iterator[tuple[int, Float[Tensor, "rows hidden"]]]:
        """Yield the output projection in float32, HEAD_BYTES at a time, with the number of the first row.

        If it is stored in more bits than the embedding, it is rounded to the embedding's dtype, as in memory.
        """
        checkpoint, dtype = self.checkpoint, torch.promote_types(self.checkpoint.dtype, self.dtype)
        vocab, hidden = checkpoint.stored[checkpoint.head].shape
        num_rows = max(1, HEAD_BYTES // (4 * hidden))
        for first in range(0, vocab, num_rows):
            piece = checkpoint.read_rows(checkpoint.head, first, min(first + num_rows, vocab))
            yield first, piece.to(dtype).to(self.device).float()

    def _inputs(self, rows: slice) -> dict[str, Tensor]:
        return Batch(self.tokens[rows].to(self.device), self.samples.separator).inputs

    def _arguments(self, rows: slice, states: Tensor) -> list[Mapping[str, Any]]:
        """The keyword arguments of each layer for a batch."""
        if self._key(rows) not in self._calls:
            inputs = self._inputs(rows)
            del inputs["input_ids"]
            with self._stand_ins() as stand_ins:
                self.model.model(inputs_embeds=states, **inputs, use_cache=False)
            self._remember(rows, stand_ins)
        return self._calls[self._key(rows)]

    def _remember(self, rows: slice, stand_ins: list["_StandIn"]) -> None:
        if self.samples.separator is not None:
            self._calls.clear()
        self._calls.setdefault(self._key(rows), [stand_in.arguments for stand_in in stand_ins])

    def _key(self, rows: slice) -> int:
        return rows.stop - rows.start if self.samples.separator is None else rows.start

    @property
    def _layers(self) -> nn.ModuleList:
        layers = self.model.get_submodule(self.checkpoint.architecture.layer.rpartition(".")[0])
        assert isinstance(layers, nn.ModuleList)
        return layers

    def _parts_of_vocabulary(self, slices: list[slice]) -> Iterator[tuple[list[slice], Tensor]]:
        """Yield batches with the token ids in them, so few that their embeddings fit EMBEDDING_BYTES."""
        if not slices:
            return
        known = self.tokens[slices[0].start : slices[-1].stop].unique()
        if len(slices) > 1 and len(known) * self.checkpoint.shape.hidden * self.dtype.itemsize > EMBEDDING_BYTES:
            half = len(slices) // 2
            yield from self._parts_of_vocabulary(slices[:half])
            yield from self._parts_of_vocabulary(slices[half:])
        else:
            yield slices, known

    def _read_layer(
        self, index: int, weights: dict[str, Tensor], staging: UInt8[Tensor, " bytes"]
    ) -> dict[str, Tensor]:
        """Read a layer's weights, by their names in the layer, into the memory of another layer's weights.

        The memory is reused: fresh pages cost as much time as reading, and blocks of many sizes would make the heap
        grow with the number of layers.
        """
        prefix = self.checkpoint.architecture.layer.format(layer=index) + "."
        with copying_beside(self.device):
            for name in self._names(index):
                tensor = self.checkpoint.read_rows(name, 0, self.checkpoint.stored[name].shape[0], staging)
                own = name.removeprefix(prefix)
                if own not in weights:
                    weights[own] = torch.empty(tensor.shape, dtype=self.dtype, device=self.device)
                require_fits(tensor, self.checkpoint.stored[name], self.dtype)
                weights[own].copy_(tensor)
        return weights

    def _names(self, index: int) -> list[str]:
        return [spec.name for spec in self.checkpoint.specs() if spec.layer == index]

    def _has_room(self) -> bool:
        """Whether memory suffices for one more layer."""
        stored = (self.checkpoint.stored[name] for name in self._names(0))
        size = sum(bytes_of(self.dtype, tensor.shape) for tensor in stored)
        return all(free_bytes(device) > ROOM_TO_READ_AHEAD * size for device in {CPU, self.device})

    @contextmanager
    def _stand_ins(self) -> Iterator[list["_StandIn"]]:
        layers, core = (
            self._layers,
            self.model.get_submodule(self.checkpoint.architecture.final_norm.rpartition(".")[0]),
        )
        name = self.checkpoint.architecture.final_norm.rpartition(".")[2]
        originals, norm = list(layers), getattr(core, name)
        stand_ins = [_StandIn(layer) for layer in originals]
        for index, stand_in in enumerate(stand_ins):
            layers[index] = stand_in
        setattr(core, name, nn.Identity())  # its weights are not loaded, and its output is not used
        try:
            yield stand_ins
        finally:
            setattr(core, name, norm)
            for index, original in enumerate(originals):
                layers[index] = original

    def _buffer(self, shape: tuple[int, int, int]) -> Tensor:
        size = torch.Size(shape).numel()
        num_bytes = size * self.dtype.itemsize
        of_all = num_bytes * self._num_states
        if self.device != CPU and of_all <= STATES_SHARE_OF_DEVICE * free_bytes(self.device):
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        if of_all <= STATES_IN_MEMORY_BYTES:
            return torch.empty(shape, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        # The file is unlinked once mapped: its space is freed with the tensor, even if the process is killed.
        at = self._scratch or temporary_directory()
        with scratch_errors(self._scratch), tempfile.NamedTemporaryFile(dir=at, prefix="minitron-states-") as file:
            _take_room(file.fileno(), num_bytes)
            return torch.from_file(file.name, shared=True, size=size, dtype=self.dtype).view(shape)


def _take_room(file: int, num_bytes: int) -> None:
    """Extend a file, and allocate its blocks now where the system can: if the disk were full later, a write to the
    mapped file would kill the process."""
    if sys.platform == "linux":
        os.posix_fallocate(file, 0, num_bytes)
    else:
        os.truncate(file, num_bytes)


@contextmanager
def _filled(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """In this block, parameters of the module, by their names, have these values."""
    before = {name: module.get_parameter(name) for name in weights}
    _set_parameters(module, weights)
    try:
        yield
    finally:
        _set_parameters(module, before)


def _set_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, nn.Parameter(value, requires_grad=False))


def _return_freed_memory() -> None:
    """Return freed heap pages to the system: else gaps between blocks make the heap grow with the number of layers."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return  # not glibc: nothing to do


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device = CPU) -> Any:
    """The checkpoint's model without its weights."""
    return empty_model(checkpoint.config, dtype, device)


class _StandIn(nn.Module):
    """Replaces a layer: records the arguments of its call, and returns the layer's attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule, so that its parameters are not found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, states: Tensor, **arguments: Any) -> Tensor:
        self.__dict__["seen"], self.__dict__["arguments"] = states, arguments
        return states
