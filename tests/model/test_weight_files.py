"""A tensor has one place: what is loaded in memory is what is streamed, and two readings of a directory are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from directories import EMBEDDING, HEAD, change_config, change_tensors, copy
from safetensors.torch import load_file, save_file

from minitron import api
from minitron.core.errors import CheckpointError
from minitron.model.checkpoint import load_model, open_checkpoint
from minitron.model.describe import Description
from minitron.model.likelihood import Scored, score_tokens
from minitron.model.samples import Samples
from minitron.model.stream import Pass, Stream
from minitron.model.weight_files import SINGLE, WEIGHT_INDEX, carried_files, has_weights, model_files, weight_files

NORM = "model.norm.weight"


def described(path: Path) -> Description:
    found = api.inspect(path)
    assert isinstance(found, api.Inspected)
    return found.description


def streamed_log_likelihood(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of every token but the first of each sample, in the checkpoint's own dtype."""
    checkpoint = open_checkpoint(path)
    flow = Stream(checkpoint, Samples(tokens), Pass(checkpoint.dtype, batch=2))
    flow.embed()
    for index, layer in flow.layers():
        for _ in flow.run(index, layer):
            pass
    samples, places = torch.meshgrid(torch.arange(len(tokens)), torch.arange(tokens.shape[1] - 1), indexing="ij")
    scored = Scored(samples.flatten(), places.flatten(), tokens[:, 1:].flatten())
    return score_tokens(flow, [flow.states], scored)[0][0]


def log_likelihood_in_memory(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    logits = tiny.logits(load_model(path), tokens).double()[:, :-1]
    return logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).flatten()


def shards(path: Path, change: float = 0.0) -> Path:
    """The same weights, with something added, in two shards and their index beside what is there."""
    tensors = {name: tensor + change for name, tensor in tiny.tensors(path).items()}
    names = sorted(tensors)
    files = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, path / file, {"format": "pt"})
    write_index(path, {name: file for file, part in files.items() for name in part})
    return path


