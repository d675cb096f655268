"""A teacher's logits recorded on disk, so that the training of a student needs no teacher.

A directory holds `lessons.json` and shards of some blocks each. For every token but the last of a block, a shard has
the ids of the teacher's k likeliest next tokens, the logarithms of their probabilities, and the logarithm of the
probability of all others together. A block is found by a digest of its tokens, so blocks may be asked for in any order
and from any split.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron.core.errors import MinitronError
from minitron.core.files import digest_files, write_json
from minitron.core.numerics import matmul_precision
from minitron.core.typed_files import read_typed
from minitron.distillation import layouts
from minitron.distillation.objective import LEAST_TAIL, TeacherOutput, TopK
from minitron.model.checkpoint import Checkpoint
from minitron.model.logits import chunk_tokens, logit_transform, project
from minitron.model.samples import Batch, Samples, Separator
from minitron.model.stream import Pass, Stream

LESSONS_INDEX = "lessons.json"
# Memory that a part of the blocks may take while the model runs over it. The weights are read once a part, and a part
# is a shard.
RECORDED_PART_BYTES = 4 << 30
DEFAULT_TOP_K = 64


def record_logits(
    teacher: Checkpoint,
    samples: Samples,
    pass_: Pass,
    out: Path,
    *,
    top_k: int = DEFAULT_TOP_K,
    temperature: float = 1.0,
) -> dict[str, object]:
    """Run a teacher over blocks, a layer in memory at a time, and record its logits in the existing directory `out`.

    Args:
        samples: the blocks; a training that reads the recording must have the same separator.
        temperature: of the distributions; losses that read the recording must have the same.

    Returns the facts that `lessons.json` holds: the model, the numbers of blocks and tokens, and the bytes per token.
    """
    shape, num_tokens = teacher.shape, samples.block_tokens
    top_k = min(top_k, shape.vocab)
    of_block = num_tokens * (shape.hidden * pass_.dtype.itemsize + 12 * top_k)
    parts = np.array_split(samples.tokens.numpy(), -(-len(samples) * of_block // RECORDED_PART_BYTES))
    shards: list[dict[str, str | int]] = []
    for number, part in enumerate(parts):
        stream = Stream(teacher, Samples(torch.from_numpy(part), samples.separator), pass_)
        stream.run_to_end(partial(_progress_of_part, pass_.progress, number, len(parts)))
        name = f"shard-{number:05d}.safetensors"
        tensors = _packed(_top_k(stream, top_k, temperature), shape.vocab)
        save_file(tensors | {"blocks": torch.from_numpy(_digests(part, samples.separator))}, out / name)
        shards.append({"file": name, "blocks": len(part), "sha256": digest_files([out / name], {})})
    num_bytes = sum((out / str(shard["file"])).stat().st_size for shard in shards)
    facts = {
        "model": teacher.fingerprint(),
        "vocab": shape.vocab,
        "top_k": top_k,
        "temperature": temperature,
        "blocks": len(samples),
        "block_tokens": num_tokens,
        "bytes_per_token": num_bytes / (len(samples) * num_tokens),
        "shards": shards,
    }
    write_json(out / LESSONS_INDEX, facts)
    return facts


def _progress_of_part(progress: Callable[[int, int], None], number: int, num_parts: int, done: int, total: int) -> None:
    progress(number * total + done, num_parts * total)


class RecordedTeacher:
    """A teacher whose logits are read back from a recording; it is called with blocks that were recorded."""

    def __init__(self, path: Path, device: torch.device):
        """Open the recording.

        Raises: MinitronError if a file is missing or damaged.
        """
        self.path, self.device = path, device
        again = f"remove {path} and record the logits again"
        self.facts = read_typed(path / LESSONS_INDEX, layouts.LESSONS, MinitronError, way_out=again)
        self._files = []
        for shard in self.facts.shards:
            file = path / shard.file
            if not file.is_file() or digest_files([file], {}) != shard.sha256:
                raise MinitronError(f"{file} is missing or damaged: {again}")
            self._files.append(safe_open(file, framework="pt"))
        digests = np.concatenate([file.get_tensor("blocks").numpy() for file in self._files])
        self._places = [(file, row) for file in self._files for row in range(file.get_slice("blocks").get_shape()[0])]
        self._order = digests.argsort()
        self._digests = digests[self._order]

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Return the recorded output for a batch.

        Raises: MinitronError for a block that was not recorded.
        """
        wanted = _digests(batch.tokens.cpu().numpy(), batch.separator)
        at = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        if (self._digests[at] != wanted).any():
            raise MinitronError(
                f"{self.path} has no logits for a block of this text: they were recorded for other data, for other "
                "blocks or with another tokenizer; record the logits again"
            )
        parts = [_read(*self._places[place]) for place in self._order[at]]
        kept = batch.predicted[:, 1:].flatten().cpu()
        ids, log_probs, tail = (torch.cat([part[i] for part in parts])[kept].to(self.device) for i in range(3))
        # 16 bits round, and a distribution's sum is 1.
        total = torch.logaddexp(log_probs.logsumexp(-1), tail)
        return TeacherOutput(TopK(ids, log_probs - total[:, None], tail - total))


