"""Streaming layer by layer is transformers' own forward pass."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from streaming import CLOSE, streamed
from torch import Tensor, nn

from minitron.core.errors import CheckpointError
from minitron.model import stream
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.samples import Batch, Samples, Separator
from minitron.model.stream import Pass, Stream, default_batch


@torch.no_grad()
def by_transformers(path: Path, tokens: Tensor, separator: Separator | None = None) -> list[Tensor]:
    model = tiny.model(path)
    last: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _, args, output: last.append(output))
    inputs = Batch(tokens, separator).inputs
    hidden = model.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    return [*hidden[:-1], last[0], hidden[-1]]  # transformers lists the last layer's states only after the norm


OF_BATCHES = [*((variant, 2) for variant in tiny.VARIANTS), ("mistral-window", 1), ("gemma2", 5)]


@pytest.mark.parametrize(("directory", "batch"), OF_BATCHES, indirect=["directory"])
def test_states_after_every_layer_are_those_of_transformers(directory: Path, batch: int) -> None:
    tokens = tiny.tokens(5, 11)
    torch.testing.assert_close(streamed(directory, tokens, batch), by_transformers(directory, tokens), **CLOSE)


@pytest.mark.parametrize(("directory", "batch"), OF_BATCHES, indirect=["directory"])
def test_states_of_documents_kept_apart_are_those_of_transformers(directory: Path, batch: int) -> None:
    tokens, separator = tiny.tokens(5, 12), Separator(7, leads=True)
    for row, column in ((0, 5), (1, 2), (1, 9), (2, 11), (4, 6)):
        tokens[row, column] = 7
    packed = streamed(directory, tokens, batch, separator)
    torch.testing.assert_close(packed, by_transformers(directory, tokens, separator), **CLOSE)
    assert not torch.allclose(packed[-1], streamed(directory, tokens, batch)[-1], atol=0.01)


def test_a_layer_that_stops_early_has_run_as_far_as_a_whole_one_and_no_further(llama: Path) -> None:
    part = Stream(open_checkpoint(llama), Samples(tiny.tokens(5, 11)), Pass(torch.float32, batch=2))
    part.embed()
    outputs: dict[str, list[Tensor]] = {"k_proj": [], "q_proj": [], "o_proj": []}
    layers = part.layers()
    index, layer = next(layers)
    for name, seen in outputs.items():
        layer.get_submodule(f"self_attn.{name}").register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
    modules = [layer.get_submodule(f"self_attn.{name}") for name in ("q_proj", "k_proj")]
    assert list(part.peek_at(index, layer, modules)) == part.slices
    stopped = {name: torch.cat(seen) for name, seen in outputs.items() if seen}
    assert stopped.keys() == {"q_proj", "k_proj"}
    part.advance(index, layer)
    for name, seen in stopped.items():
        assert torch.equal(torch.cat(outputs[name][len(part.slices) :]), seen)
    assert torch.cat(outputs["o_proj"]).shape == part.states.shape


def test_states_in_a_file_are_the_states_in_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tiny.tokens(3, 7)
    in_memory = streamed(llama, tokens, batch=2)
    monkeypatch.setattr(stream, "STATES_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(stream.tempfile, "tempdir", str(tmp_path))
    torch.testing.assert_close(streamed(llama, tokens, batch=2), in_memory, atol=0, rtol=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("directory", ["llama", "gemma2", "llama-sharded"], indirect=True)
def test_embeddings_are_read_of_tokens_that_occur_and_in_parts(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tiny.tokens(5, 7)
    whole = streamed(directory, tokens, batch=2)
    gathered: list[list[int]] = []
    gather = Checkpoint.gather_rows

    def watched(self: Checkpoint, name: str, rows: Tensor) -> Tensor:
        gathered.append(rows.tolist())
        return gather(self, name, rows)

    monkeypatch.setattr(Checkpoint, "gather_rows", watched)
    monkeypatch.setattr(stream, "EMBEDDING_BYTES", 1)  # so that a batch is a part
    torch.testing.assert_close(streamed(directory, tokens, batch=2), whole, atol=0, rtol=0)
    assert gathered == [sorted(set(part.flatten().tolist())) for part in tokens.split(2)]


@pytest.mark.parametrize("directory", ["llama", "phi3"], indirect=True)
def test_only_the_layer_at_hand_has_matrices_in_memory(directory: Path) -> None:
    flow = Stream(open_checkpoint(directory), Samples(tiny.tokens(1, 5)), Pass(torch.float32, batch=1))
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
    flow = Stream(open_checkpoint(llama), Samples(tiny.tokens(1, 5)), Pass(dtype, batch=1))
    flow.embed()
    for index, layer in flow.layers():
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        assert all(after.dtype == dtype for _, _, after in flow.run(index, layer))
    assert flow.states.dtype == dtype


def weights_of(path: Path, tokens: Tensor) -> list[int]:
    """Where in memory a matrix of each layer lies."""
    flow = Stream(open_checkpoint(path), Samples(tokens), Pass(torch.float32, batch=1))
    flow.embed()
    return [layer.mlp.down_proj.weight.data_ptr() for _, layer in flow.layers()]


def test_layers_take_turns_in_the_memory_of_two_and_of_one_where_there_is_no_room(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, *rest = weights_of(llama, tiny.tokens(1, 5))
    assert one != other and rest == [one, other]
    monkeypatch.setattr(stream, "free_bytes", lambda device: 0)
    assert len(set(weights_of(llama, tiny.tokens(1, 5)))) == 1


@pytest.mark.parametrize("room", [True, False])
def test_the_next_layer_is_read_while_one_computes_if_there_is_room(
    llama: Path, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, second = open_checkpoint(llama), threading.Event()
    read = Checkpoint.read_rows

    def watched(self: Checkpoint, name: str, *rest: Any) -> Tensor:
        if ".layers.1." in name:
            second.set()
        return read(self, name, *rest)

    monkeypatch.setattr(Checkpoint, "read_rows", watched)
    if not room:
        monkeypatch.setattr(stream, "free_bytes", lambda device: 0)
    flow = Stream(checkpoint, Samples(tiny.tokens(1, 5)), Pass(torch.float32, batch=1))
    flow.embed()
    layers = flow.layers()
    next(layers)
    assert second.wait(timeout=10 if room else 0.2) == room
    next(layers)
    assert second.is_set()


@pytest.mark.parametrize("room", [True, False])
def test_a_damaged_layer_is_an_error_when_its_turn_comes(
    llama: Path, room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    if not room:
        monkeypatch.setattr(stream, "free_bytes", lambda device: 0)
    seen = []
    flow = Stream(open_checkpoint(tmp_path), Samples(tiny.tokens(1, 5)), Pass(torch.float32, batch=1))
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN or infinity"):
        for index, _ in flow.layers():
            seen.append(index)
    assert seen == [0, 1]


def test_no_thread_stays_behind_when_layers_are_left_early(llama: Path) -> None:
    flow = Stream(open_checkpoint(llama), Samples(tiny.tokens(1, 5)), Pass(torch.float32, batch=1))
    before = threading.active_count()
    layers = flow.layers()
    next(layers)
    layers.close()
    assert threading.active_count() == before
    assert not matrices_in_memory(flow.model)


SHAPE = Shape(layers=32, hidden=6144, ffn=24576, heads=48, kv_heads=8, head_dim=128, vocab=256000)


@pytest.mark.parametrize(
    ("ffn", "num_tokens", "dtype", "batch"),
    [
        (24576, 4096, torch.bfloat16, 1),
        (24576, 512, torch.bfloat16, 3),
        (24576, 512, torch.float32, 1),
        (1024, 512, torch.float32, 8),
    ],
)
def test_the_default_batch_keeps_activations_within_their_budget(
    ffn: int, num_tokens: int, dtype: torch.dtype, batch: int
) -> None:
    assert default_batch(replace(SHAPE, ffn=ffn), num_tokens, dtype) == batch
    assert batch == 1 or batch * 3 * ffn * num_tokens * dtype.itemsize <= stream.ACTIVATION_BYTES


@pytest.mark.parametrize("wrong", [-1, tiny.SIZES["vocab_size"], 99999])
def test_a_token_that_the_embedding_has_no_row_for_is_refused(llama: Path, wrong: int) -> None:
    tokens = tiny.tokens(2, 8)
    tokens[1, 3] = wrong
    stream = Stream(open_checkpoint(llama), Samples(tokens), Pass(torch.float32, batch=1))
    with pytest.raises(CheckpointError, match=f"embed_tokens.weight has 320 rows, and row {wrong} is asked for"):
        stream.embed()
