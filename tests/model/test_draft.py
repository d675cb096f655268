"""A draft gives what is known, marks what is guessed, and loses nothing."""

import ast
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.model.architecture import DIMS, Architecture, Shape
from minitron.model.draft import KEYS, Draft, draft_table
from minitron.model.families import FAMILIES

Q, KV = "heads*head_dim", "kv_heads*head_dim"
QKV = f"{Q}+{KV}+{KV}"
# All sizes differ, but for hidden = heads * head_dim where a family knows no other; or hidden, heads * head_dim, ffn
# and vocab are one size.
SIZES = {
    "different": {"vocab_size": 320, "hidden_size": 36, "intermediate_size": 40, "num_attention_heads": 4},
    "equal": {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 8},
}
GPT2_KEYS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
SPELLED = {"gpt2": GPT2_KEYS, "gpt_bigcode": GPT2_KEYS, "opt": {"intermediate_size": "ffn_dim"}}
GROUPED = {"num_key_value_heads": 2}
# Model type without a table -> what its config needs besides the sizes.
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_bigcode": {},
    "opt": {"word_embed_proj_dim": None},
    "gpt_neox": {},
    "starcoder2": GROUPED,
    "stablelm": GROUPED | {"use_qkv_bias": True},
    "cohere": GROUPED | {"use_qk_norm": True},
    "phi": GROUPED,
    "glm4": GROUPED | {"head_dim": 10},
    "mixtral": GROUPED | {"num_local_experts": 4},
}
NORMS = {"input_layernorm": "hidden", "post_attention_layernorm": "hidden"}
QKVO = {
    "self_attn.q_proj": f"{Q} hidden",
    "self_attn.k_proj": f"{KV} hidden",
    "self_attn.v_proj": f"{KV} hidden",
    "self_attn.o_proj": f"hidden {Q}",
}
GATED = {"mlp.gate_proj": "ffn hidden", "mlp.up_proj": "ffn hidden", "mlp.down_proj": "hidden ffn"}
QKV_BIASES = {"self_attn.q_proj": Q, "self_attn.k_proj": KV, "self_attn.v_proj": KV}
GPT2_LAYER = {"ln_1": "hidden", "ln_2": "hidden", "attn.c_proj": "hidden", "mlp.c_fc": "ffn", "mlp.c_proj": "hidden"}
# Model type -> module of a layer, its modules' weights, and their biases, in the axes of its own modeling code.
LAYERS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "gpt2": (
        "transformer.h",
        {"ln_1": "hidden", "ln_2": "hidden", "attn.c_attn": f"hidden {QKV}", "attn.c_proj": f"{Q} hidden"}
        | {"mlp.c_fc": "hidden ffn", "mlp.c_proj": "ffn hidden"},
        GPT2_LAYER | {"attn.c_attn": QKV},
    ),
    "gpt_bigcode": (
        "transformer.h",
        {"ln_1": "hidden", "ln_2": "hidden", "attn.c_attn": f"{QKV} hidden", "attn.c_proj": f"hidden {Q}"}
        | {"mlp.c_fc": "ffn hidden", "mlp.c_proj": "hidden ffn"},
        GPT2_LAYER | {"attn.c_attn": QKV},
    ),
    "opt": (
        "model.decoder.layers",
        {"self_attn_layer_norm": "hidden", "final_layer_norm": "hidden", "fc1": "ffn hidden", "fc2": "hidden ffn"}
        | {name.replace("o_proj", "out_proj"): line for name, line in QKVO.items()},
        {"self_attn_layer_norm": "hidden", "final_layer_norm": "hidden", "fc1": "ffn", "fc2": "hidden"}
        | QKV_BIASES | {"self_attn.out_proj": "hidden"},
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        NORMS | {"attention.query_key_value": f"{QKV} hidden", "attention.dense": f"hidden {Q}"}
        | {"mlp.dense_h_to_4h": "ffn hidden", "mlp.dense_4h_to_h": "hidden ffn"},
        NORMS | {"attention.query_key_value": QKV, "attention.dense": "hidden"}
        | {"mlp.dense_h_to_4h": "ffn", "mlp.dense_4h_to_h": "hidden"},
    ),
    "starcoder2": (
        "model.layers",
        NORMS | QKVO | {"mlp.c_fc": "ffn hidden", "mlp.c_proj": "hidden ffn"},
        NORMS | QKV_BIASES | {"self_attn.o_proj": "hidden", "mlp.c_fc": "ffn", "mlp.c_proj": "hidden"},
    ),
    "stablelm": ("model.layers", NORMS | QKVO | GATED, NORMS | QKV_BIASES),
    "cohere": (
        "model.layers",
        {"input_layernorm": "hidden"} | QKVO | GATED
        | {"self_attn.q_norm": "heads head_dim", "self_attn.k_norm": "kv_heads head_dim"},
        {},
    ),
    "phi": (
        "model.layers",
        {"input_layernorm": "hidden", "mlp.fc1": "ffn hidden", "mlp.fc2": "hidden ffn"}
        | {name.replace("o_proj", "dense"): line for name, line in QKVO.items()},
        {"input_layernorm": "hidden", "mlp.fc1": "ffn", "mlp.fc2": "hidden"}
        | QKV_BIASES | {"self_attn.dense": "hidden"},
    ),
    "glm4": (
        "model.layers",
        NORMS | QKVO | {"post_self_attn_layernorm": "hidden", "post_mlp_layernorm": "hidden"}
        | {"mlp.gate_up_proj": "ffn+ffn hidden", "mlp.down_proj": "hidden ffn"},
        QKV_BIASES,
    ),
    "mixtral": ("model.layers", NORMS | QKVO, {}),
}  # fmt: skip
USUAL = {"model.embed_tokens.weight": "vocab hidden", "model.norm.weight": "hidden"}
HEAD = {"lm_head.weight": "vocab hidden"}
# Model type -> weights and biases outside the layers.
OUTSIDE: dict[str, dict[str, str]] = {
    "gpt2": {"transformer.wte.weight": "vocab hidden"}
    | {"transformer.ln_f.weight": "hidden", "transformer.ln_f.bias": "hidden"},
    "opt": {"model.decoder.embed_tokens.weight": "vocab hidden"}
    | {"model.decoder.final_layer_norm.weight": "hidden", "model.decoder.final_layer_norm.bias": "hidden"},
    "gpt_neox": {"gpt_neox.embed_in.weight": "vocab hidden", "embed_out.weight": "vocab hidden"}
    | {"gpt_neox.final_layer_norm.weight": "hidden", "gpt_neox.final_layer_norm.bias": "hidden"},
    "starcoder2": USUAL | {"model.norm.bias": "hidden"},
    "stablelm": USUAL | HEAD | {"model.norm.bias": "hidden"},
    "cohere": USUAL,
    "phi": {"model.embed_tokens.weight": "vocab hidden", "lm_head.weight": "vocab hidden", "lm_head.bias": "vocab"}
    | {"model.final_layernorm.weight": "hidden", "model.final_layernorm.bias": "hidden"},
    "glm4": USUAL | HEAD,
    "mixtral": USUAL | HEAD,
}
OUTSIDE["gpt_bigcode"] = OUTSIDE["gpt2"]
GPT2_LINES = {"attn.c_attn.weight", "attn.c_attn.bias"}
# Model type -> lines of a layer that the shapes leave open; and those that equal sizes leave open too.
DOUBTFUL: dict[str, tuple[set[str], set[str]]] = {
    "gpt2": (GPT2_LINES | {"attn.c_proj.weight"}, {"mlp.c_fc.weight", "mlp.c_proj.weight"}),
    "gpt_bigcode": (GPT2_LINES, set()),
    "gpt_neox": ({"attention.query_key_value.weight", "attention.query_key_value.bias"}, set()),
    "glm4": ({"mlp.gate_up_proj.weight"}, set()),
}
MIXTRAL_MOE = "model.layers.{layer}.block_sparse_moe"
UNPLACED = {
    "gpt2": {"transformer.wpe.weight"},
    "gpt_bigcode": {"transformer.wpe.weight"},
    "opt": {"model.decoder.embed_positions.weight"},
    "mixtral": {f"{MIXTRAL_MOE}.gate.weight", *(f"{MIXTRAL_MOE}.experts.*.w{n}.weight" for n in (1, 2, 3))},
}
Stored = tuple[dict[str, Any], dict[str, tuple[int, ...]]]


