"""The hidden states between the layers of a model in memory."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from minitron.model.checkpoint import Checkpoint


def decoder_layers(model: Any, checkpoint: Checkpoint) -> list[nn.Module]:
    """The decoder layers of a model that was loaded from the checkpoint."""
    name = checkpoint.architecture.layer
    return [model.get_submodule(name.format(layer=layer)) for layer in range(checkpoint.shape.layers)]


@contextmanager
def capture_hidden_states(layers: Sequence[nn.Module], positions: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """The hidden states of the latest forward pass in this block: 0 is the input of layer 1, n the output of layer n.

    transformers' `output_hidden_states` would find none in a model whose class FSDP has changed, would keep the states
    of all layers, and would apply the final norm to the last ones.
    """
    states: dict[int, Tensor] = {}

    def enter(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        states[0] = arguments[0] if arguments else named["hidden_states"]

    def leave(position: int, module: nn.Module, arguments: Any, output: Any) -> None:
        states[position] = output if isinstance(output, Tensor) else output[0]

    with ExitStack() as hooks:
        for position in positions:
            if position == 0:
                handle = layers[0].register_forward_pre_hook(enter, with_kwargs=True)
            else:
                handle = layers[position - 1].register_forward_hook(partial(leave, position))
            hooks.callback(handle.remove)
        yield states
