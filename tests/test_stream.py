"""Streaming layer by layer is transformers' own forward pass."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from minitron.model import stream
from minitron.model.checkpoint import open_checkpoint
from minitron.model.stream import Stream

CLOSE = {"atol": 5e-6, "rtol": 5e-6}


def streamed(path: Path, tokens: Tensor, batch: int) -> list[Tensor]:
    """The states before the first layer, after each layer, and after the final norm."""
    flow = Stream(open_checkpoint(path), tokens, dtype=torch.float32, batch=batch)
    flow.embed()
    states = [flow.states.clone()]
    for index, layer in flow.layers():
        for rows, before, after in flow.run(index, layer):
            assert torch.equal(before, states[-1][rows])
            assert torch.equal(flow.states[rows], before) and after.shape == before.shape
        states.append(flow.states.clone())
    with torch.no_grad(), flow.final_norm() as norm:
        return [*states, norm(flow.states)]


@torch.no_grad()
def by_transformers(path: Path, tokens: Tensor) -> list[Tensor]:
    model = tiny.model(path)
    last: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _, args, output: last.append(output))
    hidden = model.model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    return [*hidden[:-1], last[0], hidden[-1]]  # transformers lists the last layer's states only after the norm


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_states_after_every_layer_are_those_of_transformers(directory: Path, batch: int) -> None:
    tokens = tiny.tokens(5, 11)
    torch.testing.assert_close(streamed(directory, tokens, batch), by_transformers(directory, tokens), **CLOSE)


def test_states_in_a_file_are_the_states_in_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tiny.tokens(3, 7)
    in_memory = streamed(llama, tokens, batch=2)
    monkeypatch.setattr(stream, "STATES_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(stream.tempfile, "tempdir", str(tmp_path))
    torch.testing.assert_close(streamed(llama, tokens, batch=2), in_memory, atol=0, rtol=0)
    assert not list(tmp_path.iterdir())


def test_only_the_layer_at_hand_has_matrices_in_memory(directory: Path) -> None:
    flow = Stream(open_checkpoint(directory), tiny.tokens(1, 5), dtype=torch.float32, batch=1)
    flow.embed()
    assert not matrices_in_memory(flow.model)
    for index, _ in flow.layers():
        here = [name for name, p in flow.model.named_parameters() if f".layers.{index}." in name and p.ndim == 2]
        assert matrices_in_memory(flow.model) == here and len(here) >= 4
    assert not matrices_in_memory(flow.model)


def matrices_in_memory(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.ndim == 2 and not parameter.is_meta]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_states_run_in_the_dtype_asked_for(llama: Path, dtype: torch.dtype) -> None:
    flow = Stream(open_checkpoint(llama), tiny.tokens(1, 5), dtype=dtype, batch=1)
    flow.embed()
    for index, layer in flow.layers():
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        assert all(after.dtype == dtype for _, _, after in flow.run(index, layer))
    assert flow.states.dtype == dtype
