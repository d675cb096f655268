"""A first draft of the table of an unsupported model type, from its config.json and the shapes of its tensors.

A tensor gets a line by its name, and only if its sizes agree with the line: dims coincide too often for sizes alone. A
line that the shape does not prove is marked, and a tensor without a line is listed with the reason. A new table starts
from a draft, and is finished when the laws of the test suite hold, see docs/extend/family.md.
"""

import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from minitron.model.architecture import DIMS, Architecture

# Dim -> its keys in config.json, the usual key first.
KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels"),
    "vocab": ("vocab_size",),
}
Q, KV = "heads*head_dim", "kv_heads*head_dim"
QKV, UP, DOWN, GATE_UP = f"{Q}+{KV}+{KV}", "ffn hidden", "hidden ffn", "ffn+ffn hidden"
NORM, HEAD = r".*norm.*|ln_.*|ln\d?", "lm_head|embed_out|output"
# The modules of a layer that contain a tensor's module.
AREAS = {"attention": "(self_)?att(n|ention)", "mlp": "mlp|ffn|feed_?forward"}
INSIDE = (*AREAS, "layer")
# The area of a module and its name -> its axes, the most likely first. `layer` is directly in a layer, `stack` beside
# the list of layers, `outside` anywhere else.
TENSOR_ROLES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("attention", "q_proj|query|wq", (f"{Q} hidden",)),
    ("attention", "k_proj|v_proj|key|value|wk|wv", (f"{KV} hidden",)),
    ("attention", "w?qkv|qkv_proj|query_key_value|c_attn", (f"{QKV} hidden",)),
    ("attention", "o_proj|out_proj|wo|dense|c_proj", (f"hidden {Q}",)),
    ("attention", "q_?(layer_?)?(norm|ln)", ("head_dim", Q, "heads head_dim")),
    ("attention", "k_?(layer_?)?(norm|ln)", ("head_dim", KV, "kv_heads head_dim")),
    ("attention", NORM, (Q, "hidden")),
    ("mlp|layer", "gate(_proj)?|up(_proj)?|fc1|fc_in|c_fc|dense_h_to_4h|w3", (UP, GATE_UP)),
    ("mlp|layer", "gate_up_proj|up_gate_proj", (GATE_UP,)),
    ("mlp|layer", "down(_proj)?|fc2|fc_out|dense_4h_to_h", (DOWN,)),
    ("mlp", "c_proj|dense|wo", (DOWN,)),
    ("mlp", "w1|w2", (UP, DOWN)),
    ("mlp", NORM, ("ffn", "hidden")),
    ("stack|outside", f"embed_tokens|wte|embed_in|(word|tok)_embeddings|{HEAD}", ("vocab hidden",)),
    ("layer|stack", NORM, ("hidden",)),
)
EXPERTS = re.compile("expert|router|moe")
# Dims that a config may lack, each with a matrix whose outputs give its size, in the order in which they are derived.
TOLD_BY = (
    ("vocab", "vocab hidden"), ("head_dim", f"{Q} hidden"), ("head_dim", f"{QKV} hidden"), ("kv_heads", f"{KV} hidden"),
    ("kv_heads", f"{QKV} hidden"), ("ffn", UP), ("ffn", GATE_UP),
)  # fmt: skip
# The names of the norms before attention and before the MLP. The last name counts only if there is a norm before
# attention: other families have a norm of this name after it.
NORM_BEFORE = {
    "attention": ("input_layernorm", "ln_1", "ln_attn", "self_attn_layer_norm", "norm_1", "attention_norm",
                  "attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_ff_layernorm", "ln_2", "ln_mlp", "norm_2",
            "ffn_norm", "feedforward_layernorm", "final_layer_norm", "post_attention_layernorm"),
}  # fmt: skip
# The axes that are tried where the name is unknown.
AXES = ("vocab", "hidden", "ffn", Q, KV, "head_dim", "heads", "kv_heads", "ffn+ffn", QKV)
FUSED = "the shape does not tell segments laid end to end, as written, from segments interleaved per head, group or row"
NEXT_STEPS = (
    "Next (docs/extend/family.md): with the model's forward in transformers, settle the doubtful lines ({doubtful}) "
    "and place the unplaced tensors ({unplaced}); add conditions, for one checkpoint shows one config; fill the columns"
    " that no tensor shows; add the table to FAMILIES and a variant to tests/helpers/tiny.py, and run the tests."
)


