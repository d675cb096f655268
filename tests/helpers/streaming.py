"""The hidden states of a streamed pass, and how close they come to those of transformers."""

from pathlib import Path

import torch
from torch import Tensor

from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Samples, Separator
from minitron.model.stream import Pass, Stream

CLOSE = {"atol": 5e-6, "rtol": 5e-6}


def streamed(path: Path, tokens: Tensor, batch: int, separator: Separator | None = None) -> list[Tensor]:
    """The states before the first layer, after each layer, and after the final norm."""
    flow = Stream(open_checkpoint(path), Samples(tokens, separator), Pass(torch.float32, batch=batch))
    flow.embed()
    states = [flow.states.clone()]
    for index, layer in flow.layers():
        for rows, before, after in flow.run(index, layer):
            assert torch.equal(before, states[-1][rows])
            assert torch.equal(flow.states[rows], before) and after.shape == before.shape
        states.append(flow.states.clone())
    with torch.no_grad(), flow.final_norm() as norm:
        return [*states, norm(flow.states)]