def stored(path: Path) -> Stored:
    """The config and the tensor shapes of a directory, read by safetensors itself."""
    shapes = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return json.loads((path / "config.json").read_text()), shapes


def model_of(family: str, sizes: str, path: Path) -> Stored:
    """The same of a model that transformers makes."""
    options = SIZES[sizes] | {"num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    options = {SPELLED.get(family, {}).get(key, key): size for key, size in options.items()} | FAMILY_OPTIONS[family]
    if family == "opt":
        options["word_embed_proj_dim"] = options["hidden_size"]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).save_pretrained(path)
    return stored(path)


def llama(**changes: Any) -> Stored:
    """Config and shapes of a Llama of different sizes, written down by hand."""
    config = {"model_type": "new", "num_hidden_layers": 2, "hidden_size": 12, "intermediate_size": 20, "vocab_size": 30}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 5}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (30, 12),
        "model.norm.weight": (12,),
        "lm_head.weight": (30, 12),
    }
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.input_layernorm.weight": (12,),
            f"model.layers.{layer}.self_attn.q_proj.weight": (20, 12),
            f"model.layers.{layer}.self_attn.k_proj.weight": (10, 12),
            f"model.layers.{layer}.self_attn.v_proj.weight": (10, 12),
            f"model.layers.{layer}.self_attn.o_proj.weight": (12, 20),
            f"model.layers.{layer}.post_attention_layernorm.weight": (12,),
            f"model.layers.{layer}.mlp.gate_proj.weight": (20, 12),
            f"model.layers.{layer}.mlp.up_proj.weight": (20, 12),
            f"model.layers.{layer}.mlp.down_proj.weight": (12, 20),
        }
    return config | changes, shapes


