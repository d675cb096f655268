"""GGUF files against transformers: what llama.cpp computes from them, how it splits text, and what is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as BlockType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minitron.errors import GgufError
from minitron.model.checkpoint import load_tokenizer, open_checkpoint
from minitron.model.tokens import prompt_ids
from minitron.publish import gguf_tokenizer
from minitron.publish.gguf import describe, file_bytes, plain_types, write_gguf
from minitron.publish.llama_cpp import Runtime
from minitron.publish.verify import HARD_TEXT

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
# Variant of tests/tiny.py, and what is changed so that llama.cpp can have it, or to see another rule.
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
    ("granite", {}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("nemotron", {}, "hidden=32 and heads\\*head_dim=8\\*6=48: it would not load. Cut to hidden=48"),
    ("gemma2-untied", {}, "takes the embedding of a gemma2 model for its output projection"),
    ("gemma2", {"attention_bias": True}, "has no place for model.layers.0.self_attn.o_proj.bias \\(4 tensors"),
    ("smollm3", {}, "no_rope_layers is \\[1, 0, 1, 0\\]"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of kind 'dynamic'"),
]


def float32_file(path: Path) -> tuple[Path, tuple[str, ...]]:
    """A checkpoint's GGUF file, and the notes on it."""
    model, file = describe(open_checkpoint(path)), path / "model.gguf"
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
    assert notes == ("this model has no tokenizer: llama.cpp runs the file on token ids alone",) and kl < 1e-6


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
        describe(open_checkpoint(tiny.checkpoint(variant, tmp_path, **changes)))


@pytest.mark.parametrize(("kind", "dtype"), [(BlockType.F16, torch.float16), (BlockType.BF16, torch.bfloat16)])
def test_sixteen_bits_are_torchs(kind: BlockType, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny.checkpoint("llama-tied", tmp_path)
    model = describe(open_checkpoint(path))
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
    described = describe(open_checkpoint(path))
    with pytest.raises(GgufError, match=r"blk.1.ffn_up.weight has weights beyond 65,504"):
        write_gguf(described, path / "16.gguf", plain_types(described, BlockType.F16), keys={})
    assert not list(path.glob("*gguf*"))


def test_rows_come_in_runs_that_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = describe(open_checkpoint(tiny.checkpoint("llama", tmp_path)))
    whole = {tensor.name: torch.cat(list(model.runs(tensor))) for tensor in model.tensors}
    monkeypatch.setattr("minitron.publish.gguf.CHUNK_BYTES", 1000)
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


@pytest.mark.parametrize(("rule", "pre"), gguf_tokenizer.RULES.items(), ids=gguf_tokenizer.RULES.values())
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


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    trained(core, tmp_path, ["</s>"])
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(GgufError, match=r"tokenizer.json: llama.cpp loads no tokenizer that .* merges none of them"):
        describe(open_checkpoint(tmp_path))


def test_digits_and_byte_level_splits_are_told_by_their_own_names(tmp_path: Path) -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    core.decoder = decoders.ByteLevel()
    fast = trained(core, tmp_path, ["</s>"])
    file, _ = float32_file(tmp_path)
    with Runtime(file, context=64, threads=1) as runtime:
        assert runtime.tokenize(HARD_TEXT) == fast(HARD_TEXT)["input_ids"]


@pytest.mark.parametrize("puts_space", [True, False])
def test_a_sentencepiece_tokenizer_keeps_its_merges_order_as_scores(puts_space: bool, tmp_path: Path) -> None:
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if puts_space else [space])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = trained(core, tmp_path, special)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["added_tokens"] = stored["added_tokens"][:2]  # bytes are tokens like others
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    file, notes = float32_file(tmp_path)
    assert not notes
    with Runtime(file, context=64, threads=1) as runtime:
        assert runtime.tokenize(HARD_TEXT) == fast(HARD_TEXT)["input_ids"]


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
        describe(open_checkpoint(path))
    assert describe(open_checkpoint(path), pre="gpt-2").keys["tokenizer.ggml.pre"] == "gpt-2"
    small = tiny.checkpoint("llama", tmp_path / "small", vocab_size=280)
    tiny.tokenizer(small)
    with pytest.raises(GgufError, match=r"has id 299, but the embedding has 280 rows"):
        describe(open_checkpoint(small))


def test_what_llama_cpp_cannot_load_is_said_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(GgufError, match=r"llama.cpp cannot load .*no.gguf: .*fail"):
        Runtime(tmp_path / "no.gguf", context=16, threads=1)


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
