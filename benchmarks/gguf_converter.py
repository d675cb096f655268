"""Are our F32, F16 and BF16 GGUF files those of llama.cpp's own converter? Every tensor, and every key.

    python benchmarks/gguf_converter.py --environment DIRECTORY [--models DIR ...] [--out FILE]

The converter, convert_hf_to_gguf.py, and the gguf package beside it are those of the llama.cpp in the sdist of
llama-cpp-python, from which gguf_oracle.py has its tools. It is downloaded below DIRECTORY where it is missing, checked
against a digest, and unpacked but not built; sentencepiece, which the converter needs, goes beside it. Both run with
this process's Python and packages. --llama-cpp DIR takes the converter of another checkout of llama.cpp.

Tiny random models of every family are made here, some with the tokenizer that the converter demands of them: a
SentencePiece model, trained on the source of a module. The converter knows the rule that splits text by a digest of
some tokens, which it has of published tokenizers alone; here it is told, and for --models it is not.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType as BlockType
from lib.measure import header, publish, save_byte_tokenizer, table

from minitron.core.errors import GgufError
from minitron.gguf.file import describe_gguf, plain_types, write_gguf
from minitron.gguf.types import file_keys
from minitron.model.checkpoint import open_checkpoint
from minitron.model.families import FAMILIES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
import tiny

SDIST, DIGEST = "llama-cpp-python==0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER, PARTS = "convert_hf_to_gguf.py", ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "LICENSE")
SENTENCEPIECE = "sentencepiece==0.2.3"
TYPES = ("F32", "F16", "BF16")
# Runs the converter as its own script; a name of the rule that splits text stands in where its digest is not known.
RUNNER = """
import runpy, sys
from pathlib import Path
script, rule, *arguments = sys.argv[1:]
sys.path.insert(0, str(Path(script).parent))
sys.argv = [script, *arguments]
if rule:
    from conversion.base import TextModel
    told = TextModel.get_vocab_base_pre
    def known(self, tokenizer):
        try:
            return told(self, tokenizer)
        except NotImplementedError:
            return rule
    TextModel.get_vocab_base_pre = known
runpy.run_path(script, run_name="__main__")
"""
# Trains a SentencePiece model, and has transformers make tokenizer.json of it.
TRAINER = """
import json, sys
from pathlib import Path
import sentencepiece, transformers
out, kind = Path(sys.argv[1]), sys.argv[2]
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(Path(json.__file__).read_text().splitlines()), model_prefix=str(out / "tokenizer"),
    model_type="bpe", vocab_size=500, byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False,
    add_dummy_prefix=kind == "LlamaTokenizer", normalization_rule_name="identity", remove_extra_whitespaces=False,
    minloglevel=2, **({} if kind == "LlamaTokenizer" else {"pad_id": 3, "control_symbols": ["<mask>"]}))
