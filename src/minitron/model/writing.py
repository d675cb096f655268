"""Write a model directory: weights in shards, config.json, and the files that are copied along."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron.core.reading import Json
from minitron.model.config_json import CODE_KEYS, CONFIG, DTYPE_KEYS
from minitron.model.families import family_of
from minitron.model.tokenizer import make_portable
from minitron.model.weight_files import SINGLE, WEIGHT_INDEX, carried_files, without_code
from minitron.model.weights import TensorType, bytes_of, plan_shards, write_shard

SHARD_BYTES = 5_000_000_000  # the hub's own shard size


def write_checkpoint(
    out: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorType],
    pieces: Iterable[Tensor],
    carry_from: Path,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write a model into the existing directory `out`; returns the sha256 of each weight file by its name.

    Its config.json contains the dtype of the embedding, and no keys that name code, as no code is copied. Dtypes and
    shapes are known in advance, so a shard's header is written before its data, and no shard is ever in memory.

    Args:
        pieces: the tensors in the order of `tensors`, each whole or some rows at a time. They are made in another
            thread, and each is written before the next is made.
    """
    shards = plan_shards(tensors, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    left = iter(pieces)
    digests = {file: write_shard(out / file, shard, left) for file, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(bytes_of(*tensor) for tensor in tensors.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (out / WEIGHT_INDEX).write_text(json.dumps(index, indent=2))
    (out / CONFIG).write_text(json.dumps(_as_written(config, tensors), indent=2))
    for carried in carried_files(carry_from):
        said = without_code(carried)
        if said is None:
            shutil.copyfile(carried, out / carried.name)
        else:
            (out / carried.name).write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")
    make_portable(out)
    return digests


def _as_written(config: Mapping[str, Any], tensors: Mapping[str, TensorType]) -> Json:
    """The config.json with the stored dtype, under the keys that held the dtype, and without keys that name code."""
    said = {key: value for key, value in config.items() if key not in CODE_KEYS}
    dtype = str(tensors[family_of(config).embedding][0]).removeprefix("torch.")
    return said | dict.fromkeys([key for key in DTYPE_KEYS if key in said] or [DTYPE_KEYS[-1]], dtype)