def pasted(draft: Draft) -> Architecture:
    """The table of the draft's text, as Python reads it."""
    namespace: dict[str, Any] = {}
    exec(draft.text(), namespace)
    [table] = [value for value in namespace.values() if isinstance(value, Architecture)]
    return table


def why(draft: Draft) -> dict[str, str]:
    return {tensor.name: tensor.why for tensor in draft.unplaced}


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [*((variant, "as they are") for variant in tiny.VARIANTS), *((one, "equal") for one in tiny.FIRST.values())],
)
def test_the_draft_of_a_family_with_a_table_is_its_table(variant: str, sizes: str, tmp_path: Path) -> None:
    changes = {} if sizes == "as they are" else {"intermediate_size": 32, "vocab_size": 32, "num_key_value_heads": 8}
    config, shapes = stored(tiny.checkpoint(variant, tmp_path, **changes))
    table = FAMILIES[config["model_type"]]
    draft = draft_table(config, shapes)
    lines = {name: line.split(" ?")[0] for name, line in table.tensors.items() if name.format(layer=0) in shapes}
    assert draft.tensors == lines
    assert not draft.unplaced
    assert draft.sizes == vars(table.shape(config))
    # transformers stores a head_dim for some families that do not need one.
    assert {dim: key for dim, key in draft.config_keys.items() if dim in table.config_keys} == table.config_keys
    assert draft.config_keys.keys() - table.config_keys.keys() <= {"head_dim"}
    assert draft.norms == table.norms
    assert not draft.fields
    # The order of what is fused, as in phi3, is all that the shapes do not tell.
    assert draft.ambiguous.keys() == {name for name, line in lines.items() if "+" in line}


@pytest.mark.parametrize("sizes", SIZES)
def test_the_draft_of_a_family_without_a_table(sizes: str, tmp_path: Path) -> None:
    for family in FAMILY_OPTIONS:
        draft = draft_table(*model_of(family, sizes, tmp_path / family))
        prefix, weights, biases = LAYERS[family]
        inside = {f"{name}.weight": line for name, line in weights.items()}
        inside |= {f"{name}.bias": line for name, line in biases.items()}
        assert draft.tensors == OUTSIDE[family] | {f"{prefix}.{{layer}}.{name}": line for name, line in inside.items()}
        always, if_equal = DOUBTFUL.get(family, (set(), set()))
        doubtful = always | (if_equal if sizes == "equal" else set())
        assert draft.ambiguous.keys() == {f"{prefix}.{{layer}}.{name}" for name in doubtful}
        assert why(draft).keys() == UNPLACED.get(family, set())


