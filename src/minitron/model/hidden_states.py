"""States of the residual stream on their way through a model in memory."""

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
def capture_hidden_states(layers: Sequence[nn.Module], places: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """What a forward pass in this block has at `places`: 0 is what enters the first layer, n what leaves the nth.

    transformers' `output_hidden_states` would find nothing in a model whose class FSDP has changed, keep the states of
    all places, and put the last one through the final norm.
    """
    states: dict[int, Tensor] = {}

    def enter(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        states[0] = arguments[0] if arguments else named["hidden_states"]

    def leave(place: int, module: nn.Module, arguments: Any, output: Any) -> None:
        states[place] = output if isinstance(output, Tensor) else output[0]

    with ExitStack() as hooks:
        for place in places:
            if place == 0:
                handle = layers[0].register_forward_pre_hook(enter, with_kwargs=True)
            else:
                handle = layers[place - 1].register_forward_hook(partial(leave, place))
            hooks.callback(handle.remove)
        yield states
