"""The config.json of a model in a GGUF file, by the family's table: the inverse of model_config.py.

A key of the file that could change what the model computes is read here, or the file is refused: no key is passed
over. What a file leaves out is what llama.cpp then computes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from minitron.core.errors import GgufError
from minitron.core.reading import Json
from minitron.core.text import either
from minitron.gguf.file import name_in_file
from minitron.gguf.model_config import llama3_factors, scaled_by
from minitron.gguf.parse import FileTensor
from minitron.gguf.reader import GgufFile
from minitron.model.architecture import Architecture, Gguf, Shape
from minitron.model.config_json import CONFIG_RULES
from minitron.model.families import TABLES

HEAD = "output.weight"
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_WINDOWED, _WHOLE = "sliding_attention", "full_attention"
_GEMMA2_WINDOW = 4096  # which llama.cpp takes where a file of that family states none
_USUAL_BOUND = 4.0  # the upper bound of Llama 3's rule in all published models, whose lower one is 1
_BASE = 10000.0  # of rotary positions, where a file states none
# Keys after the family's name that do not change the logits.
_WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.causal", "pooling_type")
# The values of yarn that transformers computes with where a config states none.
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "ext_factor": 1.0, "attn_factor": 1.0, "log_multiplier": 0.1}


def family_of_file(model: GgufFile) -> tuple[Architecture, Gguf]:
    """The table of a file's family: the first of that name in llama.cpp that can have such heads.

    Raises: GgufError for another family, and for a mixture of experts.
    """
    tables = [(table, table.gguf) for table in TABLES if table.gguf is not None and table.gguf.name == model.family]
    if not tables:
        known = either(sorted({table.gguf.name for table in TABLES if table.gguf is not None}))
        raise GgufError(
            f"{model.path} is a {model.family} model, which cannot be pruned here; files of {known} models can"
        )
    if model.of_family("expert_count"):
        raise GgufError(
            f"{model.path} is a mixture of {model.of_family('expert_count')} experts, which cannot be pruned here"
        )
    stated = Stated(model)
    uneven = stated.size("embedding_length") % stated.size("attention.head_count")
    # transformers refuses such llama models, and computes Mistral models in the same way.
    return next((pair for pair in tables if not (uneven and pair[0].hidden_multiple_of_heads)), tables[0])


class Stated:
    """The keys of a file that follow the family's name, with a memory of those that were asked for."""

    def __init__(self, model: GgufFile) -> None:
        self.model = model
        self._asked: set[str] = set()

    def get(self, key: str) -> Any:
        self._asked.add(key)
        return self.model.of_family(key)

    def number(self, key: str, default: int | float | None = None) -> int | float | None:
        """A number, in the fewest digits that mean the same in float32."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.damaged(key, "a number")
        return value if isinstance(value, int) else float(str(np.float32(value)))

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer, which may be stated once for each layer.

        Raises: GgufError if it is missing, or differs between layers.
        """
        value = self.get(key)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise GgufError(
                    f"{self.model.path}: its {self.model.family}.{key} differs between layers "
                    f"({either(map(str, sorted(set(value))))}), which no checkpoint can have here"
                )
            value = value[0]
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.damaged(key, "a positive integer")
        return value

    def damaged(self, key: str, rule: str) -> GgufError:
        return GgufError(
            f"{self.model.path}: its {self.model.family}.{key} is {self.model.of_family(key)!r}; it must be {rule}"
        )

    def refused(self, key: str, why: str) -> GgufError:
        value = self.model.of_family(key)
        return GgufError(f"{self.model.path}: its {self.model.family}.{key} is {value!r}, {why}")

    def require_all_asked(self) -> None:
        """Raises: GgufError for a key that nobody asked for, and that is not known to change nothing."""
        prefix = f"{self.model.family}."
        for name, value in self.model.said.items():
            key = name.removeprefix(prefix)
            if name.startswith(prefix) and key not in {*self._asked, *_WITHOUT_EFFECT} and value:
                raise self.refused(key, "a key that is not known here: the model would be computed without it")