def write_index(path: Path, weight_map: Any) -> None:
    (path / WEIGHT_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


# --- one truth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["float32", "bfloat16", None, "float8_e4m3fn"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "phi3", "gemma3"])
def test_what_is_loaded_in_memory_is_what_is_streamed_whatever_dtype_the_config_says(
    tmp_path: Path, variant: str, said: str | None
) -> None:
    path = tiny.checkpoint(variant, tmp_path / "model")
    change_config(path, dtype=said, torch_dtype=said)
    tokens = tiny.tokens(3, 9)
    expected = tiny.tensors(path)
    in_memory = load_model(path).state_dict()
    assert all(torch.equal(in_memory[name], tensor) for name, tensor in expected.items())
    assert all(in_memory[name].dtype == tensor.dtype for name, tensor in expected.items())
    torch.testing.assert_close(
        streamed_log_likelihood(path, tokens), log_likelihood_in_memory(path, tokens), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("wide", [[NORM], [HEAD], ["model.layers.0.mlp.up_proj.weight"]])
def test_a_model_of_mixed_dtypes_runs_in_its_embeddings_in_memory_and_streamed(tmp_path: Path, wide: list[str]) -> None:
    path = tiny.checkpoint("llama-bfloat16", tmp_path / "model")
    change_tensors(path, **{name: tiny.tensors(path)[name].float() * 1.0001 for name in wide})
    assert {parameter.dtype for parameter in load_model(path).parameters()} == {torch.bfloat16}
    tokens = tiny.tokens(3, 9)
    torch.testing.assert_close(
        streamed_log_likelihood(path, tokens), log_likelihood_in_memory(path, tokens), atol=0.02, rtol=0.02
    )
    assert described(path).dtype == "bfloat16"


@pytest.mark.parametrize("read", [load_model, lambda path: streamed_log_likelihood(path, tiny.tokens(1, 4))])
def test_a_value_that_float16_cannot_hold_is_named(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    path = tiny.checkpoint("llama", tmp_path / "model", dtype=torch.float16)
    change_tensors(path, **{"model.layers.1.input_layernorm.weight": torch.full((32,), 1e6)})
    with pytest.raises(CheckpointError, match=r"layers.1.input_layernorm.weight holds values beyond 65,504"):
        read(path)


@pytest.mark.parametrize("keys", [{"dtype": "float32"}, {"torch_dtype": "float16", "dtype": None}, {"dtype": None}])
def test_a_written_config_says_the_dtype_that_is_stored(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = tiny.checkpoint("llama-bfloat16", tmp_path / "model")
    change_config(path, **keys)
    out = copy(open_checkpoint(path), tmp_path / "copy")
    said = json.loads((out / "config.json").read_text())
    assert {said[key] for key in ("dtype", "torch_dtype") if key in said} == {"bfloat16"}


def test_without_weights_a_dtype_that_the_config_leaves_out_is_assumed_and_said(model: Path) -> None:
    (model / SINGLE).unlink()
    change_config(model, dtype=None)
    said = described(model)
    assert (said.dtype, said.dtype_assumed) == ("float32", True)
    change_config(model, dtype="bfloat16")
    assert (described(model).dtype, described(model).dtype_assumed) == ("bfloat16", False)


def test_no_weight_is_ever_filled_in_at_random(model: Path) -> None:
    change_tensors(model, **{"model.layers.2.mlp.up_proj.weight": None})
    for read in (open_checkpoint, load_model):
        with pytest.raises(CheckpointError, match=r"1 are missing in .*, first model.layers.2.mlp.up_proj.weight"):
            read(model)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda name: name.removeprefix("model."),
            r"have no prefix \(embed_tokens.weight\), but those of a llama model",
        ),
        (
            lambda name: f"language_model.{name}",
            r"have the prefix 'language_model.model.' \(language_model.model.embed",
        ),
        (lambda name: f"_orig_mod.{name}", r"the prefix '_orig_mod.model.'"),
        (lambda name: f"base_model.model.{name}", r"the prefix 'base_model.model.model.'"),
        (lambda name: name.replace("model.", "model.language_model."), "the prefix 'model.language_model.'"),
        (
            lambda name: name.replace("embed_tokens", "wte"),
            r"1 are missing in .* \(stored are names such as lm_head.weight",
        ),
    ],
)
def test_tensors_under_another_prefix_are_refused_with_both_prefixes(
    model: Path, rename: Callable[[str], str], message: str
) -> None:
    save_file({rename(name): tensor for name, tensor in tiny.tensors(model).items()}, model / SINGLE)
    for read in (open_checkpoint, load_model):
        with pytest.raises(CheckpointError, match=message):
            read(model)


# --- which files are the weights -------------------------------------------------------------------------------------


def test_a_single_file_beside_an_index_with_shards_is_refused_with_both_named(model: Path) -> None:
    shards(model, change=0.5)
    message = r"holds two models: model.safetensors, and model.safetensors.index.json with 2 of its 2 shards .*: remove"
    for read in (open_checkpoint, load_model):
        with pytest.raises(CheckpointError, match=message):
            read(model)
    (model / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="with 1 of its 2 shards"):
        open_checkpoint(model)


def test_a_single_file_beside_an_index_of_shards_that_are_gone_is_the_model(model: Path, llama: Path) -> None:
    write_index(model, {EMBEDDING: "model-00001-of-00002.safetensors"})
    assert weight_files(model) == [model / SINGLE]
    assert torch.equal(load_model(model).model.norm.weight, tiny.tensors(llama)[NORM])
    assert torch.equal(tiny.model(model).model.norm.weight, tiny.tensors(llama)[NORM])  # transformers reads it too


def test_an_index_of_the_single_file_is_no_second_model(model: Path) -> None:
    write_index(model, dict.fromkeys(tiny.tensors(model), SINGLE))
    assert weight_files(model) == [model / SINGLE] and open_checkpoint(model)


def test_a_tensor_in_two_shards_must_be_the_same(model: Path) -> None:
    shards(model)
    (model / SINGLE).unlink()
    other = model / "model-00001-of-00002.safetensors"
    embedding = tiny.tensors(model)[EMBEDDING]
    for second in (embedding.clone(), embedding * 2, embedding.bfloat16(), embedding[:-1].clone()):
        save_file({**load_file(other), EMBEDDING: second}, other)
        save_file({**load_file(model / "model-00002-of-00002.safetensors"), EMBEDDING: embedding}, other.parent / "x")
        (other.parent / "x").rename(model / "model-00002-of-00002.safetensors")
        if second.dtype == embedding.dtype and torch.equal(second, embedding):
            assert torch.equal(load_model(model).model.embed_tokens.weight, embedding)
            continue
        with pytest.raises(CheckpointError, match=rf"stores {EMBEDDING} twice with different values, in .*1-of-.*2-of"):
            open_checkpoint(model)


def test_an_index_that_names_the_wrong_shard_is_refused(model: Path) -> None:
    shards(model)
    (model / SINGLE).unlink()
    said = json.loads((model / WEIGHT_INDEX).read_text())["weight_map"]
    swap = {"model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors"}
    write_index(model, said | {EMBEDDING: swap.get(said[EMBEDDING], "model-00001-of-00002.safetensors")})
    with pytest.raises(CheckpointError, match=f"says that {EMBEDDING} lies in model-.*, but it lies in model-"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "pytorch_model.bin", "", "."]
)
def test_an_index_names_files_of_its_own_directory_only(model: Path, file: str) -> None:
    (model / SINGLE).rename(model.parent / "other.safetensors")
    write_index(model, dict.fromkeys(tiny.tensors(model.parent), file))
    with pytest.raises(
        CheckpointError, match=r"names '.*': a shard is a .safetensors file in the model's own directory"
    ):
        open_checkpoint(model)


