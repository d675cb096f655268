"""GGUF files against transformers: what llama.cpp computes from them, how it splits text, and what is refused."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as BlockType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from minitron.core.errors import CheckpointError, GgufError
from minitron.gguf import model_config
from minitron.gguf.file import describe_gguf, file_bytes, plain_types, write_gguf
from minitron.gguf.llama_cpp import Runtime
from minitron.gguf.reader import is_gguf, read_gguf, require_language_model
from minitron.gguf.tokenizer import SPLITTING_RULES, file_tokenizer
from minitron.gguf.verify import HARD_TEXT, llama_cpp_logits, logits_of
from minitron.model.checkpoint import load_tokenizer, open_checkpoint
from minitron.model.families import FAMILIES
from minitron.model.hub import transformers_config
from minitron.model.quality_sums import QualitySums, perplexity_of
from minitron.model.samples import Batch, Separator
from minitron.model.tokens import prompt_ids

TOKENS = 240
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "long_factor": [1.5, 2.0],
    "short_factor": [1.0, 1.1],
}
OF_LAYERS = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# Variant of tests/helpers/tiny.py, and what is changed so that llama.cpp can have it, or to see another rule.
RUN: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("llama", "llama-tied", "llama-biases", "llama-head_dim", "llama-rope", "llama-bfloat16")),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    *((name, {}) for name in ("mistral", "mistral-head_dim")),
    ("nemotron", {"head_dim": 4}),
    ("nemotron-biases", {}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen3", {}),
    ("qwen3", {"rope_parameters": YARN}),
    *((name, {}) for name in ("gemma", "gemma2", "gemma3")),
    ("gemma3", {"rope_parameters": OF_LAYERS}),
    ("phi3", {}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    ("smollm3", {"no_rope_layer_interval": 4}),
    ("olmo2", {}),
    ("olmo2", {"tie_word_embeddings": True}),
    ("granite", {}),
    ("gemma", {"hidden_act": "gelu"}),  # which transformers takes for gelu_pytorch_tanh in this family
    ("gemma", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("gemma2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}),
    ("phi3", {"rope_parameters": LONG | {"factor": 3.0}, "original_max_position_embeddings": 16}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("nemotron", {}, "hidden=32 and heads\\*head_dim=8\\*6=48: it would not load. Cut to hidden=48"),
    ("gemma2-untied", {}, "takes the embedding of a gemma2 model for its output projection"),
    ("gemma2", {"attention_bias": True}, "has no place for model.layers.0.self_attn.o_proj.bias \\(4 tensors"),
    ("smollm3", {}, "no_rope_layers is \\[1, 0, 1, 0\\]"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but llama.cpp computes silu for llama models"),
    ("gemma", {"hidden_act": "gelu_python"}, "'gelu_python', but llama.cpp computes gelu_pytorch_tanh for gemma"),
    ("nemotron", {"head_dim": 4, "hidden_act": "relu"}, "'relu', but llama.cpp computes relu2"),
    ("gemma3", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None, but llama.cpp computes 50 where"),
    ("gemma2", {"final_logit_softcapping": None}, "computes 30 where a file says none"),
    ("gemma3", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping is 3.0, but llama.cpp computes None"),
    ("gemma3", {"use_bidirectional_attention": True}, "llama.cpp computes attention to earlier tokens alone"),
    ("qwen3", {"is_causal": False}, "is_causal is False, but llama.cpp computes attention to earlier tokens alone"),
    ("granite", {"residual_multiplier": 0.0}, "residual_multiplier is 0.0, but llama.cpp computes 1 where"),
    ("llama", {"rope_parameters": YARN | {"beta_fast": 8.0}}, "beta_fast of yarn is 8.0, but llama.cpp computes 32"),
    ("llama", {"rope_parameters": YARN | {"truncate": False}}, "truncate of yarn is False"),
    ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.0}}, "attention by the factor of scaling alone"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type is 'dynamic'",
    ),
    (
        "qwen2",
        {"rope_parameters": tiny.LLAMA3_ROPE},
        "rope_type is 'llama3', but llama.cpp computes no rule but default",
    ),
    (
        "gemma3",
        {"rope_parameters": {**OF_LAYERS, "sliding_attention": OF_LAYERS["full_attention"]}},
        "no scaling in layers",
    ),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers is \\[1, 1, 1, 1\\]"),
]


def float32_file(path: Path) -> tuple[Path, tuple[str, ...]]:
    """A checkpoint's GGUF file, and the notes on it."""
    model, file = describe_gguf(open_checkpoint(path)), path / "model.gguf"
    types = plain_types(model, BlockType.F32)
    write_gguf(model, file, types, keys={"general.file_type": 0})
    assert file.stat().st_size == file_bytes(model, types, {"general.file_type": 0})
    return file, model.notes