def config_of_file(model: GgufFile) -> tuple[Architecture, Json]:
    """The table of a file's family, and a config.json of the function that llama.cpp computes of the file.

    Raises: GgufError for a family, a key or a value that no config here can express.
    """
    architecture, table = family_of_file(model)
    stated, tensors = Stated(model), {tensor.name: tensor for tensor in model.tensors}
    shape = _shape(stated, tensors, architecture)
    config: Json = {"model_type": architecture.name}
    config |= {key: getattr(shape, dim) for dim, key in architecture.config_keys.items()}
    config |= {key: values[0] for key, values in table.computes.items()}
    config |= _numbers(stated, table)
    config |= _switches(architecture, table, tensors)
    context = stated.size("context_length")
    config |= _windows(stated, table, shape)
    window = config.get("sliding_window") or stated.number("attention.sliding_window")
    # llama.cpp passes over the windows of these families: up to that length both are the same.
    config["max_position_embeddings"] = context if table.windows or not window else min(context, int(window))
    config |= _rope(stated, architecture, shape, config["max_position_embeddings"])
    if table.query_scale:
        config[table.query_scale] = scaled_by(table, shape)
    if table.no_rope_step:
        config["no_rope_layers"] = [int((layer + 1) % table.no_rope_step != 0) for layer in range(shape.layers)]
    for role, key in {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}.items():
        config[key] = token = model.said.get(f"tokenizer.ggml.{role}_token_id")
        if token is not None and not 0 <= token < shape.vocab:
            raise GgufError(
                f"{model.path}: its tokenizer.ggml.{role}_token_id is {token}; it must be one of its {shape.vocab:,} "
                "tokens"
            )
    stated.require_all_asked()
    return architecture, config


def _shape(stated: Stated, tensors: Mapping[str, FileTensor], architecture: Architecture) -> Shape:
    """The sizes; the vocabulary is that of the embedding, which may be larger than the tokenizer's."""
    path, hidden, heads = stated.model.path, stated.size("embedding_length"), stated.size("attention.head_count")
    if "token_embd.weight" not in tensors:
        raise GgufError(f"{path} lacks token_embd.weight, the embedding: it is no whole model")
    if stated.size("block_count") > len(tensors):
        raise stated.refused("block_count", f"and the file has {len(tensors)} tensors in all")
    head_dim = stated.size("attention.key_length", hidden // heads)
    if stated.size("attention.value_length", head_dim) != head_dim:
        raise stated.refused("attention.value_length", f"but key heads have {head_dim}")
    if architecture.heads_fill_hidden and hidden != heads * head_dim:
        raise GgufError(
            f"{path}: {heads} heads of {head_dim} do not make hidden={hidden}, which is the only size that a "
            f"{architecture.name} checkpoint can have"
        )
    return Shape(
        layers=stated.size("block_count"),
        hidden=hidden,
        ffn=stated.size("feed_forward_length"),
        heads=heads,
        kv_heads=stated.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=tensors["token_embd.weight"].shape[0],
    )


def _numbers(stated: Stated, table: Gguf) -> Json:
    """The numbers that the file states, or that llama.cpp takes where it states none."""
    found: Json = {}
    for key, own in table.keys.items():
        value = stated.number(key)
        usual = table.unsaid.get(own, "")
        if value is None and usual:
            if not usual.isdigit():
                raise stated.damaged(key, f"stated: without it llama.cpp takes {usual}")
            value = float(usual)
        if value is None and not CONFIG_RULES[own].null:
            raise stated.damaged(key, "stated: llama.cpp does not load the file without it")
        found[own] = value
    return found


def _switches(architecture: Architecture, table: Gguf, tensors: Mapping[str, FileTensor]) -> Json:
    """The switches of config.json that say which tensors there are, by the tensors that are there."""
    found: Json = {}
    for name, line in architecture.tensors.items():
        condition = line.partition("?")[2]
        if condition and not condition.startswith("!"):
            own = name_in_file(table, 1, name.format(layer=0))
            found[condition] = found.get(condition, False) or own in tensors
    return found | {"tie_word_embeddings": is_tied(tensors)}


def is_tied(tensors: Mapping[str, FileTensor]) -> bool:
    """Whether the output projection is the embedding: it is missing, or a copy to the byte."""
    head, embedding = tensors.get(HEAD), tensors["token_embd.weight"]
    if head is None:
        return True
    alike = (head.kind, head.shape) == (embedding.kind, embedding.shape)
    return alike and np.array_equal(head.stored(), embedding.stored())


def _windows(stated: Stated, table: Gguf, shape: Shape) -> Json:
    if not table.windows:
        return {"sliding_window": None}  # some families have one where their config says nothing
    default = _GEMMA2_WINDOW if table.name == "gemma2" else None
    window, pattern = stated.size("attention.sliding_window", default), stated.get("attention.sliding_window_pattern")
    if pattern is None or (isinstance(pattern, int) and not isinstance(pattern, bool)):
        step = pattern or table.window_step
        pattern = [(layer + 1) % step != 0 for layer in range(shape.layers)]
    if not isinstance(pattern, list) or len(pattern) < shape.layers:
        raise stated.damaged("attention.sliding_window_pattern", f"a number, or a list for {shape.layers} layers")
    kinds = [_WINDOWED if windowed else _WHOLE for windowed in pattern[: shape.layers]]
    return {"sliding_window": window, "layer_types": kinds}


def _rope(stated: Stated, architecture: Architecture, shape: Shape, context: int) -> Json:
    table = architecture.gguf
    assert table is not None
    base = float(stated.number("rope.freq_base", _BASE) or _BASE)
    turned = stated.size("rope.dimension_count", shape.head_dim)
    rule: Json = {"rope_type": "default", "rope_theta": base} | _scaling(stated, base, turned, context)
    if table.partial_rotary:
        rule["partial_rotary_factor"] = turned / shape.head_dim
    elif turned != shape.head_dim:
        raise stated.refused("rope.dimension_count", f"but the heads of a {architecture.name} model turn whole")
    if rule["rope_type"] not in table.scalings:
        raise stated.refused(
            "rope.scaling.type", f"but a {architecture.name} model here has {either(table.scalings)} positions"
        )
    if not architecture.rope_per_layer_kind:
        return {"rope_parameters": rule}
    local = float(stated.number("rope.freq_base_swa", _BASE) or _BASE)
    return {"rope_parameters": {_WHOLE: rule, _WINDOWED: {"rope_type": "default", "rope_theta": local}}}


def _scaling(stated: Stated, base: float, turned: int, context: int) -> Json:
    """The rule by which rotary positions are stretched; empty for none."""
    tensors = {tensor.name: tensor for tensor in stated.model.tensors if tensor.name in ROPE_TENSORS}
    if ROPE_TENSORS[0] in tensors:
        return _llama3(stated, _factors(tensors[ROPE_TENSORS[0]]), base, turned)
    kind, factor = stated.get("rope.scaling.type"), stated.number("rope.scaling.factor", 1.0)
    before = stated.number("rope.scaling.original_context_length")
    if ROPE_TENSORS[1] in tensors and ROPE_TENSORS[2] in tensors:
        return _longrope(stated, tensors, int(before or context), context)
    attention = stated.number("rope.scaling.attn_factor", 1.0)
    if attention != 1.0:
        raise stated.refused("rope.scaling.attn_factor", "which is known here for longrope alone")
    if kind == "yarn":
        for name, usual in _YARN.items():
            if stated.number(f"rope.scaling.yarn_{name}", usual) != usual:
                raise stated.refused(f"rope.scaling.yarn_{name}", f"but only {usual:g} is known here")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(before or context)}
    if kind not in (None, "none", "linear"):
        raise stated.refused("rope.scaling.type", "which is no rule that is known here")
    return {"rope_type": "linear", "factor": factor} if kind != "none" and factor != 1.0 else {}