(out / "tokenizer.vocab").unlink()
roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
(out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **roles}))
getattr(transformers, kind).from_pretrained(out).save_pretrained(out)
"""
PIECES = {"vocab_size": 520}
CARD = """---
license: apache-2.0
language: [en, fr]
tags: [code]
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M
datasets: [HuggingFaceTB/smoltalk]
---
"""
SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        "long_factor": [1.5, 2.0],
        "short_factor": [1.0, 1.1],
    },
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Tiny:
    """A random model: a variant of tests/helpers/tiny.py and its changes.

    pieces: the class of a SentencePiece tokenizer; None for one of bytes.
    """

    variant: str
    changes: dict[str, Any] = field(default_factory=dict)
    pieces: str | None = None
    has_card: bool = False  # and settings of sampling


MODELS = {
    "llama": Tiny("llama"),
    "Tiny-20K-Instruct-v0.2": Tiny("llama-tied", has_card=True),
    "llama, tied, SentencePiece": Tiny("llama-tied", PIECES, "LlamaTokenizer"),
    "llama, biases": Tiny("llama-biases"),
    "llama, heads wider than hidden": Tiny("llama-head_dim"),
    "llama, rope of Llama 3": Tiny("llama-rope"),
    "llama, linear rope": Tiny("llama", LINEAR),
    "mistral": Tiny("mistral", PIECES, "LlamaTokenizer"),
    "mistral, heads wider than hidden": Tiny("mistral-head_dim"),
    "mistral, a window": Tiny("mistral-window"),
    "nemotron": Tiny("nemotron", PIECES | {"head_dim": 4}, "LlamaTokenizer"),
    "nemotron, a tokenizer of bytes": Tiny("nemotron", {"head_dim": 4}),
    **{f"{name}, a tokenizer of bytes": Tiny(name) for name in ("gemma", "gemma2", "phi3")},
    "qwen2": Tiny("qwen2", {"use_sliding_window": False}),
    "qwen3": Tiny("qwen3"),
    "qwen3, yarn": Tiny("qwen3", {"rope_parameters": YARN}),
    "gemma": Tiny("gemma", PIECES, "GemmaTokenizer"),
    "gemma2": Tiny("gemma2", PIECES | {"query_pre_attn_scalar": 6}, "GemmaTokenizer"),
    "gemma2, another scale of queries": Tiny("gemma2", PIECES, "GemmaTokenizer"),
    "gemma3": Tiny("gemma3", PIECES | {"query_pre_attn_scalar": 6}, "GemmaTokenizer"),
    "phi3": Tiny("phi3", PIECES, "LlamaTokenizer"),
    "phi3, longrope": Tiny("phi3", PIECES | LONG, "LlamaTokenizer"),
    "smollm3": Tiny("smollm3", {"no_rope_layer_interval": 4}),
    "olmo2": Tiny("olmo2"),
    "granite": Tiny("granite"),
}
# Key, without the family's name -> why ours differs.
SAID = "ours says what llama.cpp takes for itself where the key is missing"
FROM_CONFIG = (
    "the converter takes the id in config.json, here a default of transformers, for a role that the tokenizer gives to "
    "no token; ours does so only where the tokenizer names neither BOS nor EOS"
)
REASONS = {
    "general.name": "ours is the name of the directory; the converter makes a title of it",
    "general.size_label": "ours is of the exact number of parameters; the converter believes the name if it is near",
    "tokenizer.ggml.add_bos_token": (
        "ours says what the tokenizer does; where no key says it, llama.cpp puts BOS before a text of a SentencePiece "
        "tokenizer, which these do not"
    ),
    "tokenizer.ggml.add_eos_token": "ours always says that no EOS goes behind a prompt",
    "tokenizer.ggml.add_space_prefix": SAID,
    "tokenizer.ggml.bos_token_id": FROM_CONFIG,
    "tokenizer.ggml.padding_token_id": f"{FROM_CONFIG}; of Nemotron the converter always writes 0",
    "tokenizer.ggml.unknown_token_id": "of Nemotron the converter always writes 1; here the tokenizer has it at 0",
    "tokenizer.ggml.eot_token_id": "of Gemma the converter always writes the 107 of CodeGemma",
    "tokenizer.ggml.scores": (
        "ours count the merges of tokenizer.json, the converter's are those of tokenizer.model; llama.cpp merges by "
        "their order alone"
    ),
    "tokenizer.ggml.tokens": (
        "the converter loads the tokenizer as the class that transformers has for Qwen 2, which adds a token; ours is "
        "tokenizer.json as it is, and fills the rows of the embedding"
    ),
    "tokenizer.ggml.token_type": (
        "of Qwen 2, the added token; of Phi-3 the converter takes every special token for a control token"
    ),
    "context_length": "ours says the length up to which llama.cpp, without sliding windows for Mistral, does the same",
    "attention.layer_norm_rms_epsilon": "no Nemotron model has it read by llama.cpp",
    "rope.scaling.type": "without it llama.cpp scales by a factor of one",
    "rope.dimension_count": SAID,
    "rope.freq_base": SAID,
    "rope.scaling.yarn_beta_fast": SAID,
    "rope.scaling.yarn_beta_slow": SAID,
    "rope.scaling.original_context_length": "transformers' default, which matters beside longrope's factors alone",
    "vocab_size": "ours says it; llama.cpp counts the tokens where the key is missing",
    "attention.key_length": SAID,
    "attention.value_length": SAID,
    "attention.sliding_window": "no window, as without the key",
    "attention.sliding_window_pattern": (
        "ours says which layers have a window; without it llama.cpp takes every second layer of Gemma 2 and five of "
        "six of Gemma 3, whatever config.json says (here, of Gemma 3, two of three)"
    ),
}
# Tensor -> why ours differs.
TENSOR_REASONS = {
    "rope_freqs.weight": "the factors of Llama 3's rule, which ours computes in float64 and the converter in float32",
    "attn_q.weight": (
        "the converter passes over query_pre_attn_scalar, and llama.cpp divides by the size of heads; ours has the "
        "ratio in the queries"
    ),
}


@dataclass
class Compared:
    """One model in one type, or several whose keys differ alike.

    keys: key, without the family's name -> our value and the converter's, in words, where they differ.
    tensors: name -> how it differs.
    """

    num_tensors: int
    num_keys: int
    keys: dict[str, tuple[str, str]]
    tensors: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="where the converter and sentencepiece go")
    parser.add_argument("--llama-cpp", type=Path, help="a checkout of llama.cpp; default that of the sdist")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="directories of further checkpoints")
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS), help="these tiny models")
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    args = parser.parse_args()
    if unsafe := [path for path in args.models if runs_code(path)]:
        parser.error(f"{unsafe[0]} names code of its own (auto_map), which the converter would run")
    assert {MODELS[name].variant.partition("-")[0] for name in MODELS} >= {name.split("_")[0] for name in FAMILIES}
    converter = Converter(args.environment, args.llama_cpp)
    results: dict[str, dict[str, Compared]] = {}
    refused: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        for name, path, rule in [*made(args.only, Path(directory), converter), *((p.name, p, "") for p in args.models)]:
            try:
                results[name] = {kind: compared(path, kind, converter, rule, Path(directory)) for kind in TYPES}
            except (GgufError, ConverterError) as error:
                who = "ours refuses" if isinstance(error, GgufError) else "the converter fails"
                refused.append(f"- {name}: {who}: {str(error).replace(str(path), '.')}")
            print(name, "refused" if name not in results else "compared", file=sys.stderr, flush=True)
    publish(report(results, refused, args.llama_cpp), args.out)


def runs_code(path: Path) -> bool:
    files = (path / "config.json", path / "tokenizer_config.json")
    return any("auto_map" in json.loads(file.read_text()) for file in files if file.exists())


class ConverterError(Exception):
    """The converter wrote no file; the last line that it printed."""


class Converter:
    """llama.cpp's converter, and what it needs beside this process's packages."""

    def __init__(self, directory: Path, llama_cpp: Path | None):
        self.packages = directory / "packages"
        if not (self.packages / "sentencepiece").exists():
            pip("install", "--no-deps", "--target", str(self.packages), SENTENCEPIECE)
        self.script = (llama_cpp or sdist(directory)).resolve() / CONVERTER

    def python(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # The package gguf is that beside the converter, and the packages are looked for before this process's.
        paths = [str(self.script.parent / "gguf-py"), str(self.packages.resolve())]
        paths += [str(self.script.parent)] if (self.script.parent / "gguf").is_dir() else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    def convert(self, path: Path, kind: str, rule: str, out: Path) -> None:
        out.unlink(missing_ok=True)
        options = ["--outtype", kind.lower(), "--outfile", str(out)]
        done = self.python(RUNNER, str(self.script), rule, str(path), *options)
        if done.returncode or not out.exists():
            raise ConverterError((done.stderr.strip().splitlines() or ["nothing said"])[-1])


def sdist(directory: Path) -> Path:
    """The part of llama.cpp's tree that converts."""
    name = SDIST.replace("==", "-").replace("-cpp-python", "_cpp_python")
    tree = directory / name / "vendor/llama.cpp"
    if not (tree / CONVERTER).exists():
        package, _ = SDIST.split("==")
        pip("download", "--no-deps", "--no-binary", package, "--dest", str(directory), SDIST)
        archive = directory / f"{name}.tar.gz"
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != DIGEST:
            raise SystemExit(f"{archive} has the sha256 {found}, and not {DIGEST}")
        with tarfile.open(archive) as packed:
            inside = f"{name}/vendor/llama.cpp/"
            wanted = [m for m in packed.getmembers() if m.name.removeprefix(inside).startswith(PARTS)]
            packed.extractall(directory, members=wanted, filter="data")
    return tree


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]], check=True)