def compared(path: Path, count: int = TOKENS) -> tuple[tuple[str, ...], float]:
    """The notes, and the KL divergence of llama.cpp from transformers; both find the same tokens likeliest."""
    file, notes = float32_file(path)
    ids = tiny.tokens(1, count)[0]
    wanted = tiny.logits(tiny.model(path), ids[None])[0].log_softmax(-1)
    with Runtime(file, context=256, threads=1, exact=True) as runtime:
        found = runtime.logits(ids).log_softmax(-1)
    assert torch.equal(wanted.argmax(-1), found.argmax(-1))
    return notes, (wanted.exp() * (wanted - found)).sum(-1).mean().item()


@pytest.mark.parametrize(
    ("variant", "changes"), RUN, ids=lambda value: value if isinstance(value, str) else str([*value])
)
def test_llama_cpp_computes_what_transformers_does(variant: str, changes: dict[str, Any], tmp_path: Path) -> None:
    notes, kl = compared(tiny.checkpoint(variant, tmp_path, **changes))
    assert notes[-1] == "this model has no tokenizer: llama.cpp runs the file on token ids alone" and kl < 1e-6
    assert [note[:45] for note in notes[:-1]] == ["llama.cpp takes the rotary factors of long te"] * (
        variant == "phi3" and bool(changes)
    )


def test_a_cut_model_is_another_shape_of_the_same_family(tmp_path: Path) -> None:
    """Llama 3's rope scaling, and heads that do not fill hidden: the case that broke public files."""
    _, kl = compared(tiny.checkpoint("llama-rope", tmp_path, hidden_size=24, head_dim=8, num_attention_heads=8))
    assert kl < 1e-6


@pytest.mark.parametrize("variant", ["mistral-window", "qwen2"])
def test_without_a_window_the_file_says_a_context_up_to_which_it_is_the_same(variant: str, tmp_path: Path) -> None:
    notes, kl = compared(tiny.checkpoint(variant, tmp_path), count=5)
    assert kl < 1e-6 and "context of 5 tokens" in notes[0]
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields[f"{_name(variant)}.context_length"].contents() == 5


def _name(variant: str) -> str:
    return {"mistral-window": "llama"}.get(variant, variant)


