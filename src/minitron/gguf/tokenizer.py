"""A Hugging Face tokenizer as llama.cpp reads it: its tokens, its merges, and the rule by which it splits text.

llama.cpp has the splitting rules compiled in, by name. The text of the rule in tokenizer.json tells the name, so that
users' own tokenizers work too; a rule that llama.cpp lacks is an error, because with another rule the model would read
other tokens than in training.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron.core.errors import GgufError
from minitron.core.reading import read_json
from minitron.gguf.reader import Keys
from minitron.model.checkpoint import load_tokenizer
from minitron.model.tokens import put_around

# Regular expressions that split text before merging, as tokenizer.json files have them.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}|{_REST}"
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OTHER = r"[^\r\n\p{L}\p{N}]?"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_TEKKEN = rf"{_OTHER}{_UPPER}*{_LOWER}+|{_OTHER}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_WITH_SLASH}"
_GPT4O = (
    rf"{_OTHER}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_OTHER}{_UPPER}+{_LOWER}*{_ENGLISH}?|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"
)
# The patterns that split text in turn, and whether whole words are looked up before merging -> the name of the rule.
SPLITTING_RULES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    # Not starcoder, the same rule: there llama.cpp takes spaces before punctuation out of the text of tokens.
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}
# Other names of these rules.
_ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3"), "llama-bpe"),
    "dbrx": "smaug-bpe",
    **dict.fromkeys(("olmo", "phi-2"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell"), "smollm"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez"), "qwen2"),
}
# Rules whose tokenizers put BOS before a text, where a file does not say whether.
_START_WITH_BOS = ("llama-bpe", "tekken")
# Role of a token in transformers -> in llama.cpp, in its spelling.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's kinds of tokens
_SPACE = "\u2581"  # SentencePiece's


def tokenizer_keys(path: Path, rows: int, pre: str | None = None) -> Keys:
    """The keys of a GGUF file for a model directory's tokenizer.

    A model without a tokenizer gets a file that runs on token ids alone.

    Args:
        rows: of the embedding, which may be more than the tokens.
        pre: llama.cpp's name of the splitting rule, where tokenizer.json does not tell it.

    Raises: GgufError for a tokenizer that llama.cpp cannot represent.
    """
    file = path / "tokenizer.json"
    if not file.exists():
        if any(path.glob("tokenizer*")):
            raise GgufError(
                f"{path} has a tokenizer but no tokenizer.json, which a GGUF file is made from; "
                "load it with transformers and save_pretrained it there"
            )
        _require_no_rule(pre, f"{path} has no tokenizer")
        return {"tokenizer.ggml.model": "no_vocab"}
    special = _special(path)  # which refuses a damaged tokenizer.json first
    stored = read_json(file, GgufError)
    model = stored["model"]
    if model.get("type", "BPE") != "BPE":
        raise GgufError(
            f"{file}: a {model['type']} tokenizer; only BPE can be written, which all supported families have"
        )
    tokens = {index: text for text, index in model["vocab"].items()}
    added = {token["id"]: token for token in stored.get("added_tokens", [])}
    tokens |= {index: token["content"] for index, token in added.items()}
    if max(tokens) >= rows:
        raise GgufError(
            f"{file}: token {tokens[max(tokens)]!r} has id {max(tokens)}, but the embedding has {rows} rows: "
            "the tokenizer belongs to another model, or the embedding was not resized for its added tokens"
        )
    texts = [tokens.get(index, f"[PAD{index}]") for index in range(rows)]
    unknown = model.get("unk_token")
    if unknown is None and model.get("byte_fallback"):  # transformers writes no unk_token where bytes stand in for it
        unknown = tokens.get(special.get("tokenizer.ggml.unknown_token_id", -1))
    kinds = [_kind(index, text, added, tokens, unknown) for index, text in enumerate(texts)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys: Keys = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": kinds}
    if model.get("byte_fallback"):
        _require_no_rule(pre, f"{file} is a SentencePiece tokenizer, which merges text whole")
        keys |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": _scores(texts, merges),
            "tokenizer.ggml.add_space_prefix": _puts_space_first(stored),
        }
    elif not merges:
        raise GgufError(f"{file}: llama.cpp loads no tokenizer that splits text into bytes and merges none of them")
    else:
        keys |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre or _rule_of(file, stored),
            "tokenizer.ggml.merges": merges,
        }
    return keys | special


def file_tokenizer(file: Path, said: Mapping[str, Any]) -> Any:
    """Make a tokenizer of transformers from the keys of a GGUF file.

    Raises: GgufError for a kind of tokenizer that is not known here.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    texts, kinds = said.get("tokenizer.ggml.tokens"), said.get("tokenizer.ggml.token_type")
    kind, name = said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.pre", "default")
    rule = next((rule for rule, pre in SPLITTING_RULES.items() if pre == _ALIASES.get(name, name)), None)
    if not texts or not kinds or kind not in ("llama", "gpt2") or (kind == "gpt2" and rule is None):
        raise GgufError(
            f"{file} has a tokenizer of kind {kind!r} with the splitting rule {name!r}, which is not known here: give "
            "the checkpoint that the file was made of instead of it, or as --teacher where the file itself is measured"
        )
    if len(kinds) != len(texts) or (kind == "llama" and len(said.get("tokenizer.ggml.scores", ())) != len(texts)):
        raise GgufError(f"{file} is damaged: it has {len(texts)} tokens, and not as many kinds or scores of them")
    texts, kinds = _without_padding(texts, kinds)
    vocab = {text: index for index, text in enumerate(texts)}
    if len(vocab) < len(texts):
        twice = next(text for index, text in enumerate(texts) if vocab[text] != index)
        raise GgufError(
            f"{file} has two tokens with the text {twice!r}: no tokenizer of transformers can be made of it"
        )
    unknown = next((texts[index] for index, of in enumerate(kinds) if of == _UNKNOWN), None)
    if kind == "gpt2":
        assert rule is not None
        merges = [tuple(merge.split(" ", 1)) for merge in said.get("tokenizer.ggml.merges", ())]
        if wrong := [pair for pair in merges if len(pair) != 2 or not vocab.keys() >= {*pair, "".join(pair)}]:
            raise GgufError(f"{file} is damaged: it merges {wrong[0]!r}, which are none of its tokens")
        core = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule[1]))
        splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in rule[0]]
        core.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
        core.decoder = decoders.ByteLevel()
    else:
        merges = _merges(vocab, said.get("tokenizer.ggml.scores", ()))
        core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
        first = [normalizers.Prepend(_SPACE)] if said.get("tokenizer.ggml.add_space_prefix", True) else []
        core.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
        stripped = [decoders.Strip(" ", 1, 0)] if first else []
        parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
        core.decoder = decoders.Sequence(parts)
    core.add_special_tokens([AddedToken(text, normalized=False) for text in _of_kind(texts, kinds, _CONTROL)])
    core.add_tokens([AddedToken(text, normalized=False) for text in _of_kind(texts, kinds, _USER_DEFINED)])
    roles = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    ids = {short: said.get(f"tokenizer.ggml.{role}_token_id") for role, short in roles.items()}
    named = {f"{role}_token": texts[index] for role, index in ids.items() if index is not None and index < len(texts)}
    # What llama.cpp does where the file does not say.
    starts = kind == "llama" or (rule is not None and SPLITTING_RULES[rule] in _START_WITH_BOS)
    around = {
        role: named[f"{role}_token"]
        for role in ("bos", "eos")
        if f"{role}_token" in named and said.get(f"tokenizer.ggml.add_{role}_token", role == "bos" and starts)
    }
    if around:
        single = " ".join([*([around["bos"]] if "bos" in around else []), "$A", *filter(None, [around.get("eos")])])
        special = [(text, vocab[text]) for text in around.values()]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    template = said.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, chat_template=template, **named
    )


