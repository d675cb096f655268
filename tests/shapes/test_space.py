"""The feasible shapes are all those within the budgets and no other, and each is counted exactly."""

import re
from dataclasses import replace
from itertools import product
from typing import Any

import published
import pytest
from teachers import REAL, TEACHER
from transformers import AutoConfig

from minitron.core.errors import PlanError
from minitron.model.architecture import PRUNABLE, Architecture, Shape, count_terms, kv_cache_bytes
from minitron.model.families import FAMILIES, family_of
from minitron.pruning.config import PruneConfig
from minitron.pruning.target import default_multiple, parse_target, require_cuttable
from minitron.shapes.space import (
    ABOVE,
    FFN_STEPS,
    HIDDEN_STEPS,
    WINDOW,
    Candidate,
    Machine,
    SearchConfig,
    feasible,
    parse_sizes,
)

# (layers, heads, ffn, hidden) of P1's appendix, "Search Space".
P1_CANDIDATES = {
    *((32, *rest) for rest in ((32, 12800, 5120), (32, 13824, 4608), (48, 11520, 4608), (48, 16384, 4096))),
    *((31, *rest) for rest in ((32, 12800, 5120), (32, 16128, 4608), (48, 13824, 4608), (48, 16384, 4096))),
    *((30, *rest) for rest in ((32, 12800, 5120), (32, 16128, 4608), (48, 13824, 4608), (48, 16384, 4096))),
    *((29, *rest) for rest in ((32, 12800, 5120), (32, 16128, 4608), (48, 13824, 4608))),
}
P1_SPACE = {"layers": "29-32", "heads": "32,48", "ffn": "2.5x,3x,3.5x,4x", "hidden": "4096,4608,5120,5632,6144"}
ALL = {"layers": "1-4", "hidden": "12-32/2", "ffn": "1-40/5", "heads": "1-8", "kv_heads": "1-4"}
H100 = Machine(bytes_per_second=3.35e12, flops_per_second=989e12)


def search(
    target: str | None, family: str = "mistral", teacher: Shape = TEACHER, tied: bool = False, **settings: Any
) -> list[Candidate]:
    machine = settings.pop("machine", None)
    config = {"tie_word_embeddings": tied}
    prune = PruneConfig(target=target)
    return feasible(FAMILIES[family], config, teacher, prune, SearchConfig(**settings), itemsize=2, machine=machine)


def test_p1s_space_for_nemotron_15b_has_exactly_its_15_candidates() -> None:
    config = published.MODELS["Nemotron-4 15B"].config
    family = family_of(config)
    found = feasible(
        family,
        config,
        family.shape(config),
        PruneConfig(target="8.5B"),
        SearchConfig(least="7.8B", dims=P1_SPACE),
        itemsize=2,
    )
    assert len(found) == 15
    assert {(s.layers, s.heads, s.ffn, s.hidden) for s in (one.shape for one in found)} == P1_CANDIDATES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_polynomials_count_what_the_table_counts(family: str) -> None:
    table, other = FAMILIES[family], replace(TEACHER, layers=3, hidden=20, ffn=7, heads=5, kv_heads=1, vocab=11)
    for flags in ({}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}):
        terms = table.parameter_terms(flags)
        for shape in (TEACHER, other):
            counted = table.count(shape, flags)
            assert count_terms(terms, vars(shape)) == counted.total, flags
            assert count_terms(terms, vars(shape), kind="non_embedding") == counted.non_embedding, flags


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["mistral", "llama", "qwen2"])
def test_the_candidates_are_those_of_a_search_by_brute_force(family: str, tied: bool) -> None:
    table, config = FAMILIES[family], {"tie_word_embeddings": tied}
    have = table.count(TEACHER, config).non_embedding
    expected = set()
    for layers, hidden, ffn, heads, kv_heads in product(
        range(1, 5), range(12, 33, 2), range(5, 41, 5), range(1, 9), range(1, 5)
    ):
        shape = Shape(layers, hidden, ffn, heads, kv_heads, 4, 320)
        inside = 0.48 * have <= table.count(shape, config).non_embedding <= (1 + ABOVE) * 0.5 * have
        if inside and accepted(table, shape):
            expected.add(shape)
    found = [one.shape for one in search("50%", family, tied=tied, window=0.04, dims=ALL)]
    if family == "qwen2":  # heads fill hidden: of several kv heads, the table takes the most
        assert set(found) <= expected and {s.hidden for s in found} == {s.hidden for s in expected}
    else:
        assert len(found) == len(set(found)) and set(found) == expected


def accepted(table: Architecture, shape: Shape) -> bool:
    try:
        require_cuttable(TEACHER, shape)
        table.require_valid(shape)
    except PlanError:
        return False
    return True


@pytest.mark.parametrize("name", sorted(set(REAL) - {"tiny"}))
def test_the_default_space_holds_valid_shapes_within_the_window(name: str) -> None:
    family, teacher, tied = REAL[name]
    table, config = FAMILIES[family], {"tie_word_embeddings": tied}
    have = table.count(teacher, config).non_embedding
    found = search("60%", family, teacher, tied)
    assert found
    for one in found:
        require_cuttable(teacher, one.shape)
        table.require_valid(one.shape)
        assert one.costs.total == table.count(one.shape, config).total
        assert (1 - WINDOW) * 0.6 * have <= one.costs.non_embedding <= (1 + ABOVE) * 0.6 * have
    assert [one.costs.total for one in found] == sorted((one.costs.total for one in found), reverse=True)