def made(names: list[str], directory: Path, converter: Converter) -> Iterator[tuple[str, Path, str]]:
    """Each tiny model: its name, its directory, and the name of the rule that splits text."""
    for name in names:
        of = MODELS[name]
        path = tiny.checkpoint(of.variant, directory / re.sub(r"[^\w.-]+", "-", name), **of.changes)
        if of.pieces is None:
            save_byte_tokenizer(path)
        else:
            trained = converter.python(TRAINER, str(path), of.pieces)
            assert trained.returncode == 0, trained.stderr
        if of.has_card:
            (path / "README.md").write_text(CARD)
            file = path / "generation_config.json"
            file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | SAMPLING))
        yield name, path, "gpt-2"


def compared(path: Path, kind: str, converter: Converter, rule: str, work: Path) -> Compared:
    ours, theirs = work / "ours.gguf", work / "theirs.gguf"
    model = describe_gguf(open_checkpoint(path))
    write_gguf(model, ours, plain_types(model, BlockType[kind]), keys=file_keys(kind, None, ""))
    converter.convert(path, kind, rule, theirs)
    read = [gguf.GGUFReader(file) for file in (ours, theirs)]
    one, other = ({tensor.name: tensor for tensor in file.tensors} for file in read)
    names = sorted(one.keys() | other.keys())
    tensors = {name: words for name in names if (words := unlike(one.get(name), other.get(name)))}
    said, wanted = ({key: of for key, of in file.fields.items() if not key.startswith("GGUF.")} for file in read)
    keys = sorted(said.keys() | wanted.keys())
    family = f"{model.table.name}."
    differing = {
        key.removeprefix(family): both(key, said.get(key), wanted.get(key))
        for key in keys
        if value(said, key) != value(wanted, key)
    }
    return Compared(len(names), len(keys), differing, tensors)


