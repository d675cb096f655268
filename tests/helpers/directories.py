"""Model directories copied, and changed as users and damage change them."""

import json
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import save_file

from minitron.model.checkpoint import Checkpoint
from minitron.model.writing import write_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def copy(checkpoint: Checkpoint, out: Path, **options: Any) -> Path:
    """Write the same model again."""
    out.mkdir(exist_ok=True)
    write_checkpoint(
        out,
        config=checkpoint.config,
        tensors={name: (stored.dtype, stored.shape) for name, stored in checkpoint.stored.items()},
        pieces=map(checkpoint.read, checkpoint.stored),
        carry_from=checkpoint.path,
        **options,
    )
    return out


def change_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(path: Path, **changes: Any) -> None:
    """Save the single weights file again with some tensors replaced, or removed where the value is None."""
    tensors = {name: t for name, t in (tiny.tensors(path) | changes).items() if t is not None}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
