"""Run a model one decoder layer at a time, so that a model larger than memory can be read, scored and evaluated.

The skeleton is transformers' own model with its matrices on the meta device. Each layer gets exactly the arguments
that the model would give it: they are recorded from the model's own forward with stand-ins for the layers.
"""

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minitron.model.checkpoint import Checkpoint

# Hidden states between layers live in memory up to this size, in a memory-mapped file beyond it.
STATES_IN_MEMORY_BYTES = 1 << 30


class Stream:
    """A checkpoint and the token blocks on their way through it.

    `states` [samples, tokens, hidden] holds the residual stream before the next layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: Tensor,
        *,
        dtype: torch.dtype,
        batch: int,
        scratch: Path | None = None,
    ):
        """
        Args:
            tokens: token ids, int64 [samples, tokens].
            dtype: dtype of weights and states while they run.
            batch: samples per forward call; results do not depend on it beyond rounding.
            scratch: where the file of hidden states goes if it is needed; default the system's temporary directory.
        """
        self.checkpoint, self.tokens, self.dtype = checkpoint, tokens, dtype
        self.model = skeleton(checkpoint, dtype)
        self.slices = [slice(start, min(start + batch, len(tokens))) for start in range(0, len(tokens), batch)]
        self._scratch = scratch
        self._calls: dict[int, list[dict[str, Any]]] = {}  # batch size -> keyword arguments of each layer

    @torch.no_grad()
    def embed(self) -> None:
        """Fill `states` with what the first layer reads."""
        num_samples, num_tokens = self.tokens.shape
        self.states = self._buffer((num_samples, num_tokens, self.checkpoint.shape.hidden))
        weight = self.checkpoint.architecture.embedding
        with self._loaded(self.model, {weight: weight}), self._stand_ins() as stand_ins:
            for rows in self.slices:
                self.model.model(input_ids=self.tokens[rows], use_cache=False)
                self.states[rows] = stand_ins[0].seen
                self._calls.setdefault(rows.stop - rows.start, [stand_in.arguments for stand_in in stand_ins])

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Each decoder layer in turn, with its weights; they are gone when the next one comes."""
        prefix = self.checkpoint.architecture.layer
        for index, layer in enumerate(self._layers):
            names = [spec.name for spec in self.checkpoint.specs() if spec.layer == index]
            start = len(prefix.format(layer=index)) + 1
            with self._loaded(layer, {name[start:]: name for name in names}):
                yield index, layer
            _return_freed_memory()

    @torch.no_grad()
    def run(self, index: int, layer: nn.Module) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Run one layer over all samples: yields (samples, states before, states after), and keeps the states after.

        Hooks on the layer's modules see each batch just before it is yielded.
        """
        for rows in self.slices:
            before = self.states[rows]
            arguments = self._calls[rows.stop - rows.start][index]
            after = layer(before, **arguments)
            after = after[0] if isinstance(after, tuple) else after
            yield rows, before, after
            self.states[rows] = after

    @contextmanager
    def final_norm(self) -> Iterator[nn.Module]:
        """The norm before the output projection, with its weights."""
        module = self.model.get_submodule(self.checkpoint.architecture.final_norm)
        prefix = self.checkpoint.architecture.final_norm + "."
        names = [spec.name for spec in self.checkpoint.specs() if spec.name.startswith(prefix)]
        with self._loaded(module, {name.removeprefix(prefix): name for name in names}):
            yield module

    @property
    def _layers(self) -> nn.ModuleList:
        layers = self.model.get_submodule(self.checkpoint.architecture.layer.rpartition(".")[0])
        assert isinstance(layers, nn.ModuleList)
        return layers

    @contextmanager
    def _loaded(self, module: nn.Module, names: dict[str, str]) -> Iterator[None]:
        """Parameters of `module` (by their name in it) filled from the checkpoint, and emptied again after."""
        state = {inside: self.checkpoint.read(name).to(self.dtype) for inside, name in names.items()}
        module.load_state_dict(state, assign=True, strict=False)
        try:
            yield
        finally:
            module.load_state_dict({inside: t.to("meta") for inside, t in state.items()}, assign=True, strict=False)

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
        setattr(core, name, nn.Identity())  # its weights are not loaded, and its output is not needed
        try:
            yield stand_ins
        finally:
            setattr(core, name, norm)
            for index, original in enumerate(originals):
                layers[index] = original

    def _buffer(self, shape: tuple[int, int, int]) -> Tensor:
        size = torch.Size(shape).numel()
        if size * self.dtype.itemsize <= STATES_IN_MEMORY_BYTES:
            return torch.empty(shape, dtype=self.dtype)
        # Unlinked once mapped: the space returns when the tensor goes, even if the process is killed.
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix="minitron-states-") as file:
            file.truncate(size * self.dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=self.dtype).view(shape)


def _return_freed_memory() -> None:
    """Give freed heap pages back to the system.

    Without this, holes between blocks of different sizes make the heap grow with the number of layers.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return  # not glibc: nothing to do


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' model for the checkpoint's config: matrices on meta, small buffers (rotary tables, ...) real."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**checkpoint.config)
    with _EmptyOnMeta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


class _EmptyOnMeta(TorchFunctionMode):
    """Allocations of uninitialised memory, which is how modules make their matrices, go to the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _StandIn(nn.Module):
    """Takes a layer's place, records what it was called with, and answers for its attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer  # not a child: its parameters are not ours

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, states: Tensor, **arguments: Any) -> Tensor:
        self.__dict__["seen"], self.__dict__["arguments"] = states, arguments
        return states
