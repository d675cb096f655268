"""Reading is safetensors' own reading, writing is what transformers loads, and damage is named."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from directories import EMBEDDING, HEAD, change_config, change_tensors, copy

from minitron.core.errors import CheckpointError, RunError, UnsupportedArchitecture
from minitron.core.files import atomic_directory, digest_files, write_json
from minitron.model import weights
from minitron.model.checkpoint import open_checkpoint
from minitron.model.families import FAMILIES
from minitron.model.hub import resolve_model
from minitron.model.tokenizer import load_tokenizer
from minitron.model.weight_files import carried_files, model_files

# --- reading and writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", ["llama", "llama-bfloat16", "llama-sharded"], indirect=True)
def test_reading_is_safetensors_own_reading(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    expected = tiny.tensors(directory)
    assert checkpoint.stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert checkpoint.read(name).dtype == checkpoint.stored[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.weight_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.dtype == expected[EMBEDDING].dtype


def save_by_hand(path: Path, header_bytes: int, gap: int, files: int) -> None:
    """Rewrite the weights as no library does: tensors backwards, over several files of any names, with gaps between.

    header_bytes: the header is padded to a multiple of these, and so is not aligned unless they are 8.
    """
    tensors = tiny.tensors(path)
    (path / "model.safetensors").unlink()
    for number in range(files):
        header: dict[str, Any] = {}
        data = b""
        for name in [*reversed(tensors)][number::files]:
            data += b"#" * gap
            raw = tensors[name].view(torch.uint8).numpy().tobytes()
            header[name] = {
                "dtype": {2: "BF16", 4: "F32"}[tensors[name].itemsize],
                "shape": list(tensors[name].shape),
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % header_bytes)
        (path / f"{number}-part.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    where = {
        name: f"{number}-part.safetensors" for number in range(files) for name in [*reversed(tensors)][number::files]
    }
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize(("header_bytes", "gap", "files"), [(8, 0, 1), (8, 8, 3), (7, 3, 2), (9, 1, 5)])
@pytest.mark.parametrize("variant", ["llama", "llama-bfloat16"])
def test_tensors_may_lie_in_any_file_in_any_order_anywhere(
    tmp_path: Path, variant: str, header_bytes: int, gap: int, files: int
) -> None:
    path = tiny.checkpoint(variant, tmp_path / "model")
    expected = tiny.tensors(path)
    save_by_hand(path, header_bytes, gap, files)
    checkpoint = open_checkpoint(path)
    assert len({stored.file for stored in checkpoint.stored.values()}) == files
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name
        assert torch.equal(checkpoint.read_rows(name, 3, 7), tensor[3:7]), name
    copied = copy(checkpoint, tmp_path / "copy")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tiny.tensors(copied).items())


@pytest.mark.parametrize("directory", ["llama-bfloat16", "llama-tied", "llama-sharded"], indirect=True)
@pytest.mark.parametrize(("chunk_bytes", "gap_bytes"), [(1, 0), (1000, 300), (10**7, 10**6)])
def test_rows_that_are_gathered_are_the_tensors_rows(
    directory: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, gap_bytes: int
) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(weights, "GAP_BYTES", gap_bytes)
    checkpoint = open_checkpoint(directory)
    expected = checkpoint.read(EMBEDDING)
    for rows in ([], [0], [319], [5, 5, 6], range(320), sorted(torch.randint(320, (40,)).tolist())):
        wanted = torch.tensor(rows, dtype=torch.int64)
        gathered = checkpoint.gather_rows(EMBEDDING, wanted)
        assert torch.equal(gathered, expected[wanted]) and gathered.dtype == expected.dtype
    norm = "model.norm.weight"
    assert torch.equal(checkpoint.gather_rows(norm, torch.tensor([1, 9])), checkpoint.read(norm)[[1, 9]])


def test_rows_that_lie_together_are_read_together_and_those_between_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", 40)
    monkeypatch.setattr(weights, "GAP_BYTES", 20)
    rows = torch.tensor([0, 1, 4, 5, 7, 8, 9, 20, 23, 30])
    parts = [rows[start:stop].tolist() for start, stop in weights.runs(rows, row_bytes=10)]
    assert parts == [[0, 1], [4, 5, 7], [8, 9], [20, 23], [30]]


@pytest.mark.parametrize(
    ("directory", "shard_bytes"),
    [*((variant, 20_000) for variant in tiny.VARIANTS), ("llama", 10**9), ("llama-tied", 10**9)],
    indirect=["directory"],
)
def test_what_is_written_is_what_transformers_loads(directory: Path, tmp_path: Path, shard_bytes: int) -> None:
    checkpoint = open_checkpoint(directory)
    out = copy(checkpoint, tmp_path / "copy", shard_bytes=shard_bytes)
    files = list(out.glob("*.safetensors"))
    assert len(files) == {1: len(checkpoint.stored), 10**9: 1}.get(shard_bytes, len(files))
    assert (out / "model.safetensors.index.json").exists() == (len(files) > 1)
    before, after = (tiny.model(path, checkpoint.dtype).state_dict() for path in (directory, out))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert open_checkpoint(out).config == checkpoint.config


def test_the_index_names_the_shard_of_every_tensor(llama: Path, tmp_path: Path) -> None:
    out = copy(open_checkpoint(llama), tmp_path / "copy", shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = open_checkpoint(out).stored
    assert index["weight_map"] == {name: stored[name].file.name for name in stored}
    assert index["metadata"]["total_size"] == open_checkpoint(out).weight_bytes


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_a_tied_model_reads_alike_whichever_name_it_is_stored_under(tmp_path: Path, stored: str) -> None:
    path = tiny.checkpoint("llama-tied", tmp_path / "tied")
    embedding = tiny.tensors(path)[EMBEDDING]
    changes = {"embedding": {}, "head": {EMBEDDING: None, HEAD: embedding}, "both": {HEAD: embedding.clone()}}[stored]
    change_tensors(path, **changes)
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.read(EMBEDDING), embedding)
    assert checkpoint.head == EMBEDDING and HEAD not in checkpoint.stored
    assert checkpoint.parameters.total == sum(p.numel() for p in tiny.model(path).parameters())
    copied = tiny.model(copy(checkpoint, tmp_path / "copy"))
    assert torch.equal(tiny.logits(copied, tiny.tokens(1, 5)), tiny.logits(tiny.model(path), tiny.tokens(1, 5)))


@pytest.mark.parametrize("rows", [319, 321])
def test_a_second_copy_of_a_tied_embedding_must_be_as_large(tmp_path: Path, rows: int) -> None:
    path = tiny.checkpoint("llama-tied", tmp_path / "tied")
    embedding = tiny.tensors(path)[EMBEDDING]
    change_tensors(path, **{HEAD: torch.cat([embedding, embedding])[:rows].clone()})
    with pytest.raises(CheckpointError, match="yet they are stored with different values"):
        open_checkpoint(path)


def test_the_head_of_an_untied_model_is_its_own(llama: Path) -> None:
    assert open_checkpoint(llama).head == HEAD


def test_rotary_tables_of_old_exports_are_ignored(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "old")
    change_tensors(path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in open_checkpoint(path).stored


def test_tokenizer_and_licence_travel_and_nothing_else_does(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "teacher")
    tokenizer = tiny.tokenizer(path, adds_bos=True)
    carried = {
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "tokenizer.model",
    }
    for name in (*carried, "README.md", "training_args.bin", "model.py"):
        (path / name).write_text("{}")
    carried |= {"tokenizer.json", "tokenizer_config.json"}
    out = copy(open_checkpoint(path), tmp_path / "copy")
    assert {file.name for file in carried_files(path)} == carried
    assert {file.name for file in out.iterdir()} == carried | {"config.json", "model.safetensors"}
    assert all((out / name).read_bytes() == (path / name).read_bytes() for name in carried)
    assert load_tokenizer(out)("the plain").input_ids == tokenizer("the plain").input_ids


@pytest.mark.parametrize(("said", "message"), [("null", "must be a JSON object"), ("{", "is not JSON")])
def test_a_file_that_cannot_travel_is_refused_when_the_model_is_opened(tmp_path: Path, said: str, message: str) -> None:
    path = tiny.checkpoint("llama", tmp_path / "teacher")
    (path / "generation_config.json").write_text(said)
    with pytest.raises(CheckpointError, match=f"generation_config.json {message}"):
        open_checkpoint(path)


def test_model_digest_depends_on_weights_and_config_but_not_on_notes(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model")

    def digest() -> str:
        return digest_files(model_files(path), {})

    before = digest()
    (path / "README.md").write_text("notes")
    assert digest() == before
    change_config(path, use_cache=False)
    changed = digest()
    change_tensors(path, **{EMBEDDING: torch.zeros(320, 32)})
    assert len({before, changed, digest()}) == 3


# --- damaged directories ---------------------------------------------------------------------------------------------


def _cut_short(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def _header(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / "model.safetensors").write_bytes(content) and None


def _pickle_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _forget(path: Path, key: str) -> None:
    config = json.loads((path / "config.json").read_text())
    del config[key]
    (path / "config.json").write_text(json.dumps(config))


def _grow(path: Path) -> None:
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"more")


def _untie(path: Path) -> None:
    change_config(path, tie_word_embeddings=True)  # yet both tensors are there, and differ


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "is not a model directory: it has no config.json"),
    "config no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json is not JSON"),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), "config.json must be a JSON object"),
    "no model type": (lambda p: change_config(p, model_type=None), "has no model_type"),
    "unknown family": (
        lambda p: change_config(p, model_type="mixtral"),
        f"model_type 'mixtral' is not supported; did you mean 'mistral'. Available: {', '.join(sorted(FAMILIES))}",
    ),
    "strange family": (
        lambda p: change_config(p, model_type="gpt2"),
        f"'gpt2' is not supported; Available: {', '.join(sorted(FAMILIES))}",
    ),
    "size missing": (
        lambda p: change_config(p, hidden_size=None),
        "hidden_size is None; it must be a positive integer",
    ),
    "size negative": (lambda p: change_config(p, vocab_size=-1), "vocab_size is -1"),
    "unequal groups": (lambda p: change_config(p, num_key_value_heads=3), "8 heads cannot share 3 kv_heads equally"),
    "other ffn": (
        lambda p: change_config(p, intermediate_size=41),
        r"layers.0.mlp.gate_proj.weight is \[40, 32\], but by config.json it must be \[41, 32\]: "
        r"axis 0 is ffn, by config.json's intermediate_size=41$",
    ),
    "other heads": (
        lambda p: change_config(p, num_attention_heads=4),
        r"layers.0.self_attn.q_proj.weight is \[32, 32\], but by config.json it must be \[16, 32\]: "
        r"axis 0 is heads\*head_dim, by config.json's num_attention_heads=4, head_dim=4$",
    ),
    "other input": (
        lambda p: change_tensors(p, **{"model.layers.1.self_attn.o_proj.weight": torch.zeros(32, 64)}),
        r"layers.1.self_attn.o_proj.weight is \[32, 64\], .* \[32, 32\]: axis 1 is heads\*head_dim, by",
    ),
    "other hidden": (
        lambda p: change_config(p, hidden_size=64),
        r"embed_tokens.weight is \[320, 32\], .* \[320, 64\]: axis 1 is hidden, by config.json's hidden_size=64$",
    ),
    "head_dim left out": (
        lambda p: change_config(p, num_attention_heads=4) or _forget(p, "head_dim"),
        r"k_proj.weight is \[16, 32\], .* axis 0 is kv_heads\*head_dim, "
        r"by config.json's num_key_value_heads=4, head_dim \(missing, so 8\)$",
    ),
    "other number of axes": (
        lambda p: change_tensors(p, **{HEAD: torch.zeros(320)}),
        r"lm_head.weight is \[320\], but by config.json it must be \[320, 32\]: config.json does not describe",
    ),
    "more layers": (
        lambda p: change_config(p, num_hidden_layers=5),
        "config.json promises 48 tensors, 9 are missing in .*, first model.layers.4",
    ),
    "fewer layers": (
        lambda p: change_config(p, num_hidden_layers=3),
        "9 tensors are not part of the llama family, first model.layers.3",
    ),
    "biases": (
        lambda p: change_config(p, mlp_bias=True),
        "promises 51 tensors, 12 are missing in .*, first .*proj.bias",
    ),
    "tied but different": (_untie, "ties .*lm_head.weight .* are stored with different values"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "has no weights: neither model.safetensors nor"),
    "pickle only": (_pickle_only, r"has only pickled weights \(pytorch_model.bin\), which can run code"),
    "truncated": (_cut_short, r"model.safetensors is truncated: \d+ bytes where its header says \d+; copy it again"),
    "grown": (_grow, r"model.safetensors is too long: \d+ bytes where its header says \d+; copy it again"),
    "empty file": (_header(b""), "is truncated or no safetensors file"),
    "short file": (_header(b"abc"), "is truncated or no safetensors file"),
    "text file": (_header(b"version https://git-lfs.github.com/spec/v1"), "is truncated or no safetensors file"),
    "header no JSON": (_header(b"\x04\0\0\0\0\0\0\0{{{{"), "is not a safetensors file"),
    "header no text": (_header(b"\x04\0\0\0\0\0\0\0\xff\xfe\xff\xfe"), "is not a safetensors file"),
    "header a list": (_header(b"\x02\0\0\0\0\0\0\0[]"), "is not a safetensors file"),
    "header of numbers": (_header(b"\x07\0\0\0\0\0\0\0" + b'{"a":1}'), "is not a safetensors file"),
    "header without offsets": (_header(b"\x08\0\0\0\0\0\0\0" + b'{"a":{}}'), "is not a safetensors file"),
    "integers": (
        lambda p: change_tensors(p, **{EMBEDDING: torch.ones(320, 32, dtype=torch.int8)}),
        "embed_tokens.weight is stored as I8; supported are F32, F16, BF16",
    ),
    "index no JSON": (
        lambda p: (p / "model.safetensors.index.json").write_text("{}"),
        "index.json is not a safetensors index",
    ),
}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
PROJECTION = "model.layers.0.mlp.up_proj"
INTEGERS = torch.ones(40, 4, dtype=torch.int32)
WAY_OUT = "cut the original model in 16 or 32 bits and quantize after"


def _quantized(dtype: torch.dtype = torch.uint8, **others: torch.Tensor) -> Callable[[Path], None]:
    """A projection in another dtype, and what a method stores beside it."""
    changes = {f"{PROJECTION}.{name.replace('__', '.')}": tensor for name, tensor in others.items()}
    return lambda path: change_tensors(path, **{f"{PROJECTION}.weight": torch.ones(40, 32).to(dtype)} | changes)


# A config.json's own word, and what tensors tell without it.
QUANTIZED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gptq": (lambda p: change_config(p, quantization_config=GPTQ), "config.json's quantization_config: gptq, 4 bits"),
    "awq": (lambda p: change_config(p, quantization_config={"quant_method": "awq", "bits": 4}), "awq, 4 bits"),
    "nf4": (lambda p: change_config(p, quantization_config=NF4), r"bitsandbytes, load_in_4bit\)"),
    "old 8 bit": (lambda p: change_config(p, quantization_config={"load_in_8bit": True}), "config: load_in_8bit"),
    "fp8": (lambda p: change_config(p, quantization_config={"quant_method": "fp8"}), "quantization_config: fp8"),
    "mxfp4": (lambda p: change_config(p, quantization_config={"quant_method": "mxfp4"}), "quantization_config: mxfp4"),
    "compressed": (
        lambda p: change_config(p, compression_config={"quant_method": "compressed-tensors"}),
        "config.json's compression_config: compressed-tensors",
    ),
    "mlx": (lambda p: change_config(p, quantization={"bits": 8, "group_size": 64}), "'s quantization: 8 bits"),
    "unnamed": (lambda p: change_config(p, quantization_config={"scheme": "odd"}), "config: {'scheme': 'odd'}"),
    "no table": (lambda p: change_config(p, quantization_config="int8"), "quantization_config: int8"),
    "fp8 tensors": (_quantized(torch.float8_e4m3fn), "up_proj.weight is stored as F8_E4M3; .*, as fp8 stores"),
    "fp8 e5m2 tensors": (_quantized(torch.float8_e5m2), "up_proj.weight is stored as F8_E5M2; .*, as fp8 stores"),
    "gptq tensors": (
        _quantized(torch.float16, qweight=INTEGERS),
        "up_proj.qweight is stored as I32; .*, as gptq or awq",
    ),
    "zeros": (_quantized(torch.float16, qzeros=INTEGERS), "up_proj.qzeros is stored as I32; .*, as gptq or awq stores"),
    "int8 tensors": (
        _quantized(torch.int8, SCB=torch.ones(40)),
        r"up_proj.weight is stored as I8; .*, as bitsandbytes \(load_in_8bit\) stores",
    ),
    "nf4 tensors": (
        _quantized(weight__absmax=torch.ones(40)),
        r"up_proj.weight is stored as U8; .*, as bitsandbytes \(load_in_4bit\) stores",
    ),
    "packed tensors": (_quantized(torch.float16, weight_packed=INTEGERS), "weight_packed is .*, as compressed-tensors"),
    "mlx tensors": (
        _quantized(torch.uint32, scales=torch.ones(4)),
        "up_proj.weight is stored as U32; .*, as mlx stores",
    ),
}


@pytest.mark.parametrize(("quantize", "message"), QUANTIZED.values(), ids=QUANTIZED)
def test_quantized_weights_are_named_as_what_they_are(
    tmp_path: Path, quantize: Callable[[Path], Any], message: str
) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model")
    quantize(path)
    with pytest.raises(CheckpointError, match=f"{message}.*; {WAY_OUT}$"):
        open_checkpoint(path)


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_when_the_directory_is_opened(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model")
    open_checkpoint(path)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_the_config_keys_of_a_fused_axis_are_each_named_once(tmp_path: Path) -> None:
    path = tiny.checkpoint("phi3", tmp_path / "model")
    change_config(path, num_key_value_heads=2)
    keys = "num_attention_heads=8, head_dim=4, num_key_value_heads=2$"
    with pytest.raises(
        CheckpointError, match=r"axis 0 is heads\*head_dim(\+kv_heads\*head_dim){2}, by config.json's " + keys
    ):
        open_checkpoint(path)


def test_an_unknown_family_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(UnsupportedArchitecture, match="did you mean 'llama'"):
        open_checkpoint(tmp_path)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama-sharded", tmp_path / "model")
    first, second, *others = sorted(path.glob("*.safetensors"))
    first.unlink(), second.unlink()
    with pytest.raises(
        CheckpointError, match=rf"lacks 2 of {2 + len(others)} shards that .* names: {first.name}, {second.name}"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused_on_reading(tmp_path: Path, value: float) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model")
    damaged = tiny.tensors(path)[EMBEDDING]
    damaged[7, 3] = value
    change_tensors(path, **{EMBEDDING: damaged})
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor {EMBEDDING} holds NaN or infinity"):
        open_checkpoint(path).read(EMBEDDING)


def test_rows_are_refused_for_what_they_hold_and_not_for_what_others_do(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model")
    damaged = tiny.tensors(path)[EMBEDDING]
    damaged[7, 3] = float("nan")
    change_tensors(path, **{EMBEDDING: damaged})
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.read_rows(EMBEDDING, 8, 320), damaged[8:])
    for read in (
        lambda: checkpoint.read_rows(EMBEDDING, 0, 8),
        lambda: checkpoint.gather_rows(EMBEDDING, torch.tensor([2, 7])),
    ):
        with pytest.raises(CheckpointError, match=f"model.safetensors: tensor {EMBEDDING} holds NaN or infinity"):
            read()


def test_large_but_finite_values_are_read(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model")
    change_tensors(path, **{EMBEDDING: torch.full((320, 32), 3e38)})
    assert open_checkpoint(path).read(EMBEDDING).max() == torch.tensor(3e38)


def test_a_file_that_vanishes_while_open_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.checkpoint("llama", tmp_path / "model"))
    (checkpoint.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"model.safetensors: cannot read tensor {EMBEDDING}"):
        checkpoint.read(EMBEDDING)


@pytest.mark.parametrize("keep_bytes", [8, 5000])
def test_a_file_that_is_cut_short_while_open_is_named(tmp_path: Path, keep_bytes: int) -> None:
    checkpoint = open_checkpoint(tiny.checkpoint("llama", tmp_path / "model"))
    os.truncate(checkpoint.path / "model.safetensors", keep_bytes)
    message = f"model.safetensors: cannot read tensor {EMBEDDING}: the file was changed after the checkpoint was opened"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(EMBEDDING)


def test_a_file_that_is_cut_short_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny.checkpoint("llama", tmp_path / "model"))
    read_range = weights.read_range

    def cut_short(file: int, start: int, stop: int, buffer: Any) -> torch.Tensor:
        os.truncate(checkpoint.path / "model.safetensors", stop - 100)
        return read_range(file, start, stop, buffer)

    monkeypatch.setattr(weights, "read_range", cut_short)
    with pytest.raises(CheckpointError, match=f"cannot read tensor {EMBEDDING}: the file ends before it"):
        checkpoint.read(EMBEDDING)


def test_a_header_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model")
    file = path / "model.safetensors"
    for old, new in ((b"[320,32]", b"[321,32]"), (b'"F32"', b'"F16"')):
        whole = file.read_bytes()
        file.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(
            CheckpointError, match=r"tensor .* takes \d+ bytes where .* its header is damaged; copy it again"
        ):
            open_checkpoint(path)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "model directory ./nowhere does not exist"),
        ("a/b/c", "model directory a/b/c does not exist"),
        ("{here}/file", "file is a file; give the model's directory or a hub id"),
        ("nobody/nothing", "'nobody/nothing' is neither a local directory nor a hub model"),
    ],
)
def test_a_model_that_is_not_there_is_named(tmp_path: Path, model: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=message):
        resolve_model(model.format(here=tmp_path))


def test_a_local_model_resolves_to_itself(llama: Path) -> None:
    assert resolve_model(str(llama)) == llama


def test_a_directory_without_tokenizer_says_so(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can load"):
        load_tokenizer(llama)


# --- directories that appear whole or not at all ----------------------------------------------------------------------


def test_an_atomic_directory_appears_at_the_end_and_replaces_the_old_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic_directory(tmp_path / "deep" / "out", replace=True) as partial:
            (partial / content).write_text(content)
            assert not (tmp_path / "deep" / "out" / content).exists()
        assert [file.name for file in (tmp_path / "deep" / "out").iterdir()] == [content]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_directory_and_no_part_of_the_new(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(error), atomic_directory(tmp_path / "out", replace=True) as partial:
        (partial / "new").write_text("new")
        raise error
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "old"]


def test_a_directory_that_holds_something_is_only_replaced_when_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "first").write_text("first")
    with (
        pytest.raises(RunError, match="out exists and is not empty; remove it, or choose another --out"),
        atomic_directory(tmp_path / "out"),
    ):
        pass
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "first"]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_text("half")
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "new").write_text("new")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize(
    ("out", "message"),
    [("file", "file is a file; the output must be a directory"), ("file/out", "cannot write .*/file/out")],
)
def test_an_output_that_is_or_lies_under_a_file_is_refused(tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "file").write_text("keep")
    with pytest.raises(RunError, match=message), atomic_directory(tmp_path / out):
        pass
    assert (tmp_path / "file").read_text() == "keep"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"cannot write .*/out: No space left on device; free some space") as raised,
        atomic_directory(tmp_path / "out") as partial,
    ):
        (partial / "model.safetensors").symlink_to("/dev/full")
        copy(open_checkpoint(llama), partial)
    assert isinstance(raised.value.__cause__, OSError) and raised.value.__cause__.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "record.json", {"a": {1, 2}})
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": 1}


def test_digests_are_read_once_and_again_after_a_change(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    cache: dict[str, Any] = {}
    before = digest_files([tmp_path / "a"], cache)
    remembered = json.loads(json.dumps(cache))
    assert digest_files([tmp_path / "a"], remembered) == before and remembered == cache
    shutil.copyfile(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").write_text("two, longer")
    assert digest_files([tmp_path / "a"], cache) != before
