"""Rows that share prefixes have the likelihoods and continuations that each has alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from minitron.evaluation.tasks import blocks, packing
from minitron.evaluation.tasks.packing import Most, Row, common_length, packs, prefix_tree, rows_may_share
from minitron.model.checkpoint import load_model

pytest.importorskip("lm_eval")
NO_LIMIT = Most(tokens=10_000, wanted=10_000, rows=10_000, prefix=10_000)
# All in one call; a kept prefix for calls of a few tokens; prefixes within prefixes; nothing kept; each row alone.
LIMITS = {
    "one call": NO_LIMIT,
    "a kept prefix": Most(tokens=25, wanted=1000, rows=100, prefix=1000),
    "prefixes in prefixes": Most(tokens=9, wanted=6, rows=2, prefix=28),
    "nothing kept": Most(tokens=50, wanted=1000, rows=100, prefix=0),
    "rows alone": Most(tokens=1, wanted=1, rows=1, prefix=1000),
}


def few_shot_rows() -> tuple[list[Row], list[int]]:
    """Sorted rows: examples, questions, endings, of which one begins as another does; and two of their own."""
    draw = random.Random(0)

    def tokens(count: int) -> Row:
        return tuple(draw.randrange(tiny.SIZES["vocab_size"]) for _ in range(count))  # type: ignore[call-overload]

    examples = tokens(20)
    questions = [examples + tokens(6 + number) for number in range(3)]
    rows = {question + tokens(draw.randint(1, 4)) for question in questions for _ in range(3)}
    rows |= {*questions, tokens(30), tokens(9)}
    return sorted(rows), [draw.randint(1, 3) for _ in rows]


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_every_row_is_in_one_pack_within_the_limits(limits: Most, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST_PREFIX_TOKENS", 4)
    rows, wanted = few_shot_rows()
    found = packs(rows, wanted, limits)
    assert [row for pack in found for row in range(pack.start, pack.stop)] == list(range(len(rows)))
    for pack in found:
        tree = prefix_tree(rows[pack.start : pack.stop], pack.prefix)
        for row, path in zip(rows[pack.start : pack.stop], tree.paths, strict=True):
            assert row[: pack.prefix] + tuple(tree.tokens[list(path)].tolist()) == row
            assert tree.positions[list(path)].tolist() == list(range(pack.prefix, len(row)))
        distinct = {row[:end] for row in rows[pack.start : pack.stop] for end in range(pack.prefix + 1, len(row) + 1)}
        assert len(tree.tokens) == len(distinct), "what rows have in common is there once"
        assert pack.prefix <= limits.prefix
        assert all(len(rows[at]) - wanted[at] >= pack.prefix for at in range(pack.start, pack.stop))
        if pack.stop - pack.start > 1:
            assert len(tree.tokens) <= limits.tokens and pack.stop - pack.start <= limits.rows


def test_a_common_beginning_is_computed_once_for_all_calls() -> None:
    """As in MMLU, whose subjects have the same examples before every question."""
    examples = tuple(range(200))
    rows = sorted(examples + (500 + number,) * 40 for number in range(10))
    found = packs(rows, [1] * len(rows), Most(tokens=90, wanted=100, rows=100, prefix=1000))
    assert [(pack.stop - pack.start, pack.prefix) for pack in found] == [(2, 200)] * 5
    assert common_length(rows[0], rows[1]) == 200


def test_blocks_of_a_tree_see_what_its_nodes_see(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = few_shot_rows()[0]
    for least in (1, 3, 8, 1000):
        monkeypatch.setattr(blocks, "LEAST_NODES", least)
        for prefix, some in ((0, rows), (20, [row for row in rows if row[:20] == rows[2][:20]])):
            tree = prefix_tree(some, prefix)
            found = blocks.tree_blocks(tree, prefix, windowed=False)
            assert [node for one in found for node in range(*one.nodes)] == list(range(len(tree.tokens)))
            for one in found:
                keys = [key for part in one.keys for key in range(*part)]
                assert keys == sorted({*keys}), "in order, and each once"
                for node in range(*one.nodes):
                    above = [at for at in range(node + 1) if tree.ends[at] > node]
                    seen = [*range(prefix), *(prefix + at for at in above)]
                    assert {*seen} <= {*keys}
                    assert not one.causal or seen == [key for key in keys if key <= prefix + node]


@pytest.mark.parametrize("directory", [*tiny.FIRST.values(), "mistral-window"], indirect=True)
def test_likelihoods_are_those_of_each_row_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.evaluation.tasks.shared import Asked, SharedForward

    monkeypatch.setattr(packing, "LEAST_PREFIX_TOKENS", 4)
    monkeypatch.setattr(blocks, "LEAST_NODES", 6)
    model, (rows, wanted) = load_model(directory, torch.float32), few_shot_rows()
    alone = [tiny.logits(model, torch.tensor([row]))[0].log_softmax(-1) for row in rows]
    for limits in LIMITS.values():
        forward = SharedForward(model, rows)
        for pack in packs(rows, wanted, limits):
            places = [(row, len(rows[row]) - back) for row in range(pack.start, pack.stop) for back in (1, wanted[row])]
            asked = [Asked(row, at, (7 * row + at) % 320) for row, at in places]
            nats, likeliest = forward.log_likelihoods(pack, asked)
            expected = torch.stack([alone[one.row][one.position, one.token] for one in asked])
            torch.testing.assert_close(nats, expected, atol=1e-5, rtol=0)
            assert likeliest.tolist() == [int(alone[one.row][one.position].argmax()) for one in asked]


@pytest.mark.parametrize("directory", ["llama", "gemma2", "gemma3", "smollm3", "phi3"], indirect=True)
def test_greedy_continuations_are_those_of_transformers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron.evaluation.tasks.greedy import Stops, continuations

    monkeypatch.setattr(packing, "LEAST_PREFIX_TOKENS", 4)
    model, rows = load_model(directory, torch.float32), few_shot_rows()[0][::2]
    tokenizer = tiny.tokenizer(directory.parent / "tokenizer")
    plan = packs(rows, [1] * len(rows), LIMITS["a kept prefix"])
    stops = Stops(frozenset(range(0, 320, 6)), (), most=8, lookback=3)
    found = continuations(model, tokenizer, rows, plan, stops)
    assert len({len(made) for made in found}) > 1, "rows end at different times"
    for row, made in zip(rows, found, strict=True):
        given = torch.tensor([row])
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(
            given, attention_mask=torch.ones_like(given), eos_token_id=sorted(stops.tokens), **options
        )
        assert made == tuple(expected[0, len(row) :].tolist())


def test_a_continuation_ends_at_a_stop_text_across_tokens(tmp_path: Path) -> None:
    from minitron.evaluation.tasks.greedy import Stops, continuations

    tiny.checkpoint("llama", tmp_path)
    model, tokenizer, (rows, _) = load_model(tmp_path), tiny.tokenizer(tmp_path), few_shot_rows()
    plan = packs(rows, [1] * len(rows), NO_LIMIT)
    (whole, *_) = continuations(model, tokenizer, rows, plan, Stops(frozenset(), (), most=12, lookback=4))
    text = tokenizer.decode(whole[4:6])
    (made, *_) = continuations(model, tokenizer, rows, plan, Stops(frozenset(), (text,), most=12, lookback=4))
    assert text in tokenizer.decode(made) and made == whole[: len(made)] and len(made) < len(whole)


def test_rows_do_not_share_where_rotary_positions_follow_the_longest() -> None:
    from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config

    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    small: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "pad_token_id": 0}
    assert rows_may_share(LlamaConfig()) and rows_may_share(Gemma3TextConfig())
    assert not rows_may_share(Phi3Config(rope_parameters=longrope, original_max_position_embeddings=16, **small))