def _without_padding(texts: Sequence[str], kinds: Sequence[int]) -> tuple[Sequence[str], Sequence[int]]:
    """The tokens without those at the end that only fill the embedding's rows."""
    end = len(texts)
    while end and kinds[end - 1] == _UNUSED and texts[end - 1] == f"[PAD{end - 1}]":
        end -= 1
    return texts[:end], kinds[:end]


def _of_kind(texts: Sequence[str], kinds: Sequence[int], wanted: int) -> list[str]:
    return [text for text, kind in zip(texts, kinds, strict=True) if kind == wanted]


def _merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs that make up tokens, in SentencePiece's order of their scores."""
    found = []
    for text, index in vocab.items():
        pairs = ((text[:at], text[at:]) for at in range(1, len(text)))
        pairs_known = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        found += [(-scores[index], vocab[left], vocab[right], left, right) for left, right in pairs_known]
    return [(left, right) for *_, left, right in sorted(found)]


def tokenizer_notes(keys: Mapping[str, Any]) -> list[str]:
    """Notes on what llama.cpp does otherwise with the tokenizer."""
    if keys["tokenizer.ggml.model"] == "no_vocab":
        return ["this model has no tokenizer: llama.cpp runs the file on token ids alone"]
    if keys["tokenizer.ggml.model"] == "llama" and _BYTE not in keys["tokenizer.ggml.token_type"]:
        return [
            "this tokenizer has no tokens for single bytes: llama.cpp ends its process on text with a letter that is "
            "none of its tokens"
        ]
    return []


