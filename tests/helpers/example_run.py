"""A finished run directory written by hand: small, complete, with plausible numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

TEACHER = {"layers": 4, "hidden": 8, "ffn": 12, "heads": 4, "kv_heads": 2, "head_dim": 4, "vocab": 100}
STUDENT = TEACHER | {"layers": 3, "hidden": 6, "ffn": 8, "heads": 2}
KEPT_LAYERS = [0, 1, 3]
QUALITY = {  # loss, bits per byte, KL, agreement
    "teacher": (1.5737, 0.593, None, None),
    "pruned": (5.2874, 1.992, 3.7261, 0.1663),
    "student": (3.8028, 1.4328, 2.2334, 0.3547),
    "scratch": (4.9001, 1.846, 3.3012, 0.2119),
}
TITLES = {"winogrande": "Winogrande", "mmlu": "MMLU"}
HOSTILE = "<script>alert(1)</script>\n    return x  # <b>&amp;"


REPAIRS = ["basis", "ffn_obs", "heads_obs"]


def write(
    path: Path,
    *,
    teacher: str = "acme/parent-3M",
    scratch: bool = True,
    speed: bool = True,
    repaired: bool = True,
    tasks: Sequence[str] = (),
    chosen_by: Sequence[str] = (),
) -> Path:
    """Write the run into `path`.

    Args:
        scratch: whether a model was also trained from scratch.
        speed: whether speed was measured.
        repaired: whether the records say how the cut was repaired; those of older runs do not.
        tasks: benchmarks that were measured, of which those of `chosen_by` had a say in the choice of layers.
    """
    models = ("teacher", "pruned", "student", *(["scratch"] if scratch else []))
    path.mkdir()
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe(teacher), sort_keys=False))
    results: dict[str, Any] = {
        "data": {"train_tokens": 9000, "heldout_tokens": 1000},
        "statistics": {"samples": 8, "tokens": 512},
        "scores": {},
        "plan": {"plan": "layers 4 -> 3, hidden 8 -> 6, ffn 12 -> 8, heads 4 -> 2"},
        "pruned": {"repairs": REPAIRS} if repaired else {},
        "student": {"training": {"steps": 40, "tokens": 2560, "seconds": 3.0}},
        "scratch": {"training": {"steps": 40, "tokens": 2560, "seconds": 2.0}},
        "evaluations": {"models": list(models)},
    }
    for name, result in results.items():
        if name != "scratch" or scratch:
            _dump(path / name / "record.json", _record(name, result))
    for name in models:
        _dump(path / "evaluations" / f"{name}.json", _evaluation(name))
    texts = {"prompt": "def f(", "teacher": "x):\n\treturn 1", "pruned": "", "student": HOSTILE}
    _dump(path / "evaluations" / "generations.json", [texts])
    if speed:
        _dump(path / "evaluations" / "speed.json", {"teacher": _speed(1000.0), "student": _speed(1900.0)})
    if tasks:
        of_models = {
            name: {task: _task(task, value) for task in tasks} for name, value in (("teacher", 0.8), ("student", 0.6))
        }
        kept = dict.fromkeys(tasks, 0.75)
        facts = {"tasks": of_models, "kept": kept, "chosen_by": list(chosen_by)}
        _dump(path / "evaluations" / "tasks.json", facts)
    _dump(path / "scores" / "scores.json", _scores())
    _dump(path / "plan" / "plan.json", _plan())
    if repaired:
        _dump(path / "pruned" / "plan.json", _plan() | REPAIRED)
    (path / "distill").mkdir()
    (path / "distill" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _metrics()))
    return path


def recipe(teacher: str) -> dict[str, Any]:
    return {
        "model": teacher,
        "revision": None,
        "seed": 7,
        "scratch_baseline": False,
        "data": {"source": "/texts/train.jsonl", "heldout": None, "block_tokens": 64},
        "prune": {"target": "50%", "criterion": "activation"},
        "distill": {"tokens": 2560, "loss": "forward_kl", "evaluate_blocks": 16},
        "evaluate": {"blocks": 16, "prompts": ["def f(", "```\nfence"], "new_tokens": 60},
    }


def _evaluation(name: str) -> dict[str, Any]:
    loss, bits, kl, agreement = QUALITY[name]
    whole = name == "teacher"
    parts = (786432, 589824, 1769472, 2496) if whole else (589824, 442368, 663552, 1872)
    parameters = dict(zip(("embedding", "attention", "mlp", "norm"), parts, strict=True))
    return {
        "family": "llama",
        "shape": TEACHER if whole else STUDENT,
        "parameters": parameters | {"total": sum(parts), "non_embedding": sum(parts[1:])},
        "dtype": "float32",
        "weight_bytes": 4 * sum(parts),
        "kv_cache_bytes_per_token": 256 if whole else 192,
        "tied_embeddings": True,
        "lm_loss": loss,
        "perplexity": 2.718281828**loss,
        "bits_per_byte": bits,
        "kl_to_teacher": kl,
        "top1_agreement": agreement,
        "tokens": 8160,
    }


def _task(task: str, value: float) -> dict[str, Any]:
    facts = {"title": TITLES.get(task, task), "metric": "acc", "value": value, "stderr": 0.0123, "n": 1234, "shots": 5}
    return facts | {"version": "1.0", "higher_is_better": True, "filter": None, "others": {}}


def _record(name: str, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "stage": name,
        "inputs": {"model": "cf50f6e3" * 8, "data": "48e6f6b5" * 8},
        "config": {},
        "result": result,
        "started": "2026-01-02T03:04:05Z",
        "seconds": 12.5,
        "peak_memory_bytes": 400_000_000,
        "versions": {"python": "3.11.7", "minitron": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": "Example CPU", "cores": 2, "threads": 2, "memory_bytes": 16_000_000_000},
    }


def _speed(prefill: float) -> dict[str, Any]:
    return {
        "prefill": prefill,
        "prefill_range": [0.9 * prefill, 1.1 * prefill],
        "decode": float("nan"),  # every round was disturbed
        "decode_range": [float("nan"), float("nan")],
        "prompt_tokens": 64,
        "new_tokens": 32,
    }


def _scores() -> dict[str, Any]:
    return {
        "layers": [0.5, 0.3, 0.1, 0.4],
        "hidden": [90.0, 80.5, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0],
        "ffn": [[(layer + 1) * unit for unit in range(12)] for layer in range(4)],  # neuron 0 is dead
        "heads": [[1.0, 2.0, 4.0, 3.0]] * 4,
        "kv_heads": [[3.0, 7.0]] * 4,
    }


def _plan() -> dict[str, Any]:
    return {
        "teacher": TEACHER,
        "student": STUDENT,
        "layers": KEPT_LAYERS,
        "hidden": list(range(6)),
        "ffn": [list(range(4, 12))] * 3,
        "heads": [[1, 2]] * 3,
        "kv_heads": [[0, 1]] * 3,
    }


# In layer 1 the repair keeps neuron 0 and not 4, in layer 3 it keeps heads 0 and 3 and not 1 and 2.
REPAIRED: dict[str, Any] = {
    "ffn": [list(range(4, 12)), [0, *range(5, 12)], list(range(4, 12))],
    "heads": [[1, 2], [1, 2], [0, 3]],
}


def _metrics() -> list[dict[str, float]]:
    training = [
        {"step": step, "tokens": 64 * step, "loss": 4 - step / 20, "learning_rate": 1e-3, "grad_norm": 1.0}
        for step in range(1, 41)
    ]
    return [*training, {"step": 40, "tokens": 2560, "heldout_loss": 2.2}]


def _dump(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
