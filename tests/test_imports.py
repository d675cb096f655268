"""Imports point one way."""

import ast
from pathlib import Path

import minitron

ROOT = Path(minitron.__file__).parent
# Lowest first. A part imports only from lower rows and from itself; the rooms, side by side in one row, not each other.
ORDER: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("model",),
    ("data", "calibration"),
    ("gguf",),
    ("distillation",),
    ("evaluation",),
    ("pruning",),
    ("shapes",),
    ("report",),
    ("recipe",),
    ("pipeline",),
    ("api",),
    ("cli",),
    ("__main__",),
)
# Inside a room, the stages follow each other too.
STAGES = {
    "core": (
        *("errors", "interrupts", "text", "direct_io", "config", "files", "reading", "device", "machine", "parallel"),
        *("worker", "effects", "progress", "typed_files", "layouts", "run_layout"),
    ),
    "pruning": ("layouts", "importance", "depth", "config", "given", "target", "plan", "cut", "repair", "steps"),
    "shapes": ("layouts", "space", "rank", "trial"),
    "distillation": (
        *("layouts", "losses", "objective", "chunked", "hidden_loss", "optim", "state", "trackers", "config"),
        *("recording", "schedule", "setup", "teachers", "student", "train"),
    ),
    "evaluation": ("layouts", "quality", "generate", "tasks", "speed", "gguf_files", "engines"),
    "gguf": (
        *("layouts", "config", "llama_cpp", "reader", "tokenizer", "model_config", "metadata", "file", "imatrix"),
        *("types", "verify", "mixtures", "quantize"),
    ),
    "data": ("layouts", "sources", "config", "overlap", "corpus", "writing", "sampling", "supply"),
    "report": (
        "published",
        "html",
        "tables",
        "layouts",
        "plots",
        "exporters",
        "records",
        "choices",
        "page",
        "comparison",
        "card",
    ),
    "cli": (
        *(
            "parse",
            "console",
            "process",
            "rules",
            "command",
            "options",
            "run",
            "compress",
            "demo",
            "inspect",
            "calibrate",
            "search",
            "prune",
        ),
        *("distill", "evaluate", "generate", "quantize", "speed", "report", "card", "push", "main"),
    ),
    "pipeline": (
        *("rules", "directory", "stages", "probe", "timing", "budget", "fit", "run", "stage_seconds", "estimate"),
    ),
    "model": (
        *("naming", "samples", "architecture", "families", "config_json", "weights", "weight_files"),
        *("hub", "tokens", "tokenizer", "checkpoint", "writing", "describe", "hidden_states", "stream", "sharded"),
        *("likelihood",),
    ),
}
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file != ROOT / "__init__.py"]


def parts(file: Path) -> tuple[str, ...]:
    return file.relative_to(ROOT).with_suffix("").parts


def imported(file: Path) -> set[tuple[str, ...]]:
    """Modules of minitron that a file imports anywhere in it, as path parts below minitron."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {tuple(name.split(".")[1:]) for name in found if name.split(".")[0] == "minitron"}


def test_every_module_has_its_place() -> None:
    assert {parts(file)[0] for file in FILES} <= {name for row in ORDER for name in row}


def test_a_module_imports_only_what_stands_below_it() -> None:
    upwards = []
    for file in FILES:
        own = parts(file)[0]
        row = next(index for index, names in enumerate(ORDER) if own in names)
        below = {own, *(name for names in ORDER[:row] for name in names)}
        upwards += [
            f"{'.'.join(parts(file))} imports {module[0]}" for module in imported(file) if module[0] not in below
        ]
    assert not upwards


def test_a_stage_imports_only_stages_before_it() -> None:
    upwards = []
    for room, stages in STAGES.items():
        for file in (ROOT / room).rglob("*.py"):
            stage = parts(file)[1]
            later = set(stages[stages.index(stage) + 1 :]) if stage in stages else set()
            named = {module[1] for module in imported(file) if module[0] == room}
            upwards += [f"{room}.{stage} imports {other}" for other in named & later]
    assert not upwards


# A module whose classes are of the library or registered in it, and which is itself imported where it is used.
BUILT_ON = {
    ("evaluation", "tasks", "models"): "lm_eval",
    ("evaluation", "tasks", "in_memory"): "lm_eval",
    ("model", "caches"): "transformers",
    ("evaluation", "tasks", "blocks"): "transformers",
}
HEAVY = ("transformers", "datasets", "pyarrow", "matplotlib", "lm_eval")


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    early = []
    for file in FILES:
        top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        found = {name.split(".")[0] for name in names} & set(HEAVY) - {BUILT_ON.get(parts(file), "")}
        early += [f"{'.'.join(parts(file))} imports {heavy}" for heavy in found]
    assert not early
