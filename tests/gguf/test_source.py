"""A GGUF file as a model: config, tensors, logits and tokens of the file, and what is refused."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as BlockType
from test_file import HARD_TEXT, LONG, OF_LAYERS, YARN, float32_file
from torch.nn.functional import kl_div

import minitron
from minitron.calibration.collect import measure_statistics
from minitron.core.errors import CheckpointError, GgufError, MinitronError
from minitron.gguf.file import describe_gguf, plain_types, write_gguf
from minitron.gguf.llama_cpp import Runtime
from minitron.gguf.reader import inspect_gguf, read_gguf
from minitron.gguf.source import model_directory
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint
from minitron.model.hub import transformers_config
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.model.weight_files import model_files
from minitron.pruning.cut import cut

# Variant of tests/helpers/tiny.py, what is changed, and the keys of the config that a file cannot tell.
READ: list[tuple[str, dict[str, Any], set[str]]] = [
    *((name, {}, set()) for name in ("llama", "llama-tied", "llama-biases", "llama-head_dim", "llama-rope")),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, set()),
    ("mistral", {}, {"model_type", "sliding_window", "attention_bias", "mlp_bias", "pretraining_tp"}),
    ("mistral-head_dim", {}, set()),
    ("nemotron", {"head_dim": 4}, set()),
    ("nemotron-biases", {}, set()),
    ("qwen2", {"use_sliding_window": False}, {"max_window_layers", "head_dim"}),
    ("qwen3", {}, {"max_window_layers"}),
    ("qwen3", {"rope_parameters": YARN}, {"max_window_layers"}),
    ("gemma", {}, set()),
    ("gemma2", {"query_pre_attn_scalar": 6}, set()),
    ("gemma3", {"query_pre_attn_scalar": 6}, {"_sliding_window_pattern", "sliding_window_pattern"}),
    (
        "gemma3",
        {"rope_parameters": OF_LAYERS, "query_pre_attn_scalar": 6},
        {"_sliding_window_pattern", "sliding_window_pattern"},
    ),
    ("phi3", {}, {"head_dim"}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}, {"head_dim"}),
    ("smollm3", {"no_rope_layer_interval": 4}, {"head_dim"}),
    ("olmo2", {}, {"head_dim"}),
    ("granite", {}, {"head_dim"}),
]
# Of no effect, or not of the model: transformers' versions, the source's dtype and training.
OF_NO_INTEREST = {"transformers_version", "initializer_range", "dtype", "_name_or_path", "architectures", "use_cache"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "gguf"


def written(path: Path, kind: BlockType) -> Path:
    """A file of a checkpoint whose matrices are of a type that the gguf package can quantize."""
    model = describe_gguf(open_checkpoint(path))

    def encode(_: Any, rows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(gguf.quants.quantize(rows.numpy(), kind)).flatten()

    write_gguf(model, path / f"{kind.name}.gguf", plain_types(model, kind), keys={}, encode=encode)
    return path / f"{kind.name}.gguf"


def read(file: Path) -> Checkpoint:
    return open_checkpoint(model_directory(str(file)))


def settled(path: Path) -> dict[str, Any]:
    """The config as transformers sees it, with tokens that no file without a tokenizer tells."""
    said = transformers_config(open_checkpoint(path).config).to_dict()
    return {key: value for key, value in said.items() if key not in OF_NO_INTEREST and not key.endswith("_token_id")}


@pytest.mark.parametrize(("variant", "changes", "untold"), READ, ids=[f"{name}{[*had]}" for name, had, _ in READ])
def test_a_file_says_the_model_that_it_was_written_from(
    variant: str, changes: dict[str, Any], untold: set[str], tmp_path: Path
) -> None:
    path = tiny.checkpoint(variant, tmp_path / "model", **changes)
    made = read(float32_file(path)[0])
    old, new = settled(path), settled(made.path)
    assert {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} <= untold
    own = tiny.tensors(path)
    assert own.keys() >= made.stored.keys()
    for name in made.stored:
        if made.architecture.norm_gain_offset and name.endswith("norm.weight"):
            torch.testing.assert_close(made.read(name), own[name], atol=1.2e-7, rtol=0)  # one was added, and taken off
        else:
            assert torch.equal(made.read(name), own[name]), name
    tokens = tiny.tokens(2, 20)
    loaded = tiny.logits(load_model(made.path, torch.float32), tokens)
    torch.testing.assert_close(loaded, tiny.logits(tiny.model(path), tokens), atol=2e-6, rtol=1e-5)


def test_a_scale_of_queries_that_llama_cpp_has_not_is_in_the_weights(tmp_path: Path) -> None:
    path, tokens = tiny.checkpoint("gemma2", tmp_path / "model"), tiny.tokens(2, 20)
    made = read(float32_file(path)[0])
    assert made.config["query_pre_attn_scalar"] == 6 != tiny.model(path).config.query_pre_attn_scalar
    torch.testing.assert_close(
        tiny.logits(load_model(made.path, torch.float32), tokens),
        tiny.logits(tiny.model(path), tokens),
        atol=2e-5,
        rtol=1e-5,
    )


def test_a_tied_model_whose_file_repeats_the_embedding_is_tied(tmp_path: Path) -> None:
    path = tiny.checkpoint("olmo2", tmp_path / "model", tie_word_embeddings=True)
    made = read(float32_file(path)[0])
    assert made.config["tie_word_embeddings"] and "lm_head.weight" not in made.stored


@pytest.mark.parametrize(
    ("bounds", "found"),
    [((1.0, 4.0, 64), (1.0, 4.0, 64)), ((1.0, 16.0, 128), (1.0, 16.0, 128)), ((2.0, 6.0, 128), (1.0, 3.0, 64))],
)
def test_bounds_of_llama_3s_rule_are_told_from_its_factors(
    bounds: tuple[float, float, int], found: tuple[float, float, int], tmp_path: Path
) -> None:
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rule = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, **dict(zip(names, bounds, strict=True))}
    path = tiny.checkpoint("llama", tmp_path / "model", head_dim=32, rope_parameters=rule)
    made = read(float32_file(path)[0])
    assert tuple(made.config["rope_parameters"][name] for name in names) == found
    tokens = tiny.tokens(1, 20)
    torch.testing.assert_close(
        tiny.logits(load_model(made.path, torch.float32), tokens),
        tiny.logits(tiny.model(path), tokens),
        atol=2e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("kind", [BlockType.F16, BlockType.BF16, BlockType.Q8_0, BlockType.Q4_1])
def test_rows_are_the_gguf_packages_dequantization_of_the_file(kind: BlockType, tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model", hidden_size=32, intermediate_size=64)
    file = written(path, kind)
    made, stored = read(file), {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert made.dtype == torch.float32 and made.written_dtype == torch.bfloat16
    for own, name in {"embed_tokens": "token_embd", "layers.1.mlp.down_proj": "blk.1.ffn_down"}.items():
        wanted = gguf.quants.dequantize(stored[f"{name}.weight"].data.copy(), stored[f"{name}.weight"].tensor_type)
        assert torch.equal(made.read(f"model.{own}.weight"), torch.from_numpy(wanted))
        assert torch.equal(made.read_rows(f"model.{own}.weight", 3, 9), torch.from_numpy(wanted[3:9]))
    queries = "model.layers.2.self_attn.k_proj.weight"
    assert torch.equal(made.read_rows(queries, 3, 9), made.read(queries)[3:9])
    with Runtime(file, context=64, threads=1, exact=True) as runtime:
        ids = tiny.tokens(1, 60)[0]
        found, wanted = runtime.logits(ids), tiny.logits(load_model(made.path, torch.float32), ids[None])[0]
    kl = kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    assert kl < (1e-4 if kind in (BlockType.F16, BlockType.BF16) else 2e-2)  # llama.cpp rounds states for the others


def test_a_tensor_of_many_chunks_is_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = read(written(tiny.checkpoint("phi3", tmp_path / "model"), BlockType.BF16))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    whole = made.read(name)
    monkeypatch.setattr("minitron.model.gguf_weights.CHUNK_BYTES", 500)
    assert torch.equal(made.read(name), whole)


@pytest.mark.parametrize("kind", [BlockType.F32, BlockType.F16])
def test_what_is_cut_from_a_file_is_cut_from_its_values(kind: BlockType, tmp_path: Path) -> None:
    path = tiny.checkpoint("gemma2", tmp_path / "model", query_pre_attn_scalar=6)
    teacher = read(written(path, kind))
    plan = tiny.plan(teacher.shape, ffn=24, layers=3)
    (tmp_path / "student").mkdir()
    cut(teacher, plan, tmp_path / "student")
    name, dtype = "model.layers.0.mlp.up_proj.weight", torch.float32 if kind == BlockType.F32 else torch.bfloat16
    own = tiny.tensors(tmp_path / "student")[name]
    assert own.dtype == dtype == open_checkpoint(tmp_path / "student").dtype
    source = teacher.read(f"model.layers.{plan.layers[0]}.mlp.up_proj.weight")
    assert torch.equal(own, source[list(plan.ffn[0])].to(dtype))
    assert json.loads((tmp_path / "student" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_streamed_file_has_the_statistics_of_its_checkpoint(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama-rope", tmp_path / "model")
    samples = Samples(tiny.tokens(4, 16))
    old = measure_statistics(open_checkpoint(path), samples, Pass(torch.float32))
    new = measure_statistics(read(float32_file(path)[0]), samples, Pass(torch.float32))
    assert new.model == old.model and all(torch.equal(new.sums[site], sums) for site, sums in old.sums.items())


def test_the_tokenizer_of_a_file_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model")
    tiny.tokenizer(path, adds_bos=True)
    template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    old, new = open_checkpoint(path).tokenizer, read(float32_file(path)[0]).tokenizer
    texts = [HARD_TEXT, " lead", "a<s>b</s>", "  \n\n 12345 naïve 漢字 🙂", "x [PAD310] y", ""]
    assert [new(text).input_ids for text in texts] == [old(text).input_ids for text in texts]
    assert len(new) == len(old) < 320 and new.chat_template == template
    assert (new.bos_token_id, new.eos_token_id) == (old.bos_token_id, old.eos_token_id)


def test_a_directory_is_made_once_and_again_when_the_file_changes(tmp_path: Path, cache: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model")
    file = float32_file(path)[0]
    first = model_directory(str(file))
    before = (first / "config.json").stat().st_mtime_ns
    assert model_directory(str(file)) == first and (first / "config.json").stat().st_mtime_ns == before
    assert first.name == "model" and list(cache.iterdir()) == [first.parent]
    assert {file, first / "config.json"} <= set(model_files(first))
    opened = open_checkpoint(first)
    os.utime(file, ns=(1, 1))
    with pytest.raises(
        CheckpointError, match=r"model.gguf: cannot read tensor token_embd.weight: the file was changed"
    ):
        opened.read("model.embed_tokens.weight")
    with pytest.raises(CheckpointError, match=r"model.gguf was changed after it was opened: give the GGUF file again"):
        open_checkpoint(first)
    assert read(file).path != first


def parts(file: Path, count: int) -> list[Path]:
    """A file in parts, as llama.cpp's tool splits it: all keys are in the first."""
    reader, names = gguf.GGUFReader(file), []
    for number in range(count):
        names.append(file.with_name(f"{file.stem}-{number + 1:05d}-of-{count:05d}.gguf"))
        writer = gguf.GGUFWriter(names[-1], "llama")
        if number:
            writer.kv_data[0].pop("general.architecture")
        else:
            for name, field in reader.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    kind = field.types[0]
                    inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(name, field.contents(), kind, sub_type=inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names


def test_parts_are_one_model_by_whichever_is_given(tmp_path: Path) -> None:
    file = float32_file(tiny.checkpoint("llama", tmp_path / "model"))[0]
    whole, names = read(file), parts(file, 3)
    joined = read(names[1])
    assert (
        joined.stored.keys() == whole.stored.keys()
        and len(model_files(joined.path)) == 3 + len(model_files(whole.path)) - 1
    )
    assert all(torch.equal(joined.read(name), whole.read(name)) for name in whole.stored)
    assert inspect_gguf(names[2]).weights == inspect_gguf(file).weights
    with pytest.raises(GgufError, match="is one of 3 parts of a model: join them"):
        read_gguf(names[0])
    names[2].unlink()
    with pytest.raises(GgufError, match=r"beside it model-00003-of-00003.gguf is missing: download all parts"):
        read(names[0])
    with pytest.raises(GgufError, match=r"but has not the name of one \(name-00001-of-00003.gguf\)"):
        read(names[0].rename(tmp_path / "first.gguf"))


def test_parts_behind_links_of_other_names_are_found(tmp_path: Path) -> None:
    """As in the hub's cache, where a file's content has its digest for a name."""
    file = float32_file(tiny.checkpoint("llama", tmp_path / "model"))[0]
    whole, names = read(file), parts(file, 2)
    (tmp_path / "blobs").mkdir()
    for number, name in enumerate(names):
        name.symlink_to(name.rename(tmp_path / "blobs" / f"{number}c0ffee"))
    linked = read(names[1])
    assert all(torch.equal(linked.read(name), whole.read(name)) for name in whole.stored)
    (tmp_path / "blobs" / "0c0ffee").unlink()
    with pytest.raises(GgufError, match=r"beside it model-00001-of-00002.gguf is missing: download all parts"):
        read(names[1])


def rewritten(file: Path, *, without: str = "", **keys: Any) -> Path:
    """The file with some keys changed (their dots are two underscores), and without a tensor."""
    reader, out = gguf.GGUFReader(file), file.with_name("changed.gguf")
    said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    said |= {name.replace("__", "."): value for name, value in keys.items()}
    writer = gguf.GGUFWriter(out, said.pop("general.architecture"))
    for name, value in said.items():
        adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        adders.get(type(value), writer.add_array)(name, value)
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    if without == "more":
        writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(8, dtype=np.float32))
    if without == "whole":
        writer.add_tensor("position_embd.weight", np.zeros((2, 32), dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general__architecture": "mamba"}, "is a mamba model, which cannot be pruned here; files of gemma, gemma2,"),
        ({"llama__expert_count": 8}, "is a mixture of 8 experts"),
        ({"llama__attention__sinks": 4}, "its llama.attention.sinks is 4, a key that is not known here"),
        ({"llama__block_count": 5}, "lacks 9 tensors of a llama model: blk.4.attn_norm.weight, blk.4.attn_q.weight, "),
        ({"without": "blk.2.ffn_up.weight"}, "lacks 1 tensors of a llama model: blk.2.ffn_up.weight"),
        ({"without": "token_embd.weight"}, "lacks token_embd.weight, the embedding"),
        ({"llama__block_count": 4_000_000}, "its llama.block_count is 4000000, and the file has 39 tensors in all"),
        ({"tokenizer__ggml__eos_token_id": 320}, "eos_token_id is 320; it must be one of its 320 tokens"),
        ({"without": "more"}, "has 1 tensors that no llama model has here: blk.0.attn_sinks.weight"),
        ({"llama__feed_forward_length": 44}, r"is damaged: its blk.0.ffn_gate.weight is \[40, 32\], but .* \[44, 32\]"),
        ({"llama__feed_forward_length": [40, 40, 24, 24]}, r"feed_forward_length differs between layers \(24 or 40\)"),
        ({"llama__rope__dimension_count": 2}, "rope.dimension_count is 2, but the heads of a llama model turn whole"),
        ({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__attn_factor": 2.0}, "known here for longrope"),
        ({"llama__rope__scaling__type": "su"}, "rope.scaling.type is 'su', which is no rule"),
        ({"llama__attention__layer_norm_rms_epsilon": "small"}, "rms_epsilon is 'small'; it must be a number"),
        ({"llama__attention__head_count_kv": 3}, "8 heads cannot share 3 kv_heads"),
        ({"tokenizer__ggml__model": "t5"}, "has a tokenizer of kind 't5' with the splitting rule"),
        ({"tokenizer__ggml__pre": "mine"}, "with the splitting rule 'mine', which is not known here"),
        ({"tokenizer__ggml__merges": ["q z"]}, r"is damaged: it merges \('q', 'z'\), which are none of its tokens"),
        ({"tokenizer__chat_template": 3}, "is damaged: its tokenizer.chat_template is 3"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_nothing_is_left(
    changes: dict[str, Any], words: str, tmp_path: Path, cache: Path
) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model")
    tiny.tokenizer(path)
    file = rewritten(float32_file(path)[0], **changes)
    with pytest.raises(GgufError, match=words) as caught:
        model_directory(str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value) and "making" not in str(caught.value)
    assert not list(cache.iterdir())
    if changes.keys().isdisjoint({"general__architecture", "tokenizer__chat_template"}):
        assert minitron.inspect(file).obstacle == str(caught.value)


def test_a_damaged_file_and_a_type_that_nobody_knows_are_named(tmp_path: Path) -> None:
    file = float32_file(tiny.checkpoint("llama", tmp_path / "model"))[0]
    content = file.read_bytes()
    for size in (30, 1000, len(content) // 2, len(content) - 64):
        file.write_bytes(content[:size])
        with pytest.raises(GgufError, match=r"model.gguf is damaged or cut short: it(s tensor \S+)? (ends|says)"):
            model_directory(str(file))
    place = content.index(b"blk.1.ffn_down.weight") + len(b"blk.1.ffn_down.weight") + 4 + 2 * 8
    for number, words in ((99, "is of type 99, which the gguf package does not know"), (26, "I32, which the gguf")):
        file.write_bytes(content[:place] + struct.pack("<I", number) + content[place + 4 :] + bytes(1 << 16))
        with pytest.raises(GgufError, match=rf"blk.1.ffn_down.weight .*{words}"):
            model_directory(str(file))


def test_tensors_that_do_not_follow_each_other_are_named(tmp_path: Path) -> None:
    file = float32_file(tiny.checkpoint("llama", tmp_path / "model"))[0]
    content, name = file.read_bytes(), b"blk.1.ffn_down.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8
    file.write_bytes(content[:place] + struct.pack("<I", BlockType.F16) + content[place + 4 :])
    with pytest.raises(GgufError, match=r"its tensor blk.1\S+ begins at byte [\d,]+, but by those before at [\d,]+"):
        model_directory(str(file))
    file.write_bytes(content.replace(name, b"blk.2.ffn_down.weight", 1))
    with pytest.raises(GgufError, match=r"it has a tensor blk.2.ffn_down.weight twice"):
        model_directory(str(file))


def test_a_revision_and_an_empty_name_of_the_cache_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GgufError, match=r"--revision main is of a hub id, and .*x.gguf is a file: leave it out"):
        model_directory(str(tmp_path / "x.gguf"), "main")
    with pytest.raises(GgufError, match=r"x.gguf does not exist"):
        model_directory(str(tmp_path / "x.gguf"))
    shutil.copy(float32_file(tiny.checkpoint("llama", tmp_path / "model"))[0], tmp_path / "x.gguf")
    monkeypatch.setenv("MINITRON_CACHE", "")
    with pytest.raises(MinitronError, match="MINITRON_CACHE is empty"):
        model_directory(str(tmp_path / "x.gguf"))