@pytest.mark.parametrize("sizes", SIZES)
def test_the_pasted_text_predicts_every_tensor_that_is_placed(sizes: str, tmp_path: Path) -> None:
    for family in FAMILY_OPTIONS:
        config, shapes = model_of(family, sizes, tmp_path / family)
        draft = draft_table(config, shapes)
        table = pasted(draft)
        assert (table.name, table.tensors, table.norms) == (family, draft.tensors, draft.norms)
        assert table.config_keys == draft.config_keys
        assert sorted(draft.sizes) == sorted(DIMS)
        predicted = {spec.name: spec.shape(Shape(**draft.sizes)) for spec in table.specs(config, draft.sizes["layers"])}
        assert predicted.items() <= shapes.items()
        assert table.embedding in predicted
        assert table.head in predicted or config["tie_word_embeddings"]
        assert f"{table.final_norm}.weight" in predicted
        assert all(f"{norm.format(layer=1)}.weight" in predicted for norm in table.norms)
        left = shapes.keys() - predicted.keys()
        patterns = [name.replace("{layer}", "*").split(".") for name in why(draft)]
        for name in left:
            assert ["*" if part.isdigit() else part for part in name.split(".")] in patterns


@pytest.mark.parametrize(
    ("family", "options", "kv_heads", "fused"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}, 4, "self_attention.query_key_value"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 2, "self_attention.query_key_value"),
        ("mpt", {"n_layers": 2, "d_model": 40, "n_heads": 4}, 4, "attn.Wqkv"),
        ("gptj", {"n_layer": 2, "n_embd": 40, "n_head": 4, "rotary_dim": 4}, 4, None),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, 4, None),
        ("apertus", {"num_key_value_heads": 2}, 2, None),
    ],
)
def test_other_spellings_are_known(
    family: str, options: dict[str, Any], kv_heads: int, fused: str | None, tmp_path: Path
) -> None:
    """Nothing but learned positions and the activation's own parameters has no line, and only what is fused is open."""
    sizes = {"vocab_size": 320, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **sizes | options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    draft = draft_table(*stored(tmp_path))
    assert all("wpe" in name or "act_fn" in name for name in why(draft))
    assert draft.sizes["kv_heads"] == kv_heads
    assert {name.rpartition(".")[0].rpartition("{layer}.")[2] for name in draft.ambiguous} == (
        {fused} if fused else set()
    )
    assert len(draft.norms) == (2 if family == "gptj" else 3)


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("gpt2", {"h.{layer}.ln_1": "h.{layer}.attn", "h.{layer}.ln_2": "h.{layer}.mlp", "ln_f": "lm_head"}),
        (
            "opt",
            {"layers.{layer}.self_attn_layer_norm": "layers.{layer}.self_attn"}
            | {"layers.{layer}.final_layer_norm": "layers.{layer}.fc1", "final_layer_norm": "lm_head"},
        ),
        ("cohere", {"layers.{layer}.input_layernorm": "layers.{layer}.self_attn", "norm": "lm_head"}),
        ("mixtral", {"layers.{layer}.input_layernorm": "layers.{layer}.self_attn", "norm": "lm_head"}),
        (
            "gpt_neox",
            {"layers.{layer}.input_layernorm": "layers.{layer}.attention"}
            | {"layers.{layer}.post_attention_layernorm": "layers.{layer}.mlp", "final_layer_norm": "embed_out"},
        ),
    ],
)
def test_norms_are_guessed_by_name(family: str, norms: dict[str, str], tmp_path: Path) -> None:
    draft = draft_table(*model_of(family, "different", tmp_path))
    stack = LAYERS[family][0].rpartition(".")[0]
    heads = ("lm_head", "embed_out")
    assert draft.norms == {
        f"{stack}.{norm}": module if module in heads else f"{stack}.{module}" for norm, module in norms.items()
    }
    assert ("No norm found before mlp" in draft.text()) == (family in ("cohere", "mixtral"))


