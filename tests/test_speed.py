"""Speed has the structure and signs that the report relies on; how fast is the machine's own affair."""

import json
from pathlib import Path

import pytest
import tiny

from minitron.evaluate.speed import _summarize, measure_speed


def test_both_models_are_measured(tmp_path: Path) -> None:
    models = {
        "teacher": tiny.model(tiny.checkpoint("llama", tmp_path / "teacher")),
        "student": tiny.model(tiny.checkpoint("llama", tmp_path / "student", num_hidden_layers=1)),
    }
    speeds = measure_speed(models, prompt_tokens=8, new_tokens=8, rounds=2)
    assert list(speeds) == ["teacher", "student"]
    for speed in speeds.values():
        facts = json.loads(json.dumps(speed.to_dict()))
        assert (facts["prompt_tokens"], facts["new_tokens"]) == (8, 8)
        for name in ("prefill", "decode"):
            low, high = facts[f"{name}_range"]
            assert 0 < low <= facts[name] <= high


def test_rates_are_medians_over_rounds_with_their_range() -> None:
    # Seconds of the prompt, and of the prompt with 10 new tokens; the last round was disturbed.
    speed = _summarize([(0.5, 1.5), (1.0, 3.0), (0.25, 0.75), (2.0, 1.0)], prompt_tokens=100, new_tokens=10)
    assert speed.prefill == pytest.approx(150) and speed.prefill_range == pytest.approx((50, 400))
    assert speed.decode == pytest.approx(10) and speed.decode_range == pytest.approx((5, 20))