def _factors(tensor: FileTensor) -> np.ndarray:
    return tensor.stored().view(np.float32)


def _longrope(stated: Stated, tensors: Mapping[str, FileTensor], before: int, context: int) -> Json:
    rule: Json = {"rope_type": "longrope", "original_max_position_embeddings": before}
    for length in ("long", "short"):
        factors = _factors(tensors[f"rope_factors_{length}.weight"])
        rule[f"{length}_factor"] = [float(str(factor)) for factor in factors]
    attention = stated.number("rope.scaling.attn_factor", 1.0) or 1.0
    scale = context / before
    usual = float(np.sqrt(1 + np.log(scale) / np.log(before))) if scale > 1 else 1.0
    return rule if np.isclose(attention, usual, rtol=1e-6) else rule | {"attention_factor": attention}


def _llama3(stated: Stated, factors: np.ndarray, base: float, turned: int) -> Json:
    """Llama 3's rule by its factors of frequencies.

    Factors are the same for bounds and context that are all a multiple, so the lower bound is taken as 1.
    """
    wave = 2 * np.pi * base ** (np.arange(0, turned, 2) / turned)
    factor = float(str(np.float32(factors.max())))
    if len(factors) == len(wave) and factor > 1:
        for high, before in _bounds(factors, factor, wave):
            rule = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
            rule |= {"original_max_position_embeddings": before}
            made = llama3_factors(rule, base, turned)
            if torch.allclose(made, torch.from_numpy(factors.copy()), rtol=1e-5):
                return {"rope_type": "llama3"} | rule
    raise GgufError(f"{stated.model.path}: its {ROPE_TENSORS[0]} follow no rule that is known here: Llama 3's is")


def _bounds(factors: np.ndarray, factor: float, wave: np.ndarray) -> Iterator[tuple[float, int]]:
    """Yield upper bounds and contexts of a Llama 3 rule that may make the factors, those of published models first."""
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    if between.any():
        yield _USUAL_BOUND, round(float(np.median(wave[between] * (smooth[between] * (_USUAL_BOUND - 1) + 1))))
    yield from ((_USUAL_BOUND, 2**power) for power in range(8, 21))
    if between.sum() > 1:  # a line over frequencies, whose two numbers are the two unknown ones
        slope, start = np.polyfit(1 / wave[between], smooth[between], 1)
        if start < 0 < slope:
            high = round(1 - 1 / float(start), 3)
            yield high, max(1, round(float(slope) * (high - 1)))