def unlike(one: Any, other: Any) -> str:
    """How two tensors differ; empty if they are equal."""
    if one is None or other is None:
        return f"only {'the converter' if one is None else 'ours'} has it"
    facts = [(BlockType(of.tensor_type).name, [int(size) for size in of.shape]) for of in (one, other)]
    if facts[0] != facts[1]:
        return f"{facts[0]} and {facts[1]}"
    if one.data.tobytes() == other.data.tobytes():
        return ""
    values = [gguf.quants.dequantize(of.data, of.tensor_type).astype("float64") for of in (one, other)]
    return f"{(abs(values[0] - values[1])).max() / abs(values[1]).max():.1e} of the largest value"


def value(fields: dict[str, Any], key: str) -> Any:
    return None if key not in fields else (fields[key].contents(), fields[key].types)


def both(key: str, one: Any, other: Any) -> tuple[str, str]:
    """Two values in words; of two lists of one length, how many entries differ and the first of those."""
    ours, theirs = (None if of is None else of.contents() for of in (one, other))
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        at = [index for index in range(len(ours)) if ours[index] != theirs[index]]
        order = (
            f", order of merged tokens {'equal' if same_order(ours, theirs) else 'DIFFERENT'}"
            if "scores" in key
            else ""
        )
        return f"{ours[at[0]]!r} at {at[0]}", f"{theirs[at[0]]!r}, {len(at)} of {len(ours)} differ{order}"
    if ours == theirs:
        return f"{ours!r} as {one.types[0].name}", f"as {other.types[0].name}"
    first, second = ("missing" if of is None else f"{of!r:.80}" for of in (ours, theirs))
    return first, second