@pytest.mark.parametrize(("variant", "changes", "words"), REFUSED, ids=[variant for variant, _, _ in REFUSED])
def test_what_llama_cpp_would_refuse_or_run_wrongly_is_refused_first(
    variant: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(GgufError, match=words):
        describe_gguf(open_checkpoint(tiny.checkpoint(variant, tmp_path, **changes)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_computes_with_has_its_place(family: str) -> None:
    """By the text of its own module: what a model is built from is not among the keys that change nothing."""
    from importlib import import_module

    name = {"gemma3_text": "gemma3"}.get(family, family)
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    read = set(re.findall(r"config\.([a-z]\w+)", Path(module.__file__).read_text()))
    assert read & model_config.WITHOUT_EFFECT <= {"pad_token_id", "attention_dropout", "resid_pdrop", "use_cache"}


def test_every_family_has_one_activation(tmp_path: Path) -> None:
    for family in FAMILIES:
        variant = {"gemma3_text": "gemma3"}.get(family, family)
        sizes: dict[str, Any] = {"head_dim": 4} if family == "nemotron" else {}
        sizes |= {"no_rope_layer_interval": 4} if family == "smollm3" else {}
        checkpoint = open_checkpoint(tiny.checkpoint(variant, tmp_path / family, **sizes))
        key = next(iter(checkpoint.architecture.gguf.computes))
        config = transformers_config(checkpoint.config)
        model_config.require_runnable(checkpoint, config)
        setattr(config, key, "tanh")
        with pytest.raises(GgufError, match=rf"{key} is 'tanh', but llama.cpp computes"):
            model_config.require_runnable(checkpoint, config)


@pytest.mark.parametrize(("kind", "dtype"), [(BlockType.F16, torch.float16), (BlockType.BF16, torch.bfloat16)])
def test_sixteen_bits_are_torchs(kind: BlockType, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny.checkpoint("llama-tied", tmp_path)
    model = describe_gguf(open_checkpoint(path))
    write_gguf(model, path / "16.gguf", plain_types(model, kind), keys={})
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path / "16.gguf").tensors}
    for tensor in model.tensors:
        wanted = torch.cat(list(model.runs(tensor)))
        read = torch.from_numpy(
            gguf.quants.dequantize(stored[tensor.name].data.copy(), stored[tensor.name].tensor_type)
        )
        assert torch.equal(read.view_as(wanted), wanted.to(dtype).float() if tensor.is_matrix else wanted)


def test_weights_beyond_sixteen_bits_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path)
    model = tiny.model(path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    model.save_pretrained(path)
    described = describe_gguf(open_checkpoint(path))
    with pytest.raises(GgufError, match=r"blk.1.ffn_up.weight has weights beyond 65,504"):
        write_gguf(described, path / "16.gguf", plain_types(described, BlockType.F16), keys={})
    assert not list(path.glob("*gguf*"))


def test_rows_come_in_runs_that_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = describe_gguf(open_checkpoint(tiny.checkpoint("llama", tmp_path)))
    whole = {tensor.name: torch.cat(list(model.runs(tensor))) for tensor in model.tensors}
    monkeypatch.setattr("minitron.gguf.file.CHUNK_BYTES", 1000)
    for tensor in model.tensors:
        runs = list(model.runs(tensor))
        assert torch.equal(torch.cat(runs), whole[tensor.name]) and (len(runs) > 1 or whole[tensor.name].numel() < 300)


def trained(core: Tokenizer, path: Path, special: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with merges of the hard text, beside a model of as many rows as it needs and some more."""
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if "<unk>" not in special else [],
        show_progress=False,
    )
    core.train_from_iterator([HARD_TEXT, "some more words and word endings, 1 22 333 4444"] * 4, trainer)
    tiny.checkpoint("llama", path, vocab_size=core.get_vocab_size() + 3)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    fast.save_pretrained(path)
    return fast


@pytest.mark.parametrize(("rule", "pre"), SPLITTING_RULES.items(), ids=SPLITTING_RULES.values())
def test_llama_cpp_splits_text_as_the_tokenizer_does(
    rule: tuple[tuple[str, ...], bool], pre: str, tmp_path: Path
) -> None:
    splits, whole_words = rule
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    parts = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    core.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    fast = trained(core, tmp_path, ["</s>"])
    file, _ = float32_file(tmp_path)
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == pre
    with Runtime(file, context=64, threads=1) as runtime:
        assert runtime.tokenize(HARD_TEXT) == fast(HARD_TEXT)["input_ids"]
    own = file_tokenizer(file, read_gguf(file).said)
    assert own(HARD_TEXT)["input_ids"] == fast(HARD_TEXT)["input_ids"]


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    trained(core, tmp_path, ["</s>"])
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(GgufError, match=r"tokenizer.json: llama.cpp loads no tokenizer that .* merges none of them"):
        describe_gguf(open_checkpoint(tmp_path))


def test_digits_and_byte_level_splits_are_told_by_their_own_names(tmp_path: Path) -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    core.decoder = decoders.ByteLevel()
    fast = trained(core, tmp_path, ["</s>"])
    file, _ = float32_file(tmp_path)
    with Runtime(file, context=64, threads=1) as runtime:
        assert runtime.tokenize(HARD_TEXT) == fast(HARD_TEXT)["input_ids"]


@pytest.mark.parametrize(("puts_space", "config_names_unknown"), [(True, False), (False, True)])
def test_a_sentencepiece_tokenizer_keeps_its_merges_order_as_scores(
    puts_space: bool, config_names_unknown: bool, tmp_path: Path
) -> None:
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if puts_space else [space])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = trained(core, tmp_path, special)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["added_tokens"] = stored["added_tokens"][:2]  # bytes are tokens like others
    if config_names_unknown:  # as in a tokenizer.json that transformers makes of tokenizer.model
        stored["model"]["unk_token"] = None
        config = tmp_path / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"unk_token": "<unk>", "mask_token": "</s>"}))
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    file, notes = float32_file(tmp_path)
    assert not notes
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.token_type"].contents()[:2] == [2, 3]  # unknown, and control
    assert "tokenizer.ggml.mask_token_id" in fields or not config_names_unknown
    own = file_tokenizer(file, read_gguf(file).said)
    with Runtime(file, context=64, threads=1) as runtime:
        assert runtime.tokenize(HARD_TEXT) == fast(HARD_TEXT)["input_ids"] == own(HARD_TEXT)["input_ids"]
    with pytest.raises(
        GgufError, match=r"--pre gpt-2 names a rule that splits text, and .*tokenizer.json is a Sentence"
    ):
        describe_gguf(open_checkpoint(tmp_path), pre="gpt-2")


def test_a_start_token_and_a_chat_template_are_carried(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path)
    fast = tiny.tokenizer(path, adds_bos=True)
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(path)
    file, _ = float32_file(path)
    assert gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents() == fast.chat_template
    with Runtime(file, context=64, threads=1) as runtime:
        assert runtime.tokenize("the rain") == fast("the rain")["input_ids"]
        assert runtime.tokenize("the rain")[0] == fast.bos_token_id


def test_an_unknown_splitting_rule_and_too_many_tokens_are_refused(tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path)
    tiny.tokenizer(path)
    stored = json.loads((path / "tokenizer.json").read_text())
    stored["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    (path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(
        GgufError, match=r"splits text by a rule .*: \\w\+\. If llama.cpp has it, give its name with --pre"
    ):
        describe_gguf(open_checkpoint(path))
    assert describe_gguf(open_checkpoint(path), pre="gpt-2").keys["tokenizer.ggml.pre"] == "gpt-2"
    small = tiny.checkpoint("llama", tmp_path / "small", vocab_size=280)
    tiny.tokenizer(small)
    with pytest.raises(CheckpointError, match=r"tokenizer has 300 tokens but the model's vocabulary only 280"):
        describe_gguf(open_checkpoint(small))


def test_what_llama_cpp_cannot_load_is_said_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(GgufError, match=r"llama.cpp cannot load .*no.gguf: .*fail"):
        Runtime(tmp_path / "no.gguf", context=16, threads=1)


def test_a_token_beyond_the_files_is_refused(tmp_path: Path) -> None:
    file, _ = float32_file(tiny.checkpoint("llama", tmp_path))
    with Runtime(file, context=16, threads=1) as runtime:
        for token in (320, -1, 2**31 - 1):
            with pytest.raises(GgufError, match=rf"token {token} is beyond the 320 tokens of .*model.gguf"):
                runtime.logits([0, token])
    with pytest.raises(GgufError, match="runs with 1 to 512 threads, not 513"):
        Runtime(file, context=16, threads=513)


def header(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no GGUF file: it begins with b''"),
        (b"PK\3\4 and more of it, as many bytes as a header has", "is no GGUF file: it begins with b'PK"),
        (b"GGUF", "is damaged or cut short: it has 4 bytes"),
        (header(1), "is a GGUF file of version 1, and llama.cpp reads 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is of big-endian byte order"),
        (header(tensors=2**60), "is damaged or cut short: it says 0 keys and"),
        (header(keys=1) + b"\0" * 40, "is (damaged or cut short|no GGUF file of a model)"),
        (header(), "does not say general.architecture"),
    ],
)
def test_what_is_no_gguf_file_of_a_model_is_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.GGUF").write_bytes(content)
    assert is_gguf(str(tmp_path / "x.GGUF"))
    with pytest.raises(GgufError, match=words):
        read_gguf(tmp_path / "x.GGUF")


def said(path: Path, architecture: str, **keys: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        adder = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        adder(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", torch.zeros(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "keys", "words"),
    [
        ("llama", {"general__type": "adapter"}, "is a LoRA adapter"),
        ("clip", {"general__type": "mmproj"}, "is the image or sound encoder of a model"),
        ("llama", {"split__no": 0, "split__count": 2}, "is one of 2 parts of a model: join them"),
        ("bert", {}, "is a bert model, which reads text and does not continue it"),
        ("qwen3", {"qwen3__attention__causal": False}, "is a qwen3 model, which reads text"),
        ("llama", {"tokenizer__ggml__model": "no_vocab"}, "has no tokenizer, so it reads no text"),
    ],
)
def test_what_is_no_language_model_is_one_line(
    architecture: str, keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(GgufError, match=words):
        require_language_model(read_gguf(said(tmp_path / "x.gguf", architecture, **keys)))


def test_a_directory_is_no_gguf_file_whatever_its_name_and_a_file_is_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").mkdir()
    said(tmp_path / "sha256-0123", "llama")
    assert not is_gguf(str(tmp_path / "model.gguf")) and is_gguf(str(tmp_path / "sha256-0123"))
    assert is_gguf(str(tmp_path / "missing.gguf")) and not is_gguf(str(tmp_path / "missing"))


@pytest.mark.parametrize("leads", [True, False])
def test_documents_kept_apart_are_read_anew_as_transformers_reads_them(leads: bool, tmp_path: Path) -> None:
    path = tiny.checkpoint("llama", tmp_path)
    file, _ = float32_file(path)
    tokens = tiny.tokens(1, 60).clamp(min=4)
    tokens[0, ::7] = 3
    batch, model, seen, other = Batch(tokens, Separator(3, leads)), tiny.model(path), QualitySums(), QualitySums()
    with Runtime(file, context=60, threads=1, exact=True) as runtime:
        found = llama_cpp_logits(runtime, batch)
        seen.add_logits(found, logits_of(model, batch), batch)
        other.add_logits(llama_cpp_logits(runtime, Batch(tokens)), None, Batch(tokens))
    documents = len(tokens[0, ::7]) + (not leads)
    assert seen.tokens == batch.num_predicted == 60 - documents and seen.kl < 1e-6
    assert abs(seen.nats - seen.reference_nats) < 1e-4 < abs(seen.nats - other.nats)
    alone = cross_entropy(tiny.logits(model, tokens[:, :7])[0, :-1], tokens[0, 1:7]) if leads else None
    assert leads is False or abs(float(cross_entropy(found[:6], tokens[0, 1:7]) - alone)) < 1e-4


def test_rows_of_padding_are_left_out_of_the_comparison_and_not_of_the_loss() -> None:
    tokens, found = torch.tensor([[1, 2, 3]]), torch.randn(3, 8)
    seen, alone = QualitySums(), QualitySums()
    seen.add_logits(found, found[:, :6], Batch(tokens))
    alone.add_logits(found, None, Batch(tokens))
    assert seen.kl == pytest.approx(0, abs=1e-7) and seen.top1 == 1 and seen.nats == alone.nats
    alone += seen
    assert alone.tokens == 4 and alone.nats == pytest.approx(seen.nats)
    assert perplexity_of(1e4) == float("inf") and perplexity_of(1.0) == pytest.approx(2.718281828)


def test_a_prompt_is_the_tokenizers_with_one_start_token_and_what_spells_a_special_token_is_text(
    tmp_path: Path,
) -> None:
    path = tiny.checkpoint("llama", tmp_path)
    tiny.tokenizer(path, adds_bos=True)
    stored = json.loads((path / "tokenizer.json").read_text())
    stored["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    stored["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    (path / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(path)
    assert tokenizer("x").input_ids[-1] == tokenizer.eos_token_id
    file, _ = float32_file(path)
    with Runtime(file, context=64, threads=1) as runtime:
        for text in (" the rain", "a</s>b <s>", "", HARD_TEXT):
            assert runtime.prompt(text) == prompt_ids(tokenizer, text)