def test_the_text_of_gpt2(tmp_path: Path) -> None:
    text = draft_table(*model_of("gpt2", "different", tmp_path)).text()
    lines = text.splitlines()
    assert "GPT2 = Architecture(" in lines
    assert '    layer="transformer.h.{layer}",' in lines
    assert '    embedding="transformer.wte.weight",' in lines
    assert '    final_norm="transformer.ln_f",' in lines
    assert "        # head_dim: 9, hidden / heads" in lines
    doubtful = lines.index('        "transformer.h.{layer}.attn.c_proj.weight": "heads*head_dim hidden",')
    assert lines[doubtful - 1] == "        # doubtful: 'hidden heads*head_dim' fits too"
    fused = lines.index(f'        "transformer.h.{{layer}}.attn.c_attn.weight": "hidden {QKV}",')
    assert lines[fused - 2].startswith("        # doubtful: the shape does not tell segments laid end to end")
    tail = " ".join(line.lstrip("# ") for line in lines[lines.index(")") :])
    assert "unplaced: transformer.wpe.weight [64, 36]: no name that is known; axis 0 is 64: no product of dims" in tail
    assert "Stored as [in, out], where minitron takes axis 1 for the input: transformer.h.{layer}.attn.c_attn" in tail
    assert 'no head is stored; untied: "lm_head.weight": "vocab hidden ?!tie_word_embeddings"' in tail
    assert "Switches of the config that may be conditions: tie_word_embeddings." in tail
    assert "Next (docs/extend/family.md)" in tail
    assert "settle the doubtful lines (3) and place the unplaced tensors (1)" in tail
    assert max(map(len, lines)) <= 120


def test_a_draft_goes_through_json(tmp_path: Path) -> None:
    draft = draft_table(*model_of("mixtral", "different", tmp_path))
    again = json.loads(json.dumps(asdict(draft)))
    assert again["tensors"] == draft.tensors
    assert again["unplaced"][0] == {
        "name": f"{MIXTRAL_MOE}.experts.*.w1.weight",
        "shape": [40, 36],
        "why": "a mixture of experts, for which there is no dim; it has an index that is not the layer's",
    }


def test_a_text_config_inside_is_read_and_said() -> None:
    config, shapes = llama()
    nested = {"model_type": "seeing", "text_config": config, "vision_config": {"num_hidden_layers": 2}}
    # Another tower with as many layers, and the same names and sizes, but fewer weights.
    tower = {
        f"vision.model.layers.{layer}.self_attn.{name}_proj.weight": (12, 20) for layer in (0, 1) for name in "qkvo"
    }
    draft = draft_table(nested, shapes | tower)
    assert draft.model_type == "seeing"
    assert (draft.tensors, draft.config_keys, draft.sizes) == (
        draft_table(config, shapes).tensors,
        {dim: KEYS[dim][0] for dim in KEYS},
        draft_table(config, shapes).sizes,
    )
    assert "The keys stand in text_config" in draft.notes[0]
    assert why(draft)["vision.model.layers.*.self_attn.q_proj.weight"] == "it has an index that is not the layer's"


@pytest.mark.parametrize(
    ("dim", "keys"),
    [
        ("layers", "n_layer n_layers num_layers"),
        ("hidden", "n_embd d_model"),
        ("ffn", "n_inner ffn_dim ffn_hidden_size d_ff"),
        ("heads", "n_head n_heads num_heads"),
        ("kv_heads", "num_kv_heads multi_query_group_num"),
        ("head_dim", "kv_channels"),
    ],
)
def test_a_key_of_config_json_has_many_spellings(dim: str, keys: str) -> None:
    for key in keys.split():
        config, shapes = llama()
        config[key] = config.pop(KEYS[dim][0])
        draft = draft_table(config, shapes)
        assert draft.config_keys[dim] == key
        assert not draft.derived
        # The usual key without a size does not hide it.
        assert draft_table(config | {KEYS[dim][0]: None}, shapes) == draft


@pytest.mark.parametrize("dim", [dim for dim in DIMS if dim not in ("hidden", "heads")])
@pytest.mark.parametrize("value", ["left out", None, 0, True, [20, 20]])
def test_a_size_that_the_config_does_not_hold_is_derived(dim: str, value: Any) -> None:
    config, shapes = llama()
    whole = draft_table(config, shapes)
    config[KEYS[dim][0]] = value
    if value == "left out":
        del config[KEYS[dim][0]]
    draft = draft_table(config, shapes)
    assert (draft.sizes, draft.tensors, draft.derived.keys()) == (whole.sizes, whole.tensors, {dim})
    assert (dim in draft.config_keys) == (value != "left out")
    assert not whole.derived
    assert f"# {dim}: {whole.sizes[dim]}, {draft.derived[dim]}"[:80] in draft.text()


def test_kv_heads_that_do_not_come_out_whole_are_not_derived() -> None:
    config, shapes = llama()
    del config["num_key_value_heads"]
    shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": (11, 12) for layer in (0, 1) for name in "kv"}
    draft = draft_table(config, shapes)
    assert "kv_heads" not in draft.sizes
    assert "        # kv_heads: not found" in draft.text().splitlines()
    assert why(draft).keys() == {f"model.layers.{{layer}}.self_attn.{name}_proj.weight" for name in "kv"}