def same_order(ours: list[float], theirs: list[float]) -> bool:
    """Whether the tokens that merges make, which are all but the lowest of ours, have the same order."""
    merged = [index for index, score in enumerate(ours) if score > min(ours)]
    return sorted(merged, key=lambda index: -ours[index]) == sorted(merged, key=lambda index: -theirs[index])


def report(results: dict[str, dict[str, Compared]], refused: list[str], llama_cpp: Path | None) -> str:
    common = set.intersection(*(set(of.keys) for by_type in results.values() for of in by_type.values()))
    rows, tensors = [], []
    for name, by_type in results.items():
        of = by_type["F32"]
        equal = ", ".join(str(by_type[kind].num_tensors - len(by_type[kind].tensors)) for kind in TYPES)
        same = ", ".join(str(by_type[kind].num_keys - len(by_type[kind].keys)) for kind in TYPES)
        keys = dict.fromkeys(key for kind in TYPES for key in by_type[kind].keys if key not in common)
        rows.append([name, f"{equal} of {of.num_tensors}", f"{same} of {of.num_keys}", ", ".join(keys) or "no other"])
        for tensor in dict.fromkeys(tensor for kind in TYPES for tensor in by_type[kind].tensors):
            words = {kind: by_type[kind].tensors[tensor] for kind in TYPES if tensor in by_type[kind].tensors}
            said = ", ".join(f"{kind}: {how}" for kind, how in words.items())
            why = next((why for end, why in TENSOR_REASONS.items() if tensor.endswith(end)), None)
            tensors.append(f"- {name}, {tensor}: {said}. {sentence(why)}")
    source = "another checkout of llama.cpp" if llama_cpp else f"llama.cpp as vendored by {SDIST.replace('==', ' ')}"
    return f"""{header("F32, F16 and BF16 GGUF files against llama.cpp's own converter")}
convert_hf_to_gguf.py of {source}, with the gguf package beside it.
Tensors are equal in name, type, shape and bytes, keys in type and value: in the files of {", ".join(TYPES)}, of all
that either file has. Of the tiny models the converter was told the rule that splits text. The last column has the
keys that differ besides {", ".join(sorted(common))}, which differ in all.

{table(["model", "tensors equal", "keys equal", "keys that differ"], rows)}

In all, {totals(results)}.

Tensors that differ:

{chr(10).join(tensors) or "- none"}

Keys that differ, ours first, without the name of the family:

{chr(10).join(differences(results))}

Not compared:

{chr(10).join(refused) or "- none"}
"""


def totals(results: dict[str, dict[str, Compared]]) -> str:
    """Over all models, the tensors and keys that are equal in all types."""
    of = [compared for by_type in results.values() for compared in by_type.values()]
    tensors, keys = sum(one.num_tensors for one in of), sum(one.num_keys for one in of)
    equal, same = tensors - sum(len(one.tensors) for one in of), keys - sum(len(one.keys) for one in of)
    return f"{equal:,} of {tensors:,} tensors and {same:,} of {keys:,} keys are equal in {len(of)} pairs of files"


def differences(results: dict[str, dict[str, Compared]]) -> list[str]:
    """A line for each key that differs: its values, the models that have them, and why."""
    found: dict[str, dict[tuple[str, str], dict[str, None]]] = {}
    for name, by_type in results.items():
        for of in by_type.values():
            for key, pair in of.keys.items():
                found.setdefault(key, {}).setdefault(pair, {})[name] = None
    lines = []
    for key, values in sorted(found.items()):
        said = []
        for number, ((ours, theirs), names) in enumerate(values.items()):
            if number < 2:
                where = "all models" if len(names) == len(results) else "; ".join(names)
                said.append(f"{ours} and {theirs} ({where})")
        more = f", and others in {len(values) - 2} more cases" if len(values) > 2 else ""
        lines.append(f"- `{key}`: {', '.join(said)}{more}. {sentence(REASONS.get(key))}")
    return lines


def sentence(why: str | None) -> str:
    return f"{why[0].upper()}{why[1:]}." if why else "NOT EXPLAINED."


if __name__ == "__main__":
    main()
