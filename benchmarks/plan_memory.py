"""Which settings does a training take to fit the GPUs, and what memory is it then said to take?

    python benchmarks/plan_memory.py [--recipes NAME ...] [--gpus 1x80 1x141 8x80 64x80] [--defaults] [--out FILE]

The teachers are the published ones, of which only the config.json counts; no weights are read, and no step is run on a
GPU. A training may take nine tenths of each GPU.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.measure import header, publish, table

from minitron.core.errors import RunError
from minitron.core.text import duration, size
from minitron.model.checkpoint import open_config
from minitron.pipeline.estimate import Gpus, estimate
from minitron.pipeline.run import settle_memory
from minitron.recipe import find_recipe, load_recipe

COMMON = {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
TEACHERS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b-to-4b-width": COMMON
    | {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 131072},
    "mistral-nemo-12b-to-8b": COMMON
    | {"model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 14336}
    | {"num_hidden_layers": 40, "num_attention_heads": 32, "max_position_embeddings": 131072, "sliding_window": None},
    "nemotron-4-15b-to-minitron-8b": COMMON
    | {"model_type": "nemotron", "vocab_size": 256000, "hidden_size": 6144, "intermediate_size": 24576}
    | {"num_hidden_layers": 32, "num_attention_heads": 48, "max_position_embeddings": 4096}
    | {"partial_rotary_factor": 0.5},
}
# The recipes name AdamW and logits alone, as published; without these lines both follow from the defaults.
DEFAULTS = ["distill.optimizer=null", "distill.intermediate=null"]


def planned(name: str, gpus: Gpus, sets: list[str], at: Path) -> list[str]:
    """Return a row of the table: what a step would take, what it takes, with which settings, and how long it lasts."""
    (at / "config.json").write_text(json.dumps(TEACHERS[name]))
    recipe = load_recipe(find_recipe(name), [f"model={at}", "data.source=builtin", *sets])
    started = time.perf_counter()
    try:
        recipe, settled = settle_memory(recipe, open_config(at), at / "run", gpus.room)
    except RunError as error:
        return ["", "", f"refused: {error}", "", f"{time.perf_counter() - started:.0f}"]
    seconds, fit = time.perf_counter() - started, settled.fit
    assert fit is not None and fit.asked is not None
    hours = estimate(recipe, gpus, settled=settled).seconds_on_gpus or 0.0
    per_billion = duration(hours / ((recipe.distill.tokens or 1) / 1e9))
    return [
        size(fit.asked),
        size(settled.memory.peak),
        fit.settings if fit.changes else "",
        per_billion,
        f"{seconds:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[*TEACHERS], choices=[*TEACHERS])
    parser.add_argument("--gpus", nargs="+", default=["1x80", "1x141", "8x80", "64x80"], help="number x GB of each")
    parser.add_argument("--defaults", action="store_true", help="leave optimizer and hidden states to the defaults")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.recipes:
        for gpus in args.gpus:
            count, memory = (int(part) for part in gpus.split("x"))
            with tempfile.TemporaryDirectory() as directory:
                sets = DEFAULTS if args.defaults else []
                row = planned(name, Gpus(count, memory=memory * 1e9), sets, Path(directory))
            rows.append([name, gpus, *row])
            print(*rows[-1], sep=" | ", flush=True)
    columns = ["recipe", "GPUs x GB", "as asked", "as settled", "changes", "1B tokens", "planned in s"]
    how = "optimizer and hidden states by the defaults" if args.defaults else "the recipes' own settings"
    text = f"{header('Memory of a training that is made to fit')}\nThe peak of a training step on each GPU, {how}; the "
    text += f"time is at an assumed {Gpus.utilisation:.0%} of {Gpus.teraflops:g} TFLOP/s each.\n\n"
    publish(text + table(columns, rows), args.out)


if __name__ == "__main__":
    main()
