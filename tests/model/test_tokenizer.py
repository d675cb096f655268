"""A directory's tokenizer is its tokenizer.json, and text is text: both held against the tokenizers library itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minitron.core.errors import CheckpointError, DataError
from minitron.model.tokenizer import PROBES, load_tokenizer, make_portable
from minitron.model.tokens import chat_ids, prompt_ids, put_around, quoted, text_ends, text_ids, texts_ids

CONFIG = "tokenizer_config.json"
Change = Callable[[dict[str, Any]], Any]


def edit(file: Path, change: Change) -> None:
    value = json.loads(file.read_text()) if file.exists() else {}
    change(value)
    file.write_text(json.dumps(value))


def of_library(path: Path, text: str, **options: Any) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, **options).ids
    return ids


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "Qwen2Tokenizer", "BertTokenizer", "NoSuchClass", None])
def test_ids_are_those_of_tokenizer_json_whatever_class_is_named(
    tmp_path: Path, model_type: str, named: str | None
) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    edit(path / CONFIG, lambda said: said.update(tokenizer_class=named))
    edit(path / "config.json", lambda said: said.update(model_type=model_type))
    tokenizer = load_tokenizer(path)
    for text in (*PROBES, ""):
        assert tokenizer(text).input_ids == of_library(path, text) == prompt_ids(tokenizer, text)
        assert text_ids(tokenizer, text) == of_library(path, text, add_special_tokens=False)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("with_json", [True, False])
def test_code_of_the_directory_is_not_run(
    tmp_path: Path, with_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    monkeypatch.setattr("builtins.input", lambda text: "y")
    (path / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Own: pass")
    edit(path / CONFIG, lambda c: c.update(tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}))
    if with_json:
        assert text_ids(load_tokenizer(path), "the") == of_library(path, "the", add_special_tokens=False)
        make_portable(path)
        assert "auto_map" not in json.loads((path / CONFIG).read_text())
    else:
        (path / "tokenizer.json").unlink()
        (path / "vocab.json").write_text("{}")
        (path / "merges.txt").write_text("")
        with pytest.raises(
            CheckpointError, match=r"names code of its own for its tokenizer \(Own\), which is never run"
        ):
            load_tokenizer(path)
    assert not (tmp_path / "mark").exists() and "custom code" not in capsys.readouterr().out


def model(**changes: Any) -> Change:
    return lambda stored: stored["model"].update(changes)


def added(*tokens: dict[str, Any]) -> Change:
    return lambda stored: stored["added_tokens"].extend(tokens)


def processor(**changes: Any) -> Change:
    return lambda stored: stored["post_processor"].update(changes)


# What is wrong in tokenizer.json, and what the one line says of it.
DAMAGE: dict[str, tuple[Change, str]] = {
    "no model": (lambda stored: stored.pop("model"), "is no tokenizer: it must be a JSON object with a model"),
    "types": (model(vocab={"a": "x"}, merges=[]), "is damaged, or of another kind than the tokenizers library reads: "),
    "kind": (model(type="Foo"), "is damaged, or of another kind"),
    "merge": (model(merges=[["q", "zz"]]), "is damaged, or of another kind"),
    "normalizer": (lambda s: s.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AA"}), "is damaged"),
    "one id twice": (lambda stored: stored["model"]["vocab"].update(zz=5), r"' and '.*' are both token 5"),
    "a gap": (added(tiny.token("<x>", 900)), "'<x>' has the id 900 there, and is token 102 to the tokenizers library"),
    "one id for two": (added(tiny.token("<x>", 102), tiny.token("<y>", 102)), "'<y>' has the id 102 there"),
    "another id": (lambda stored: stored["added_tokens"][1].update(id=5), "'<s>' has the id 5 there, and is token 1"),
    "dropout": (model(dropout=0.1), "model.dropout is 0.1, so a text would be other tokens each time"),
    "who": (processor(special_tokens={}), "puts '<s>' around a text and does not say what tokens that is"),
    "no text": (processor(single=[]), r"does not have the text itself once, as \$A"),
    "strange": (
        processor(special_tokens={"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}),
        "puts '<s>' around a text as token 7, and it is token 1 of the vocabulary",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    change, message = DAMAGE[damage]
    edit(path / "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(path)
    assert str(error.value).startswith(f"{path / 'tokenizer.json'}") and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # the library prints its panics


# A file beside tokenizer.json, what it says, and the one line.
BESIDE: dict[str, tuple[str, dict[str, Any], str]] = {
    "role": (CONFIG, {"bos_token": 5}, "bos_token must be a text, not 5"),
    "missing role": (CONFIG, {"eos_token": "<end>"}, "names '<end>' as eos_token, which tokenizer.json does not have"),
    "two roles": ("special_tokens_map.json", {"eos_token": "<s>"}, "eos_token is '</s>' in .* and '<s>' in special_to"),
    "decoder": (
        CONFIG,
        {"added_tokens_decoder": {"1": {"content": "</s>"}}},
        "has '</s>' as token 1, and tokenizer.json has it as token 2: the two are of different times",
    ),
    "later": ("added_tokens.json", {"<x>": 102}, "has '<x>' as token 102, and tokenizer.json has no such token"),
    "template": (CONFIG, {"chat_template": [4]}, "chat_template must be a text, or a list of texts with their names"),
    "rows": ("config.json", {"vocab_size": 90}, r"the tokenizer has 102 tokens but .* only 90 \('▁the' is token 101\)"),
}


@pytest.mark.parametrize("file", BESIDE)
def test_what_other_files_contradict_is_refused(tmp_path: Path, file: str) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    name, said, message = BESIDE[file]
    edit(path / name, lambda value: value.update(said))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(path)


def test_truncation_padding_and_a_byte_order_mark_of_the_file_change_no_text(tmp_path: Path) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    expected = of_library(path, "the rain")
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(path / "tokenizer.json", lambda stored: stored.update(truncation=truncation))
    (path / "tokenizer.json").write_text("\ufeff" + (path / "tokenizer.json").read_text(), encoding="utf-8")
    assert prompt_ids(load_tokenizer(path), "the rain") == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tokenizer.model", "SentencePiece"), ("tekken.json", "Mistral"), ("qwen.tiktoken", "tiktoken")],
)
def test_without_tokenizer_json_the_way_to_make_one_is_told(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("x")
    message = f"has {name}, a {kind} file, and no tokenizer.json, .* make one with transformers"
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_a_vocabulary_with_merges_is_a_tokenizer_too(tmp_path: Path) -> None:
    core = tiny.tokenizer(tmp_path / "json").backend_tokenizer
    (path := tmp_path / "model").mkdir()
    core.model.save(str(path))
    (path / CONFIG).write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}))
    for text in PROBES:
        assert text_ids(load_tokenizer(path), text) == core.encode(text).ids
    (path / CONFIG).write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(CheckpointError, match=r"LlamaTokenizer, .* does not have the tokens of vocab\.json"):
        load_tokenizer(path)


# --- roles ------------------------------------------------------------------------------------------------------------


def test_roles_that_no_tokenizer_file_names_are_those_of_config_json(tmp_path: Path) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    (path / CONFIG).unlink()
    edit(path / "config.json", lambda config: config.update(bos_token_id=1, eos_token_id=[2, 1]))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    edit(path / "config.json", lambda config: config.update(bos_token_id=40, eos_token_id=None))  # a letter
    assert load_tokenizer(path).bos_token is None


def test_bos_is_put_by_tokenizer_json_else_by_its_config(tmp_path: Path) -> None:
    path = tiny.sentencepiece(tmp_path / "model", bos=False)
    assert put_around(load_tokenizer(path)) == ([1], [])
    edit(path / CONFIG, lambda said: said.pop("add_bos_token"))
    assert put_around(load_tokenizer(path)) == ([], [])
    path = tiny.sentencepiece(tmp_path / "other")
    edit(path / CONFIG, lambda said: said.update(add_bos_token=False))
    assert put_around(load_tokenizer(path)) == ([1], [])


def test_chat_templates_are_found_where_they_are(tmp_path: Path) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    several = [{"name": "default", "template": "x"}, {"name": "tool", "template": "y"}]
    edit(path / CONFIG, lambda said: said.update(chat_template=several))
    assert load_tokenizer(path).chat_template == {"default": "x", "tool": "y"}
    (path / "chat_template.jinja").write_text("z")
    assert load_tokenizer(path).chat_template == "z"


# --- transformers' AutoTokenizer of a written directory ---------------------------------------------------------------


def unposted(stored: dict[str, Any]) -> None:
    stored["post_processor"] = None


@pytest.mark.parametrize("change", [None, unposted], ids=["as it is", "BOS by the config"])
@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "GemmaTokenizer", "NoSuchClass", "PreTrainedTokenizerFast"])
def test_auto_tokenizer_reads_a_written_directory_as_it_is_read_here(
    tmp_path: Path, named: str, change: Change | None
) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    edit(path / CONFIG, lambda said: said.update(tokenizer_class=named))
    if change:
        edit(path / "tokenizer.json", change)
    ours = load_tokenizer(path)
    make_portable(path)
    other = AutoTokenizer.from_pretrained(path)
    for text in (*PROBES, "a</s>b", ""):
        assert other(text).input_ids == ours(text).input_ids == load_tokenizer(path)(text).input_ids
    assert (other.bos_token_id, other.eos_token_id) == (ours.bos_token_id, ours.eos_token_id) == (1, 2)


def test_where_auto_tokenizer_cannot_be_told_a_warning_is_given(tmp_path: Path) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    edit(path / "config.json", lambda said: said.update(model_type="qwen2"))
    with pytest.warns(UserWarning, match=r"load the tokenizer with PreTrainedTokenizerFast\.from_pretrained"):
        make_portable(path)
    assert PreTrainedTokenizerFast.from_pretrained(path)(" the").input_ids == of_library(path, " the")


def test_a_directory_that_is_read_alike_is_left_alone(tmp_path: Path) -> None:
    tiny.checkpoint("llama", tmp_path)
    tiny.tokenizer(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    make_portable(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- one rule for special tokens --------------------------------------------------------------------------------------

SPELLED = ["a</s>b", "<s>the", "the <unk> </s>", "<|user|>the</s>"]


@pytest.mark.parametrize("text", SPELLED)
def test_what_spells_a_special_token_is_text(tmp_path: Path, text: str) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    tokenizer = load_tokenizer(path)
    edit(path / "tokenizer.json", lambda stored: stored.update(added_tokens=[]))
    expected = of_library(path, text, add_special_tokens=False)
    assert text_ids(tokenizer, text) == texts_ids(tokenizer, ["the", text])[1] == expected
    assert prompt_ids(tokenizer, text) == [1, *expected]
    assert text_ends(tokenizer, text)[-1] == len(text) and len(text_ends(tokenizer, text)) == len(expected)
    assert text_ids(tokenizer, tokenizer.decode(expected)) == expected


def test_added_tokens_that_are_not_special_stay_tokens(tmp_path: Path) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    edit(path / "tokenizer.json", added(tiny.token("rain", 102, special=False)))
    edit(path / "config.json", lambda config: config.update(vocab_size=103))
    ids = text_ids(load_tokenizer(path), "the rain</s>")
    assert ids.count(102) == 1 and 2 not in ids


def test_a_prompt_has_one_bos_and_no_eos(tmp_path: Path) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    bos, eos = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("<s>", "</s>"))
    known = {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in (("<s>", 1), ("</s>", 2))}
    single = [bos, bos, {"Sequence": {"id": "A", "type_id": 0}}, eos]
    edit(path / "tokenizer.json", processor(single=single, special_tokens=known))
    tokenizer = load_tokenizer(path)
    assert prompt_ids(tokenizer, " the") == [1, *of_library(path, " the", add_special_tokens=False)]
    assert prompt_ids(tokenizer, "") == [1]


def test_special_tokens_of_a_chat_template_are_such_and_those_of_messages_are_text(tmp_path: Path) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    tokenizer = load_tokenizer(path)
    said = "the</s> end"
    marked = quoted(tokenizer, said)
    assert quoted(tokenizer, "the end") == "the end" and marked != said
    ids = chat_ids(tokenizer, f"<s>{marked}</s>")
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == 1 and ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == said.replace(" ", "")
    assert chat_ids(tokenizer, "the</s>") == [1, *of_library(path, "the</s>", add_special_tokens=False)]


def test_a_vocabulary_that_spells_its_special_tokens_itself_is_refused_on_such_text(tmp_path: Path) -> None:
    core = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "<": 2}, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert text_ids(tokenizer, "a a") == [1, 1]
    with pytest.raises(DataError, match="the text 'a </s>' spells '</s>', and this tokenizer makes the special token"):
        text_ids(tokenizer, "a </s>")


def test_text_that_is_none_is_one_line(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.sentencepiece(tmp_path / "model"))
    with pytest.raises(DataError, match="is no Unicode text: surrogates not allowed at character 1; give UTF-8"):
        prompt_ids(tokenizer, "a\udcff")
    (strict := tiny.sentencepiece(tmp_path / "strict"))
    edit(strict / "tokenizer.json", model(unk_token="<nope>"))
    with pytest.raises(DataError, match="the tokenizer cannot read 'é': Unk token `<nope>` not found"):
        text_ids(load_tokenizer(strict), "é")