@pytest.mark.parametrize("dim", ["hidden", "heads"])
def test_without_a_size_what_is_made_of_it_is_unplaced(dim: str) -> None:
    config, shapes = llama()
    whole = draft_table(config, shapes).tensors
    del config[KEYS[dim][0]]
    draft = draft_table(config, shapes)
    assert draft.tensors == {name: line for name, line in whole.items() if dim not in line.replace("kv_heads", "")}
    assert f"        # {dim}: not found" in draft.text().splitlines()
    lost = why(draft)["model.layers.{layer}.self_attn.q_proj.weight"]
    assert lost.startswith("by its name 'heads*head_dim hidden' = unknown; axis 0 is 20: ffn")


def test_a_tensor_of_some_layers_is_reported_and_not_placed() -> None:
    config, shapes = llama()
    shapes["model.layers.1.self_attn.q_norm.weight"] = (5,)
    shapes["model.layers.1.mlp.up_proj.weight"] = (22, 12)
    draft = draft_table(config, shapes)
    assert why(draft) == {
        "model.layers.{layer}.self_attn.q_norm.weight": "only in layers 1 of 2; by its name 'head_dim'",
        "model.layers.{layer}.mlp.up_proj.weight": "of several shapes: [20, 12], [22, 12]; by its name 'ffn hidden'",
    }


def test_layers_beyond_the_configs_are_not_layers() -> None:
    config, shapes = llama()
    extra = {name.replace(".1.", ".2."): shape for name, shape in shapes.items() if ".1." in name}
    draft = draft_table(config, shapes | extra)
    assert draft.tensors == draft_table(config, shapes).tensors
    assert why(draft)["model.layers.*.mlp.up_proj.weight"] == "it has an index that is not the layer's"


def test_without_all_layers_no_layer_is_placed() -> None:
    config, shapes = llama(num_hidden_layers=3)
    draft = draft_table(config, shapes)
    assert draft.tensors == {"model.embed_tokens.weight": "vocab hidden", "lm_head.weight": "vocab hidden"}
    assert "No index in the tensor names runs over all layers." in draft.notes


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.{}.mlp.experts.gate_up_proj", (4, 12, 40), "a mixture of experts, for which there is no dim"),
        ("model.layers.{}.mlp.router.weight", (4, 12), "a mixture of experts, for which there is no dim"),
        # It has a known name and the size of gate_proj, and belongs to the experts beside it.
        ("model.layers.{}.mlp.gate.weight", (20, 12), "a mixture of experts, for which there is no dim"),
        ("model.layers.{}.mlp.experts.3.up_proj.weight", (20, 12), "a mixture of experts, for which there is no dim; "
         "it has an index that is not the layer's"),
        ("model.layers.{}.mamba.out_proj.weight", (12, 20), "no name that is known; axis 0 is 12: hidden; "
         "axis 1 is 20: ffn or heads*head_dim"),
        ("model.layers.{}.moe.gate.weight", (4, 12), "a mixture of experts, for which there is no dim"),
        ("model.layers.{}.mlp.shared_expert.up_proj.weight", (20, 12), "a mixture of experts, for which"),
        ("model.layers.{}.mlp.adapter.up_proj.weight", (20, 12), "no name that is known"),
        ("model.layers.{}.odd", (30, 5, 4, 2, 40), "axis 0 is 30: vocab; axis 1 is 5: head_dim; axis 2 is 4: heads; "
         f"axis 3 is 2: kv_heads; axis 4 is 40: ffn+ffn or {QKV}"),
        ("model.layers.{}.cross_attn.q_proj.weight", (20, 12), "no name that is known; axis 0 is 20: ffn or "
         "heads*head_dim; axis 1 is 12: hidden"),
        ("model.layers.{}.mlp.gate_proj.qweight", (20, 3), "'ffn hidden' = [20, 12]"),
        ("model.layers.{}.self_attn.o_proj.bias", (13,), "not the outputs of a weight that has a line; "
         "axis 0 is 13: no product of dims"),
        ("model.layers.{}.mlp.w1.weight", (12, 19), "by its name 'ffn hidden' = [20, 12] or 'hidden ffn' = [12, 20]; "
         "axis 0 is 12: hidden; axis 1 is 19: no product of dims"),
        # Turned round, while the other matrices are not.
        ("model.layers.{}.mlp.fc1.weight", (12, 20), "by its name 'ffn hidden' = [20, 12] or "
         "'ffn+ffn hidden' = [40, 12]"),
    ],
)  # fmt: skip
def test_what_fits_nowhere_is_unplaced_with_the_reason(name: str, shape: tuple[int, ...], reason: str) -> None:
    config, shapes = llama()
    if "mlp.gate.weight" in name:
        shapes |= {f"model.layers.{layer}.mlp.experts.0.fc1.weight": (20, 12) for layer in (0, 1)}
    shapes |= {name.format(layer): shape for layer in (0, 1)}
    pattern = name.format("{layer}").replace(".3.", ".*.")
    draft = draft_table(config, shapes)
    assert pattern not in draft.tensors
    assert reason in why(draft)[pattern]
    assert [tensor.shape for tensor in draft.unplaced if tensor.name == pattern] == [shape]