@pytest.mark.parametrize(("name", "block"), [("llama-3.1-8b", 256), ("nemotron-4-15b", 256), ("mistral-nemo-12b", 32)])
def test_shapes_for_gguf_are_those_that_llama_cpp_loads_in_whole_blocks(name: str, block: int) -> None:
    family, teacher, tied = REAL[name]
    free = [one.shape for one in search("60%", family, teacher, tied)]
    fills = family == "nemotron"
    clean = {
        shape
        for shape in free
        if not any(size % block for size in (shape.hidden, shape.ffn, shape.heads * shape.head_dim))
        and (not fills or shape.hidden == shape.heads * shape.head_dim)
    }
    assert {one.shape for one in search("60%", family, teacher, tied, gguf_block=block)} == clean
    assert clean and (len(clean) < len(free)) == (block == 256)


def test_no_shape_for_gguf_says_the_rules() -> None:
    with pytest.raises(PlanError, match=r"gguf_block=256 asks for \(hidden, ffn and heads \* head_dim in multiples of"):
        search("60%", dims={"hidden": "16-32/8"}, gguf_block=256)


@pytest.mark.parametrize("name", sorted(set(REAL) - {"tiny"}))
def test_a_target_of_a_real_model_is_met_within_half_a_percent_by_a_model_that_transformers_accepts(name: str) -> None:
    family, teacher, tied = REAL[name]
    table, config = FAMILIES[family], {"model_type": family, "tie_word_embeddings": tied}
    have = table.count(teacher, config).non_embedding
    for share in (95, 75, 50, 33, 20, 10):
        found = search(f"{share}%", family, teacher, tied)
        assert abs(found[0].costs.non_embedding / have - share / 100) <= ABOVE * share / 100, share
        for one in (found[0].shape, found[-1].shape):
            accepted = AutoConfig.for_model(**table.config_for(config, one, []), pad_token_id=0)
            assert accepted.hidden_size == one.hidden


@pytest.mark.parametrize(("name", "target"), [("llama-3.1-8b", "4.5B"), ("mistral-nemo-12b", "8.4B"), ("tiny", "40K")])
def test_a_count_as_target_is_a_count_of_all_parameters(name: str, target: str) -> None:
    family, teacher, tied = REAL[name]
    _, wanted = parse_target(target)
    for one in search(target, family, teacher, tied):
        assert one.costs.total <= (1 + ABOVE) * wanted


def test_where_no_shape_comes_near_a_target_the_largest_below_it_are_taken() -> None:
    have = FAMILIES["mistral"].count(TEACHER, {}).non_embedding
    free = [one.costs.non_embedding for one in search("90%", dims={"layers": "1-2"}, window=0.9)]
    near = [count for count in free if count >= (1 - WINDOW) * max(free)]
    assert max(free) < (1 - WINDOW) * 0.9 * have
    assert [one.costs.non_embedding for one in search("90%", dims={"layers": "1-2"})] == near
    with pytest.raises(PlanError, match="no shape fits the budgets"):
        search("90%", dims={"layers": "1-2"}, window=WINDOW)


def test_query_heads_and_kv_heads_shrink_by_one_where_a_group_and_its_number_are_small() -> None:
    teacher = replace(REAL["smollm-135m"][1], heads=9, kv_heads=3)
    found = {(one.shape.heads, one.shape.kv_heads) for one in search("50%", "llama", teacher)}
    assert found == {(kv * group, kv) for kv in (1, 2, 3) for group in (1, 2, 3)}


def test_sizes_shrink_in_the_largest_power_of_two_that_leaves_enough_steps() -> None:
    assert [default_multiple(size, FFN_STEPS) for size in (28672, 14336, 4864, 1536, 400)] == [256, 128, 64, 32, 16]
    assert [default_multiple(size, HIDDEN_STEPS) for size in (8192, 4096, 896, 256, 64)] == [256, 128, 32, 16, 4]


def test_every_budget_holds_and_leaves_out_nothing_else() -> None:
    family, teacher, tied = REAL["llama-3.1-8b"]
    budgets = {
        "max_memory_bytes": 8.6e9,
        "max_kv_cache_bytes": 4.9e8,
        "max_decode_seconds": 2.5e-3,
        "max_prefill_seconds": 0.029,
    }
    common = {"context_tokens": 4096, "machine": H100, "window": 0.1}
    free = search("50%", family, teacher, tied, **common)
    bound = {one.name for one in search("50%", family, teacher, tied, **common, **budgets)}
    names = set(bound)
    for one in free:
        total = FAMILIES[family].count(one.shape, {}).total
        costs = one.costs
        assert costs.weight_bytes == 2 * total
        assert costs.kv_cache_bytes == 4096 * kv_cache_bytes(one.shape)
        limits = zip(
            (costs.weight_bytes, costs.kv_cache_bytes, costs.decode_seconds, costs.prefill_seconds),
            budgets.values(),
            strict=True,
        )
        assert (one.name in bound) == all(value is not None and value <= most for value, most in limits)
        names.discard(one.name)
    assert not names and 0 < len(bound) < len(free)
    for key, most in budgets.items():
        assert len(search("50%", family, teacher, tied, **common, **{key: most})) < len(free), f"{key} binds nothing"


