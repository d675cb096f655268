"""The script for a GPU that is lent for minutes runs to its end, on toys and without one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def proof() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_proof
    finally:
        sys.path.remove(str(BENCHMARKS))
    return gpu_proof


def test_every_stage_runs_on_a_toy(proof: Any, tmp_path: Path) -> None:
    size, found = proof.SIZES["toy"], {}
    for stage, work in proof.STAGES.items():
        for name, words, _ in proof._runs_of(stage, size):
            if not proof.SETTINGS.get(name, {}).get("compile"):  # which takes most of a minute
                found[stage, name] = json.loads(json.dumps(work(size, tmp_path, **words)))
    assert found["resume", None]["equal"] and found["resume", None]["ended by"] == "Interrupted"
    apart = proof._compared(found["parity", "gpu"], found["parity", "cpu"])
    assert apart.keys() == set(size.families)
    assert all(values == {"statistics": 0, "losses": 0, "kl": 0, "same text": True} for values in apart.values())
    assert found["shared", None]["sharded"] == pytest.approx(found["shared", None]["alone"], rel=1e-4)
    assert all(found["steps", name]["peak bytes said"] > 0 for name in proof.SETTINGS if ("steps", name) in found)


def test_what_was_measured_is_kept_when_a_stage_fails(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu_proof.py", "--size", "toy", "--stages", "rates,models", "--out"]
    subprocess.run([*command, tmp_path / "proof.json"], check=True, capture_output=True)
    found = json.loads((tmp_path / "proof.json").read_text())
    assert found["rates"]["bfloat16 TFLOP/s"] > 0
    assert found["models"]["failed"] == 1 and "teacher" in found["models"]["stderr"]  # which no stage has written