def test_a_vocabulary_of_another_size_is_said() -> None:
    config, shapes = llama(vocab_size=29)
    draft = draft_table(config, shapes)
    expected = "by its name 'vocab hidden' = [29, 12]; axis 0 is 30: no product of dims; axis 1 is 12: hidden"
    assert why(draft) == {"model.embed_tokens.weight": expected, "lm_head.weight": expected}


@pytest.mark.parametrize(
    ("name", "shape", "line", "doubt"),
    [
        ("self_attn.sub_norm", (12,), Q, "'hidden' fits too"),
        ("mlp.w2", (12, 12), "ffn hidden", "'hidden ffn' fits too"),
        ("mlp.sub_norm", (12,), "ffn", "'hidden' fits too"),
        ("mlp.fc1", (24, 12), "ffn+ffn hidden", "the shape does not tell"),
        ("self_attn.kqv", (36, 12), None, ""),
    ],
)
def test_a_name_with_two_readings_that_fit_is_doubtful(
    name: str, shape: tuple[int, ...], line: str | None, doubt: str
) -> None:
    """All of hidden, ffn and heads * head_dim are 12 here."""
    config, shapes = llama(intermediate_size=12, head_dim=3)
    draft = draft_table(config, shapes | {f"model.layers.{layer}.{name}.weight": shape for layer in (0, 1)})
    assert draft.tensors.get(f"model.layers.{{layer}}.{name}.weight") == line
    assert doubt in draft.ambiguous.get(f"model.layers.{{layer}}.{name}.weight", "")


@pytest.mark.parametrize(
    ("names", "shape", "line"),
    [
        ("self_attn.query attention.wq", (20, 12), f"{Q} hidden"),
        ("attn.key attn.value attention.wk attention.wv", (10, 12), f"{KV} hidden"),
        ("attention.wo attention.dense", (12, 20), f"hidden {Q}"),
        ("attn.qkv attn.wqkv attn.Wqkv attn.qkv_proj", (40, 12), f"{QKV} hidden"),
        ("attn.q_layer_norm attn.qln attn.k_norm attn.k_layernorm", (5,), "head_dim"),
        ("feed_forward.w1 feedforward.w3 mlp.up mlp.gate gate_proj fc1 mlp.fc_in", (20, 12), "ffn hidden"),
        ("gate_up_proj mlp.up_gate_proj ffn.gate_up_proj", (40, 12), "ffn+ffn hidden"),
        ("feed_forward.w2 mlp.wo mlp.dense mlp.c_proj mlp.down mlp.fc_out down_proj", (12, 20), "hidden ffn"),
        ("ln1 ln_mlp norm_2 attention_norm", (12,), "hidden"),
    ],
)
def test_a_name_is_known_in_many_spellings(names: str, shape: tuple[int, ...], line: str) -> None:
    config, shapes = llama()
    for name in names.split():
        draft = draft_table(config, shapes | {f"model.layers.{layer}.{name}.weight": shape for layer in (0, 1)})
        assert draft.tensors[f"model.layers.{{layer}}.{name}.weight"] == line