def _require_no_rule(pre: str | None, why: str) -> None:
    if pre is not None:
        raise GgufError(f"--pre {pre} names a rule that splits text, and {why}: leave it out")


def _kind(index: int, text: str, added: Mapping[int, Any], tokens: Mapping[int, str], unknown: str | None) -> int:
    if index not in tokens:
        return _UNUSED
    if text == unknown:
        return _UNKNOWN
    if index in added:
        return _CONTROL if added[index]["special"] else _USER_DEFINED
    return _BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else _NORMAL


def _scores(texts: Iterable[str], merges: Iterable[str]) -> list[float]:
    """The score of each token by the first merge that makes it: SentencePiece merges the highest score first."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        rank.setdefault(left + right, number)
    return [-float(rank[text]) if text in rank else -1e9 for text in texts]


def _puts_space_first(stored: Mapping[str, Any]) -> bool:
    parts = [*_parts(stored.get("normalizer"), "normalizers"), *_parts(stored.get("pre_tokenizer"), "pretokenizers")]
    return any(
        (part["type"] == "Prepend" and part["prepend"] == _SPACE)
        or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )


def _rule_of(file: Path, stored: Mapping[str, Any]) -> str:
    splits: list[str] = []
    for part in _parts(stored.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Split" and "Regex" in part["pattern"]:
            splits.append(part["pattern"]["Regex"])
        elif part["type"] == "Digits" and part["individual_digits"]:
            splits.append(r"\p{N}")
        elif part["type"] == "ByteLevel":
            splits += [_GPT2] if part.get("use_regex", True) else []
        else:
            splits.append(json.dumps(part))  # which is in no rule
    whole_words = bool(stored["model"].get("ignore_merges"))
    # Whether whole words are looked up first matters only where merges do not lead to all tokens; the proof after
    # writing shows whether it does here.
    for key in ((tuple(splits), whole_words), (tuple(splits), not whole_words)):
        if key in SPLITTING_RULES:
            return SPLITTING_RULES[key]
    known = ", ".join(SPLITTING_RULES.values())
    raise GgufError(
        f"{file} splits text by a rule that is none of those known by name in llama.cpp ({known}): "
        f"{' then '.join(splits) or 'none at all'}. If llama.cpp has it, give its name with --pre; with a wrong one "
        "the check after writing fails"
    )


def _parts(section: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if section is None:
        return []
    return section[name] if section["type"] == "Sequence" else [section]


def _special(path: Path) -> Keys:
    """The ids of tokens with a role, whether text starts and ends with them, and the chat template."""
    tokenizer = load_tokenizer(path)
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    keys: Keys = {f"tokenizer.ggml.{_ROLES[role]}_token_id": index for role, index in ids.items() if index is not None}
    keys["tokenizer.ggml.add_bos_token"] = ids["bos"] is not None and ids["bos"] in put_around(tokenizer)[0]
    keys["tokenizer.ggml.add_eos_token"] = False  # llama.cpp would put it behind every prompt
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return keys | ({"tokenizer.chat_template": template} if template else {})