def _digests(blocks: Int[np.ndarray, "blocks tokens"], separator: Separator | None) -> Int[np.ndarray, " blocks"]:
    rows = np.ascontiguousarray(blocks, dtype=np.int64)
    salt = repr(separator).encode() if separator else b""
    found = [hashlib.blake2b(row.tobytes() + salt, digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(found), dtype=np.int64).copy()


def _top_k(stream: Stream, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, log-probabilities and tail [blocks, tokens - 1, k or none], from the states after the last layer."""
    states, transform = stream.states, logit_transform(stream.model)
    with torch.no_grad(), stream.final_norm() as norm:
        for rows, before in stream.batches():
            states[rows] = norm(before)
    hidden = states[:, :-1]
    flat = hidden.flatten(0, 1)
    best = flat.new_full((len(flat), k), -torch.inf, dtype=torch.float32, device="cpu")
    ids, total = torch.zeros(len(flat), k, dtype=torch.int64), torch.full((len(flat),), -torch.inf)
    for first, piece in stream.head_pieces():
        chunk = chunk_tokens(len(piece))
        for start in range(0, len(flat), chunk):
            rows = slice(start, start + chunk)
            with matmul_precision(stream.dtype):
                logits = transform(project(flat[rows].to(stream.device), piece)) / temperature
            found = logits.topk(min(k, logits.shape[-1]), dim=-1)
            total[rows] = torch.logaddexp(total[rows], logits.logsumexp(-1).cpu())
            values = torch.cat([best[rows], found.values.cpu()], -1)
            places = torch.cat([ids[rows], found.indices.cpu() + first], -1)
            merged = values.topk(k, dim=-1)
            best[rows], ids[rows] = merged.values, places.gather(-1, merged.indices)
    log_probs = best - total[:, None]
    tail = torch.log(-torch.expm1(log_probs.logsumexp(-1).clamp_max(0))).clamp_min(LEAST_TAIL)
    sizes = hidden.shape[:2]
    return ids.unflatten(0, sizes), log_probs.unflatten(0, sizes), tail.unflatten(0, sizes)


def _packed(top_k: tuple[Tensor, Tensor, Tensor], vocab: int) -> dict[str, Tensor]:
    """Pack the tensors: two or three bytes an id, and half precision for the logarithms."""
    ids, log_probs, tail = top_k
    tensors = {"ids": (ids & 0xFFFF).to(torch.uint16), "log_probs": log_probs.half(), "tail": tail.half()}
    return tensors | ({"high_ids": (ids >> 16).to(torch.uint8)} if vocab > 1 << 16 else {})


def _read(file: Any, row: int) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"], Float[Tensor, " tokens"]]:
    ids = file.get_slice("ids")[row].to(torch.int64)
    if "high_ids" in file.keys():  # noqa: SIM118
        ids = ids | file.get_slice("high_ids")[row].to(torch.int64) << 16
    return ids, file.get_slice("log_probs")[row].float(), file.get_slice("tail")[row].float()
