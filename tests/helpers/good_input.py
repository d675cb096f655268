"""Good input of every kind: what bad_input.py damages one file of."""

import json
import shutil
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import bench
import pyarrow
import pyarrow.parquet
import small
import tiny
import yaml
from bad_targets import PROMPT, RECORDED, SHAPE, TEXT, TRAINING

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def make(desk: Path, run: Callable[..., None], wanted: Set[str]) -> None:
    """Make good input in the directory `desk`, in which `run` runs a command.

    Args:
        wanted: files and directories; the slow ones that are not among them may be left out.
    """
    tiny.checkpoint("llama", desk / "teacher", **SIZES)
    tiny.tokenizer(desk / "teacher")
    tiny.checkpoint("llama", desk / "sharded", **SIZES, shard="40KB")
    tiny.tokenizer(desk / "sharded")
    special = {
        "eos_token": {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    }
    (desk / "teacher" / "special_tokens_map.json").write_text(json.dumps(special))
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    (desk / "teacher" / "chat_template.jinja").write_text(template)
    small.text(desk / "text.jsonl", documents=20)
    texts = [json.loads(line)["text"] for line in (desk / "text.jsonl").read_text().splitlines()]
    (desk / "text.txt").write_text("\n\n".join(texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), desk / "text.parquet")
    bench.write(desk / "tasks", ("winogrande", "hellaswag", "arc_easy"), 6)
    rows = [
        {"ctx": row["ctx_a"], **{key: row[key] for key in ("endings", "label")}} for row in bench.rows("hellaswag", 6)
    ]
    bench.dump(desk / "questions.jsonl", rows)
    units = {"layers": [0, 2], "hidden": list(range(0, 32, 2)), "kv_heads": [[0], [1]]}
    (desk / "units.json").write_text(json.dumps(units))
    (desk / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    calibration = ("--samples", "4", "--second-moment", "--out", "statistics")
    run("calibrate", "teacher", *TEXT, *calibration)
    run("prune", "teacher", *SHAPE, "--statistics", "statistics", "--out", "pruned")
    shutil.copy(desk / "pruned" / "plan.json", desk / "plan.json")
    if wanted.isdisjoint(("model.gguf", "imatrix.gguf", "imatrix.dat", "student.work", "recorded", "run", "other")):
        return
    quantize = ("quantize", "teacher", "--types", "Q8_0", "--calibration", *TEXT[1:], "--no-verify")
    run(*quantize, "--out", "gguf")
    next((desk / "gguf").glob("*Q8_0.gguf")).rename(desk / "model.gguf")
    (desk / "gguf" / "imatrix.gguf").rename(desk / "imatrix.gguf")
    _write_legacy(desk / "imatrix.gguf", desk / "imatrix.dat")
    distill = ("distill", "--teacher", "teacher", "--student", "pruned", *TEXT, *TRAINING, "--out", "student")
    run(*distill, *RECORDED, killed_after_saves=2)
    (desk / "recorded").mkdir()
    (desk / "student.work").rename(desk / "recorded" / "student.work")
    run(*distill, killed_after_saves=3)
    run("run", "recipe.yaml", "--out", "run")
    shutil.copytree(desk / "run", desk / "other")
    shutil.rmtree(desk / "gguf")


RECIPE: dict[str, Any] = {
    "model": "teacher",
    "seed": 1,
    "data": {"source": "text.jsonl", "block_tokens": 16, "heldout_fraction": 0.2},
    "calibrate": {"samples": 4, "second_moment": False},
    "prune": {"target": "60%", "criterion": "activation"},
    "search": {
        "level": "predicted", "dims": {"ffn": "16,24", "layers": "2,3"}, "window": 0.5,
        "bytes_per_second": 1e10, "flops_per_second": 1e11,
    },
    "repair": {"steps": []},
    "distill": {"tokens": 256, "batch_blocks": 4, "loss": {"forward_kl": 1.0}, "learning_rate": 0.001},
    "evaluate": {"blocks": 2, "prompts": [PROMPT], "new_tokens": 2, "speed": True},
    "gguf": {"types": ["Q8_0"], "verify": False},
}  # fmt: skip


def _write_legacy(source: Path, file: Path) -> None:
    from minitron.gguf.imatrix import read_importance, write_importance

    write_importance(read_importance(source), file)