@pytest.mark.parametrize("name", ["tok_embeddings", "word_embeddings", "wte", "embed_in"])
@pytest.mark.parametrize("head", ["output", "embed_out"])
def test_embedding_and_head_are_told_apart(name: str, head: str) -> None:
    config, shapes = llama()
    renamed = {old.replace("embed_tokens", name).replace("lm_head", head): shape for old, shape in shapes.items()}
    table = pasted(draft_table(config, renamed))
    assert (table.embedding, table.head) == (f"model.{name}.weight", f"{head}.weight")
    assert table.norms["model.norm"] == head


@pytest.mark.parametrize(
    ("attention", "mlp"),
    [
        ("input_layernorm", "pre_feedforward_layernorm"),
        ("ln_1", "ln_2"),
        ("ln_attn", "ln_mlp"),
        ("self_attn_layer_norm", "pre_mlp_layernorm"),
        ("norm_1", "norm_2"),
        ("attention_norm", "ffn_norm"),
        ("attention_layernorm", "feedforward_layernorm"),
        ("input_layernorm", "pre_ff_layernorm"),
    ],
)
def test_norms_before_attention_and_mlp_are_known_by_name(attention: str, mlp: str) -> None:
    config, shapes = llama()
    shapes = {name.replace("input_layernorm", attention): shape for name, shape in shapes.items()}
    # Where the MLP has a norm of its own, the one after attention is that, and feeds nothing.
    shapes |= {f"model.layers.{layer}.{mlp}.weight": (12,) for layer in (0, 1)}
    norms = draft_table(config, shapes).norms
    assert list(norms) == [*(f"model.layers.{{layer}}.{name}" for name in (attention, mlp)), "model.norm"]
    assert list(norms.values()) == [*(f"model.layers.{{layer}}.{name}" for name in ("self_attn", "mlp")), "lm_head"]


def test_a_bias_is_in_doubt_with_its_matrix() -> None:
    config, shapes = llama(intermediate_size=12)
    for layer in (0, 1):
        shapes |= {f"model.layers.{layer}.mlp.w2.weight": (12, 12), f"model.layers.{layer}.mlp.w2.bias": (12,)}
    draft = draft_table(config, shapes)
    assert draft.tensors["model.layers.{layer}.mlp.w2.bias"] == "ffn"
    assert draft.ambiguous["model.layers.{layer}.mlp.w2.bias"] == "as model.layers.{layer}.mlp.w2.weight"


def test_names_without_a_prefix_and_old_buffers() -> None:
    config, shapes = llama()
    bare = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    buffers = {f"layers.{layer}.self_attn.rotary_emb.inv_freq": (3,) for layer in (0, 1)}
    draft = draft_table(config, bare | buffers)
    whole = draft_table(config, shapes)
    assert draft.tensors == {name.removeprefix("model."): line for name, line in whole.tensors.items()}
    assert not draft.unplaced
    assert draft.fields == {"layer": "layers.{layer}", "embedding": "embed_tokens.weight", "final_norm": "norm"}


def test_lists_of_the_layers_are_pointed_out() -> None:
    config, shapes = llama(layer_types=["full", "sliding"], eos_token_id=[1, 2, 3])
    assert (
        "Lists as long as there are layers, perhaps per_layer_keys: layer_types." in draft_table(config, shapes).notes
    )


@pytest.mark.parametrize("name", ["x\nimport os", 'a"; raise SystemExit', "\\", "..", "1", "", "0.0.0", "a.9999999.b"])
def test_the_text_holds_nothing_but_the_table_whatever_the_names(name: str) -> None:
    config, shapes = llama(model_type=f"new-{name}", **{f"{name} bias": True})
    draft = draft_table(config, shapes | {name: (7, 3), f"{name}.0.embed_tokens.weight": (30, 12)})
    assert [type(statement) for statement in ast.parse(draft.text()).body] == [ast.ImportFrom, ast.Assign]
    assert pasted(draft).name == f"new-{name}"
    assert pasted(draft).tensors == draft.tensors


def test_notes_are_only_of_what_holds() -> None:
    config, shapes = llama(tie_word_embeddings=True)
    assert draft_table(config, shapes).notes == ("Switches of the config that may be conditions: tie_word_embeddings.",)


def test_an_empty_checkpoint_is_drafted_as_nothing() -> None:
    draft = draft_table({"num_hidden_layers": 10**12, "hidden_size": "wide", "text_config": 3}, {})
    assert not draft.tensors
    assert draft.sizes == {"layers": 10**12}
    assert pasted(draft).name == "unknown"