def test_the_roofline_is_bandwidth_for_one_sequence_and_arithmetic_for_a_prompt() -> None:
    family, teacher, _ = REAL["llama-3.1-8b"]
    whole = {dim: str(getattr(teacher, dim)) for dim in PRUNABLE}
    (one,) = search("100%", family, teacher, context_tokens=1024, dims=whole, machine=H100)
    # 8.03e9 parameters but for the embedding's 0.525e9, in two bytes; a cache of 128 KiB a token
    read = 2 * (8_030_261_248 - 128256 * 4096) + 1024 * 131072
    assert one.costs.decode_seconds == pytest.approx(read / 3.35e12)
    # 2 operations a weight and token, 2 x 1024 a channel of attention (half the context, two products), one head row
    work = 1024 * (2 * 6_979_588_096 + 2 * 1024 * 32 * 32 * 128) + 2 * 128256 * 4096
    assert one.costs.prefill_seconds == pytest.approx(work / 989e12)
    (many,) = search("100%", family, teacher, context_tokens=1024, dims=whole, machine=H100, batch=2000)
    assert many.costs.decode_seconds > 2000 * 2 * (8_030_261_248 - 128256 * 4096) / 989e12


def test_bytes_per_parameter_are_those_of_the_file_that_the_weights_go_to() -> None:
    plain, small = search("50%", window=0.3), search("50%", window=0.3, bytes_per_parameter=0.5625)
    assert [one.costs.weight_bytes for one in small] == [0.5625 * one.costs.total for one in plain]
    assert [one.costs.kv_cache_bytes for one in small] == [one.costs.kv_cache_bytes for one in plain]


def test_sizes_are_numbers_ranges_in_multiples_and_factors_of_hidden() -> None:
    assert parse_sizes("hidden", "100-300, 1024-2048/512,7", 100).numbers == (7, 100, 200, 300, 1024, 1536, 2048)
    assert parse_sizes("ffn", "2.5x,3x,64", 32).factors == (2.5, 3.0)
    for dim, text in (("hidden", "2x"), ("ffn", "many"), ("ffn", "1-"), ("layers", "1-9/0"), ("ffn", "")):
        with pytest.raises(PlanError, match=f"search.dims {dim}='{text}': .* is no size such as 4096"):
            parse_sizes(dim, text, 1)


IMPOSSIBLE: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "one budget too small": (
        "50%",
        {"max_kv_cache_bytes": 1000.0},
        r"no shape fits the budgets, of 2,016 in the space: search.max_kv_cache_bytes \(kv_cache_bytes at most 1,000\) "
        r"leaves none by itself\. Nearest: layers=1 .* \(.*kv_cache_bytes 32,768\).* Raise a budget",
    ),
    "two that exclude each other": (
        "50%",
        {"least": "49%", "max_memory_bytes": 30e3},
        r"search.max_memory_bytes \(weight_bytes at most 30,000\)",
    ),
    "nothing asked": (
        None,
        {},
        r"size is not given: give prune.target \(--target-params\), sizes as prune.shape, or a budget",
    ),
    "another kind": ("50%", {"least": "10K"}, "search.least 10K must be in the kind of prune.target 50%"),
    "least alone": (None, {"least": "10K"}, "search.least needs prune.target"),
    "too large": ("9B", {}, "target 9B is larger than the model"),
    "unknown dim": ("50%", {"dims": {"fnn": "8"}}, "search.dims has unknown dim 'fnn'; did you mean 'ffn'"),
    "more than there is": ("50%", {"dims": {"ffn": "41"}}, "search.dims ffn=41: the teacher has ffn=40, and pruning"),
    "no such heads": ("50%", {"dims": {"heads": "7"}}, "no mistral model has a shape of search.dims heads=7"),
    "time without a machine": ("50%", {"max_decode_seconds": 1.0}, "a budget of time needs search.bytes_per_second"),
}


@pytest.mark.parametrize(("target", "settings", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_empty_search_says_which_budget_binds_and_what_is_near(
    target: str | None, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        search(target, **settings)


def test_a_budget_raised_to_what_the_nearest_shape_needs_admits_that_shape() -> None:
    with pytest.raises(PlanError) as error:
        search(None, max_memory_bytes=10e3)
    nearest = re.search(r"Nearest: layers=(\d+) hidden=(\d+) ffn=(\d+) .*? \(weight_bytes ([\d,]+)\)", str(error.value))
    assert nearest
    (found,) = search(None, max_memory_bytes=float(nearest[4].replace(",", "")))
    assert [found.shape.layers, found.shape.hidden, found.shape.ffn] == [int(nearest[n]) for n in (1, 2, 3)]