@dataclass(frozen=True)
class Unplaced:
    """A tensor without a line; `*` in the name is an index that is not the layer's."""

    name: str
    shape: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Draft:
    """A table to be checked. `derived` explains sizes that config.json lacks, `ambiguous` the doubts about lines of
    `tensors`, and `notes` anything that no line can express."""

    model_type: str
    config_keys: Mapping[str, str]
    sizes: Mapping[str, int]
    derived: Mapping[str, str]
    tensors: Mapping[str, str]
    ambiguous: Mapping[str, str]
    unplaced: tuple[Unplaced, ...]
    norms: Mapping[str, str]
    fields: Mapping[str, str]  # the Architecture's layer, embedding, head and final_norm, where not the usual
    notes: tuple[str, ...]

    def text(self) -> str:
        """The Python source of the table, then as comments the tensors without a line, the notes and the next steps."""
        keys, tensors = list[str](), list[str]()
        for dim in DIMS:
            if dim in self.derived or dim not in self.sizes:
                found = f"{self.sizes[dim]}, {self.derived[dim]}" if dim in self.sizes else "not found"
                keys += _comment(f"{dim}: {found}", "        ")
            keys += _entries({dim: self.config_keys[dim]} if dim in self.config_keys else {})
        for name, line in self.tensors.items():
            tensors += _comment(f"doubtful: {self.ambiguous[name]}", "        ") if name in self.ambiguous else []
            tensors += _entries({name: line})
        steps = NEXT_STEPS.format(unplaced=len(self.unplaced), doubtful=len(self.ambiguous))
        remarks = [f"unplaced: {tensor.name} {list(tensor.shape)}: {tensor.why}" for tensor in self.unplaced]
        lines = [
            "from minitron.model.architecture import Architecture",
            "",
            f"{re.sub('[^A-Z0-9]', '_', self.model_type.upper())} = Architecture(",
            f"    name={json.dumps(self.model_type)},",
            *("    config_keys={", *keys, "    },"),
            *("    tensors={", *tensors, "    },"),
            *("    norms={  # guessed by name", *_entries(self.norms), "    },"),
            *(f"    {field}={json.dumps(name)}," for field, name in self.fields.items()),
            *(")", ""),
            *(line for remark in (*remarks, *self.notes, steps) for line in _comment(remark)),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Stored:
    """A stored tensor: its shape and area, its axes by name, and the problem that keeps it out of the table."""

    shape: tuple[int, ...]
    area: str
    readings: tuple[str, ...]
    problem: str


def draft_table(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Draft:
    """Guess the table of a checkpoint from its config.json, and the names and shapes of its tensors."""
    nested = "layers" not in _keys(config) and isinstance(config.get("text_config"), Mapping)
    section = config["text_config"] if nested else config
    keys = _keys(section)
    sizes = {dim: section[key] for dim, key in keys.items() if _is_size(section[key])}
    layer, num_layers = _layer_list(shapes, sizes.get("layers"))
    found = _patterns(shapes, layer, num_layers)
    sizes, derived = _derive(sizes, num_layers, found)
    tensors, ambiguous, turned = _lines(found, sizes)
    fields, norms = _modules(tensors, found, layer)
    tied = "head" not in fields and section.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    switches = [key for key, value in section.items() if isinstance(value, bool) and re.search("bias|norm|tie_", key)]
    lists = [key for key, value in section.items() if isinstance(value, list) and len(value) == num_layers]
    bare = " and ".join(list(AREAS)[sum("{layer}" in norm for norm in norms) :])
    notes = {
        "The keys stand in text_config; an Architecture reads the top level of config.json.": nested,
        "No index in the tensor names runs over all layers.": not layer,
        f"Stored as [in, out], where minitron takes axis 1 for the input: {', '.join(turned)}.": turned,
        'Tied embeddings, so no head is stored; untied: "lm_head.weight": "vocab hidden ?!tie_word_embeddings".': tied,
        f"No norm found before {bare}: it may stand after, serve both, or feed a module without a line.": bare,
        f"Switches of the config that may be conditions: {', '.join(switches)}.": switches,
        f"Lists as long as there are layers, perhaps per_layer_keys: {', '.join(lists)}.": lists,
    }
    return Draft(
        model_type=str(config.get("model_type", "unknown")),
        config_keys=keys,
        sizes=sizes,
        derived=derived,
        tensors=tensors,
        ambiguous=ambiguous,
        unplaced=tuple(
            Unplaced(name, of.shape, _why(name, of, sizes)) for name, of in found.items() if name not in tensors
        ),
        norms=norms,
        fields={field: name for field, name in fields.items() if name != getattr(Architecture, field)},
        notes=tuple(note for note, holds in notes.items() if holds),
    )


def _keys(section: Mapping[str, Any]) -> dict[str, str]:
    """The key of each dim in the config; a key with a size is preferred."""
    there = {dim: [key for key in spellings if key in section] for dim, spellings in KEYS.items()}
    return {dim: min(keys, key=lambda key: not _is_size(section[key])) for dim, keys in there.items() if keys}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _layer_list(shapes: Mapping[str, tuple[int, ...]], num_layers: int | None) -> tuple[str, int]:
    """The module of a layer, with `{layer}`, and the number of layers; empty and 0 if no index runs over all layers.

    If several lists are long enough, such as the list of another tower or of experts, the one with most weights counts.
    """
    indices: dict[str, set[int]] = defaultdict(set)
    weights: dict[str, int] = defaultdict(int)
    for name, shape in shapes.items():
        for index in re.finditer(r"(?:^|(?<=\.))(0|[1-9][0-9]{0,4})(?=\.)", name):
            indices[name[: index.start()]].add(int(index[1]))
            weights[name[: index.start()]] += prod(shape)
    length = {prefix: num_layers or len(seen) for prefix, seen in indices.items()}
    whole = [prefix for prefix in indices if sum(i < length[prefix] for i in indices[prefix]) == length[prefix]]
    prefix = max(whole, key=lambda prefix: weights[prefix], default=None)
    return ("", 0) if prefix is None else (prefix + "{layer}", length[prefix])


def _patterns(shapes: Mapping[str, tuple[int, ...]], layer: str, num_layers: int) -> dict[str, _Stored]:
    """The stored tensors by name, with `{layer}` for the index of a layer and `*` for others; outside layers first."""
    members: dict[str, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    inside = re.compile(re.escape(layer.removesuffix("{layer}")) + r"([0-9]{1,5})\.(.+)")
    for name, shape in shapes.items():
        match = inside.fullmatch(name)
        index, rest = (int(match[1]), match[2]) if match and int(match[1]) < num_layers else (-1, name)
        rest = re.sub(r"(?:^|(?<=\.))[0-9]+(?=\.|$)", "*", rest)
        if not name.endswith(Architecture.ignored_suffixes):
            members[rest if index < 0 else f"{layer}.{rest}"].append((index, shape))
    mixtures = tuple(name.partition("experts.")[0] for name in members if ".experts." in name)
    found = {}
    for name in sorted(members, key=lambda name: "{layer}" in name):
        layers, several = sorted({index for index, _ in members[name]}), sorted({shape for _, shape in members[name]})
        problems = {
            "a mixture of experts, for which there is no dim": EXPERTS.search(name) or name.startswith(mixtures),
            "it has an index that is not the layer's": "*" in name,
            f"only in layers {str(layers)[1:-1]} of {num_layers}": -1 not in layers and len(layers) < num_layers,
            f"of several shapes: {str(list(map(list, several)))[1:-1]}": len(several) > 1,
        }
        problem = "; ".join(problem for problem, holds in problems.items() if holds)
        found[name] = _Stored(several[0], *_role(name, layer), problem)
    return found


def _role(name: str, layer: str) -> tuple[str, tuple[str, ...]]:
    """The area of a tensor's module, and the axes of its weight by the name."""
    parents, _, leaf = name.rpartition(".")[0].rpartition(".")
    if layer and f"{parents}.".startswith(f"{layer}."):
        inner = parents.removeprefix(layer).split(".")[1:]
        inside = [area for area, names in AREAS.items() if all(re.fullmatch(names, part) for part in inner)]
        area = "layer" if not inner else inside[0] if inside else "other"
    else:
        area = "stack" if parents == layer.removesuffix("{layer}").rstrip(".").rpartition(".")[0] else "outside"
    known = (
        axes for areas, names, axes in TENSOR_ROLES if re.fullmatch(areas, area) and re.fullmatch(names, leaf.lower())
    )
    return area, next(known, ())


def _size(line: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a line; if a dim is unknown, a shape that no tensor has."""
    if not set(re.findall(r"\w+", line)) <= sizes.keys():
        return (-1,)
    parts = ([[sizes[dim] for dim in part.split("*")] for part in axis.split("+")] for axis in line.split())
    return tuple(sum(map(prod, axis)) for axis in parts)


def _derive(
    said: Mapping[str, int], num_layers: int, found: Mapping[str, _Stored]
) -> tuple[dict[str, int], dict[str, str]]:
    """The sizes, with sizes that only tensors show, and an explanation of these."""
    sizes, derived = dict(said), dict[str, str]()
    if num_layers and "layers" not in sizes:
        sizes["layers"], derived["layers"] = num_layers, "counted in the tensor names"
    matrices = [(name, of) for name, of in found.items() if of.readings and len(of.shape) == 2 and not of.problem]
    for dim, line in TOLD_BY:
        axis = line.split()[0]
        for name, of in matrices:
            # The axis of the outputs is the one that is not hidden, in either order on disk.
            outputs = of.shape[1] if of.shape[0] == sizes.get("hidden") else of.shape[0]
            (without,), (each,) = (_size(axis, sizes | {dim: value}) for value in (0, 1))
            size, rest = divmod(outputs - without, max(each - without, 1))
            if dim not in sizes and of.readings[0] == line and without >= 0 and size > 0 and not rest:
                sizes[dim], derived[dim] = size, f"from {axis} = {outputs} in {name}"
        if line == f"{QKV} hidden" and "head_dim" not in sizes and {"hidden", "heads"} <= sizes.keys():
            sizes["head_dim"], derived["head_dim"] = sizes["hidden"] // sizes["heads"], "hidden / heads"
    return sizes, derived


def _fits(of: _Stored, sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The axes by name that agree with the shape: as stored, and with the axes of a layer's matrix exchanged."""
    turned = [" ".join(line.split()[::-1]) for line in of.readings if of.area in INSIDE and " " in line]
    straight, turned = ([line for line in lines if _size(line, sizes) == of.shape] for lines in (of.readings, turned))
    return straight, turned


def _lines(found: Mapping[str, _Stored], sizes: Mapping[str, int]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """The line of each name, the doubts by name, and the names of matrices that are stored as [in, out]."""
    weights = {name: _fits(of, sizes) for name, of in found.items() if name.endswith(".weight") and not of.problem}
    matrices = [weights[name] for name in weights if found[name].area in INSIDE and len(found[name].shape) == 2]
    # Square matrices follow the matrices that fit in one order only; if these disagree, none is exchanged.
    is_turned = {bool(turned) for straight, turned in matrices if bool(straight) != bool(turned)} == {True}
    lines, doubts, turned_names = dict[str, str](), dict[str, str](), list[str]()
    for name, (straight, turned) in weights.items():
        # Each line with its output axis, which is also the axis of the bias.
        options = [(line, line.split()[-1]) for line in turned if is_turned]
        options += [(line, line.split()[0]) for line in straight]
        if not options:
            continue
        lines[name], output = options[0]
        turned_names += [name] if is_turned and turned else []
        if why := [f"{line!r} fits too" for line, _ in options[1:]] + [FUSED] * ("+" in lines[name]):
            doubts[name] = "; ".join(why)
        bias = found.get(name.removesuffix("weight") + "bias")
        if bias and not bias.problem and _size(output, sizes) == bias.shape:
            lines[name.removesuffix("weight") + "bias"] = output
            if "+" in output or {output} != {other for _, other in options}:
                doubts[name.removesuffix("weight") + "bias"] = f"as {name}"
    return {name: lines[name] for name in found if name in lines}, doubts, turned_names


def _why(name: str, of: _Stored, sizes: Mapping[str, int]) -> str:
    """The reason why a tensor has no line, with the axes that it may have."""
    if of.problem:
        return "; ".join([of.problem, *(f"by its name {line!r}" for line in _fits(of, sizes)[0])])
    expected = ((line, _size(line, sizes)) for line in of.readings)
    by_name = " or ".join(f"{line!r} = {list(size) if min(size) > 0 else 'unknown'}" for line, size in expected)
    reasons = [f"by its name {by_name}" if by_name else "no name that is known"]
    if name.endswith(".bias"):
        reasons = ["not the outputs of a weight that has a line"]
    for axis, size in enumerate(of.shape):
        by_size = " or ".join(line for line in AXES if _size(line, sizes) == (size,))
        reasons.append(f"axis {axis} is {size}: {by_size or 'no product of dims'}")
    return "; ".join(reasons)


def _modules(
    lines: Mapping[str, str], found: Mapping[str, _Stored], layer: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The fields of an Architecture that name a module or a tensor, and its norms."""
    fields, norms = {"layer": layer} if layer else {}, dict[str, str]()
    fed: dict[str, str] = {}  # "attention" or "mlp" -> its module
    before: dict[str, str] = {}  # last part of the name of a norm directly in the layer -> its module
    for name, line in lines.items():
        module, area = name.rpartition(".")[0], found[name].area
        parent, _, leaf = module.rpartition(".")
        if line == "vocab hidden":
            fields.setdefault("head" if re.fullmatch(HEAD, leaf) else "embedding", name)
        elif area == "stack" and "emb" not in leaf:
            fields["final_norm"] = module
        elif area == "layer" and line == "hidden":
            before.setdefault(leaf, module)
        elif area in INSIDE:
            fed.setdefault(area.replace("layer", "mlp"), module if area == "layer" else parent)
    for area, names in NORM_BEFORE.items():
        norm = next((before[name] for name in names if name in before), None)
        if norm is None or area not in fed:
            break
        norms[norm] = fed[area]
    if "final_norm" in fields:
        norms[fields["final_norm"]] = fields.get("head", Architecture.head).removesuffix(".weight")
    return fields, norms


def _entries(rows: Mapping[str, str]) -> list[str]:
    return [f"        {json.dumps(key)}: {json.dumps(value)}," for key, value in rows.items()]


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 120, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")