@pytest.mark.parametrize("said", ["[]", "null", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_of_files_is_refused(model: Path, said: str) -> None:
    (model / WEIGHT_INDEX).write_text(said)
    with pytest.raises(CheckpointError, match="is not a safetensors index: it has no weight_map"):
        open_checkpoint(model)


def test_other_files_of_weights_are_not_read(model: Path, llama: Path) -> None:
    save_file({"output.weight": torch.zeros(3)}, model / "consolidated.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"no pickle")
    assert weight_files(model) == [model / SINGLE]
    assert {file.name for file in model_files(model)} == {"config.json", SINGLE, "generation_config.json"}
    assert torch.equal(load_model(model).model.norm.weight, tiny.tensors(llama)[NORM])


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model-00001-of-00001.safetensors"])
def test_weights_that_are_neither_the_single_file_nor_in_an_index_are_named(model: Path, name: str) -> None:
    (model / SINGLE).rename(model / name)
    with pytest.raises(CheckpointError, match=f"no weights that can be told: .*, but {name}: shards need their index"):
        open_checkpoint(model)


def test_an_adapter_is_named_with_its_base_model(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"holds a whole model \(model.safetensors\) and an adapter"):
        load_model(model)
    (model / SINGLE).rename(model / "adapter_model.safetensors")
    message = "is an adapter, LoRA or alike .* merge it into its base model some/base first"
    for _ in range(2):
        assert has_weights(model)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(model)
        (model / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name", [SINGLE, WEIGHT_INDEX, "config.json", "tokenizer.json"])
def test_a_link_to_a_file_that_is_gone_is_named(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../../blobs/1f3a")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to ../../blobs/1f3a, which does not exist"):
        api.inspect(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [(SINGLE, "is not a file, so it holds no weights"), ("config.json", "cannot read .*config.json")],
)
def test_a_directory_in_the_place_of_a_file_is_named(model: Path, name: str, message: str) -> None:
    (model / name).unlink()
    (model / name).mkdir()
    with pytest.raises(CheckpointError, match=message):
        api.inspect(model)


# --- headers ---------------------------------------------------------------------------------------------------------


def write_header(path: Path, entries: str | dict[str, Any], data: int) -> None:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    (path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


def entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[Any, str]] = {
    "a name twice": ('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2), "says 'a' twice"),
    "tensors over each other": ({"a": entry(), "b": entry(begin=4, end=12)}, "a and b lie over each other"),
    "one tensor in another": ({"a": entry(), "b": entry((1,), 0, 4)}, "lie over each other"),
    "a shape of switches": ({"a": entry((True, 2))}, "shape and data_offsets of a must be lists of integers from 0"),
    "a shape of fractions": ({"a": entry((2.0,))}, "shape and data_offsets of a must be lists"),
    "a negative shape": ({"a": entry((-1, -2))}, "shape and data_offsets of a must be lists"),
    "a shape of text": ({"a": entry("2")}, "shape and data_offsets of a must be lists"),
    "a shape beyond all memory": ({"a": entry((2**63, 0), 0, 0)}, "shape and data_offsets of a must be lists"),
    "a size beyond the file": ({"a": entry((2**40,), 0, 2**42)}, "is truncated"),
    "offsets in reverse": ({"a": entry((2,), 8, 0)}, "takes -8 bytes"),
    "offsets before the file": ({"a": entry((2,), -8, 0)}, "must be lists of integers from 0"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "must be a begin and an end"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "a has no dtype"),
    "dtype a list": ({"a": entry(dtype=["F32"])}, "a has no dtype"),
    "an unknown dtype": ({"a": entry(dtype="F64", shape=(1,))}, "a is stored as F64; supported are F32, F16, BF16"),
    "deep": ("[" * 100_000, "its brackets are nested too deeply"),
    "a number of many digits": ('{"a": 1%s}' % ("0" * 5000), "no JSON that can be read"),
    "no tensors": ({"__metadata__": {"format": "pt"}}, "is too long: "),
}


@pytest.mark.parametrize(("entries", "message"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_not_one_table_of_tensors_is_one_line(model: Path, entries: Any, message: str) -> None:
    write_header(model, entries, 12 if "other" in message else 8)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(model)
    assert "\n" not in str(raised.value) and str(model / SINGLE) in str(raised.value)


def test_a_file_without_tensors_and_a_number_of_layers_beyond_all_reason_are_named(model: Path) -> None:
    change_config(model, num_hidden_layers=2_000_000_000)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 2000000000, but only 39 tensors are stored"):
        open_checkpoint(model)
    write_header(model, {}, 0)
    with pytest.raises(CheckpointError, match="but only 0 tensors are stored"):
        open_checkpoint(model)


# --- what is written -------------------------------------------------------------------------------------------------


def test_what_is_written_names_no_code_and_the_rest_keeps_its_bits(model: Path, tmp_path: Path) -> None:
    code = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
    change_config(model, auto_map=code, custom_pipelines={"p": {"impl": "own.P"}})
    said = {"auto_map": code, "custom_generate": "own", "chat": "漢字", "temperature": 0.5}
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        (model / name).write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
    (model / "vocab.json").write_text('{"auto_map": 7,   "b": 8}')
    (model / "tokenizer.json").write_text('{ "auto_map": 1}')
    for name in ("own.py", "tokenizer_own.py", "chat_template.py"):
        (model / name).write_text("raise SystemExit('run')")
    out = copy(open_checkpoint(model), tmp_path / "out")
    assert not list(out.glob("*.py"))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        written = json.loads((out / name).read_text(encoding="utf-8"))
        assert not {"auto_map", "custom_pipelines", "custom_generate"} & written.keys()
        assert name == "config.json" or written == {"chat": "漢字", "temperature": 0.5}
    assert all((out / name).read_bytes() == (model / name).read_bytes() for name in ("vocab.json", "tokenizer.json"))


def test_code_beside_a_model_is_neither_run_nor_asked_about(model: Path, llama: Path) -> None:
    change_config(model, auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (model / "own.py").write_text("raise SystemExit('run')")
    tokens = tiny.tokens(1, 6)
    assert torch.equal(tiny.logits(load_model(model), tokens), tiny.logits(tiny.model(llama), tokens))


def test_links_of_a_cache_are_carried_as_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"eos_token": "</s>"}')
    (model / "tokenizer_config.json").symlink_to(tmp_path / "blob")
    out = copy(open_checkpoint(model), tmp_path / "out")
    assert not (out / "tokenizer_config.json").is_symlink()
    assert (out / "tokenizer_config.json").read_bytes() == (tmp_path / "blob").read_bytes()
    assert model / "tokenizer_config.json" in carried_files(model)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_a_carried_file_that_is_no_json_is_named_before_any_work(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(model)
