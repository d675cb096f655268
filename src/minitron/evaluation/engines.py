"""The verb `measure_speed`: teacher and student in turn, in transformers, in llama.cpp or in vLLM.

Each model lives in a process of its own, so that its memory can be measured, and llama.cpp can end its process.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from minitron.core.device import Precision, pick_device
from minitron.core.errors import MinitronError
from minitron.core.machine import forget_peak_memory, hardware, peak_memory
from minitron.core.progress import SILENT, Listener
from minitron.core.worker import Child, ChildEnded
from minitron.evaluation.speed import (
    DEFAULT_ROUNDS,
    STUDENT,
    TEACHER,
    Load,
    SpeedRow,
    Timer,
    Timing,
    measure_in_turn,
    transformers_timer,
    with_memory,
)
from minitron.gguf.reader import inspect_gguf, is_gguf
from minitron.gguf.source import model_directory
from minitron.model.checkpoint import load_model, open_checkpoint
from minitron.model.describe import describe
from minitron.model.hub import new_model

Engine = Literal["transformers", "llama.cpp", "vllm"]
DEFAULT_CONTEXTS = (128, 1024)
MODEL = "model"  # the name of a model without a teacher
VLLM_SHARE = 0.9  # of the GPU's memory, for all models together: vLLM's default for one model


@dataclass(frozen=True)
class SpeedOptions:
    """The grid of loads and the engine for measuring speed.

    engine: None for llama.cpp with GGUF files and transformers with others.
    contexts: None for the contexts of DEFAULT_CONTEXTS that the models have, or else their longest.
    dtype: of the weights; `auto` as they are stored.
    threads: of a CPU; None for as many as torch uses here.
    """

    engine: Engine | None = None
    batches: Sequence[int] = (1, 8)
    contexts: Sequence[int] | None = None
    new_tokens: int = 32
    rounds: int = DEFAULT_ROUNDS
    dtype: Precision = "auto"
    threads: int | None = None

    def require_possible(self, engine: Engine) -> None:
        """Raises: MinitronError for options that the engine or this machine does not have."""
        if engine == "vllm" and find_spec("vllm") is None:
            raise MinitronError(
                "--engine vllm: vLLM is not installed here; `pip install vllm` into this environment, on a machine "
                "whose GPU it supports, or take --engine transformers"
            )
        if engine == "llama.cpp" and self.dtype != "auto":
            raise MinitronError(f"--dtype {self.dtype}: the types in a GGUF file are its own; leave --dtype out")
        if self.threads is not None and self.threads > (os.cpu_count() or 1):
            raise MinitronError(
                f"--threads {self.threads}: this machine has {os.cpu_count()} cores; give at most as many"
            )


@dataclass(frozen=True)
class SpeedModel:
    """A model whose speed was measured.

    stored: the types of its weights.
    context: the longest that the model has; None where its files do not say.
    """

    path: str
    parameters: int
    weight_bytes: int
    stored: str
    context: int | None


@dataclass(frozen=True)
class SpeedResult:
    """The speed and memory of one model or of a teacher and a student, and how they were measured.

    load_average: of the machine, before and after.
    models: `model`, or `teacher` and `student`.
    rows: one for each load, from the smallest up.
    """

    engine: Engine
    device: str
    threads: int
    rounds: int
    new_tokens: int
    load_average: tuple[float, float]
    models: Mapping[str, SpeedModel]
    rows: tuple[SpeedRow, ...]

    def to_dict(self) -> dict[str, object]:
        """The result as the command prints it."""
        models = {name: asdict(model) for name, model in self.models.items()}
        return vars(self) | {"models": models, "rows": [row.to_dict() for row in self.rows]}


@dataclass(frozen=True)
class Subject:
    """A model to be measured, and how its process loads it.

    dtype: None for the dtype that is stored.
    context_tokens, batch: of the largest load, new tokens included.
    """

    path: Path
    engine: Engine
    dtype: torch.dtype | None
    threads: int
    context_tokens: int
    batch: int
    gpu_share: float


def measure_speed(
    model: str, teacher: str | None = None, options: SpeedOptions | None = None, *, listener: Listener = SILENT
) -> SpeedResult:
    """Measure speed and memory of a model over a grid of batch and context, and of a teacher in turn with it.

    Raises: MinitronError for models or options that the engine does not run, and for a process that ended.
    """
    options = options or SpeedOptions()
    named = {MODEL: model} if teacher is None else {TEACHER: teacher, STUDENT: model}
    engine = options.engine or ("llama.cpp" if is_gguf(model) else "transformers")
    options.require_possible(engine)
    models = {name: _described(source, engine) for name, source in named.items()}
    limit = min((one.context for one in models.values() if one.context), default=None)
    contexts = _contexts(options.contexts, limit, options.new_tokens)
    loads = [Load(batch, context, options.new_tokens) for batch in options.batches for context in contexts]
    threads = options.threads or torch.get_num_threads()
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    room, share = max(contexts) + options.new_tokens + 1, VLLM_SHARE / len(named)
    load_before = os.getloadavg()[0]
    listener.stage("speed", "running")
    with ExitStack() as stack:
        timers: dict[str, Timer] = {}
        for name, one in models.items():
            subject = Subject(Path(one.path), engine, dtype, threads, room, max(options.batches), share)
            timers[name] = partial(_ask, stack.enter_context(Child()), subject)
        progress = partial(listener.progress, note="measurements")
        rows = measure_in_turn(timers, loads, rounds=options.rounds, progress=progress)
    listener.stage("speed", "done")
    return SpeedResult(
        engine=engine,
        device=str(hardware()["device"]),
        threads=threads,
        rounds=options.rounds,
        new_tokens=options.new_tokens,
        load_average=(load_before, os.getloadavg()[0]),
        models=models,
        rows=tuple(rows),
    )


def _described(source: str, engine: Engine) -> SpeedModel:
    in_file = is_gguf(source)
    if in_file != (engine == "llama.cpp"):
        raise MinitronError(
            f"{source} is a GGUF file, which {engine} does not run here: give the model's directory or a hub id, or "
            "take --engine llama.cpp"
            if in_file
            else f"llama.cpp runs GGUF files, and {source} is none: "
            f"`minitron quantize {source} --types BF16 --no-verify --out gguf` makes one of it"
        )
    if in_file:
        facts = inspect_gguf(Path(source))
        return SpeedModel(str(Path(source)), facts.weights, facts.bytes, ", ".join(facts.types), facts.context)
    checkpoint = open_checkpoint(model_directory(source))
    said = describe(checkpoint)
    return SpeedModel(
        str(checkpoint.path),
        said.parameters.total,
        said.weight_bytes,
        said.dtype,
        checkpoint.config.get("max_position_embeddings"),
    )


def _contexts(asked: Sequence[int] | None, limit: int | None, new_tokens: int) -> Sequence[int]:
    """Raises: MinitronError for a context that is longer than that of the models."""
    room = None if limit is None else limit - new_tokens - 1
    if room is not None and room < 1:
        raise MinitronError(f"--new-tokens {new_tokens} is too many for a context of {limit:,} tokens: ask for fewer")
    if asked is None:
        return [context for context in DEFAULT_CONTEXTS if room is None or context <= room] or [room or 1]
    for context in asked:
        if room is not None and context > room:
            raise MinitronError(
                f"--context {context}: with the {1 + new_tokens} tokens that follow it is longer than the {limit:,} "
                f"tokens of context that the model has: at most {room:,}"
            )
    return asked


def _ask(child: Child, subject: Subject, load: Load) -> Timing:
    try:
        return child.call(_answer, subject, load)
    except ChildEnded as ended:
        raise MinitronError(
            f"the process that ran {subject.path} in {subject.engine} ended at --batch {load.batch} --context "
            f"{load.context} ({ended}), as processes do that ask for more memory than there is: give smaller ones"
        ) from None


def _answer(subject: Subject, load: Load) -> Timing:
    """Time a load in the model's process, where the model stays loaded from one load to the next."""
    try:
        timing = _loaded(subject)(load)
    except torch.OutOfMemoryError:
        raise MinitronError(
            f"--batch {load.batch} --context {load.context}: {subject.path} does not fit into the GPU's memory with "
            "it; give smaller ones"
        ) from None
    assert [len(row) for row in timing.made] == [1 + load.new_tokens] * load.batch, "not the tokens asked for"
    return timing


@lru_cache(1)
def _loaded(subject: Subject) -> Timer:
    torch.set_num_threads(subject.threads)
    return ENGINES[subject.engine](subject)


def _in_transformers(subject: Subject) -> Timer:
    checkpoint = open_checkpoint(subject.path)
    with torch.device("meta"):  # the memory of code, which is more than that of a small model, is taken before
        new_model(checkpoint.config, checkpoint.written_dtype)
    device, before = pick_device(), _resident_memory()
    timer = transformers_timer(load_model(subject.path, subject.dtype).to(device))
    if device.type != "cuda":
        return _with_resident_memory(timer, before)
    cuda = torch.cuda
    return with_memory(timer, partial(cuda.reset_peak_memory_stats, device), partial(cuda.max_memory_allocated, device))


def _in_llama_cpp(subject: Subject) -> Timer:
    """Time llama.cpp; the memory is the host's, because a library that computes on a GPU keeps its memory there."""
    from minitron.gguf.llama_cpp import Runtime, llama_cpp

    llama_cpp()
    before = _resident_memory()
    runtime = Runtime(subject.path, context=subject.context_tokens, threads=subject.threads)
    return _with_resident_memory(partial(_time_llama_cpp, runtime), before)


def _with_resident_memory(timer: Timer, before_bytes: int) -> Timer:
    """Also measure resident memory beyond `before_bytes`, which is the model's where it is alone in its process."""
    return with_memory(timer, forget_peak_memory, lambda: peak_memory() - before_bytes)


def _resident_memory() -> int:
    forget_peak_memory()
    return peak_memory()


def _time_llama_cpp(runtime: Any, load: Load) -> Timing:
    from time import perf_counter

    room = (load.context + load.new_tokens, load.batch)
    if room != (runtime.context_tokens, runtime.sequences):
        runtime.make_room(*room)
    runtime.forget()
    prompts = [[token % runtime.vocab_size for token in prompt] for prompt in load.prompts]
    start = perf_counter()
    made = [runtime.read(prompts, 0)]
    middle = perf_counter()
    for step in range(load.new_tokens):
        made.append(runtime.read([[token] for token in made[-1]], load.context + step))
    end = perf_counter()
    return Timing(middle - start, end - middle, [list(row) for row in zip(*made, strict=True)])


def _in_vllm(subject: Subject) -> Timer:
    """Time vLLM, decoding by the difference of two calls, and no memory: vLLM takes all that it may."""
    from time import perf_counter

    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(subject.path),
        dtype="auto" if subject.dtype is None else str(subject.dtype).removeprefix("torch."),
        skip_tokenizer_init=True,
        max_model_len=subject.context_tokens,
        max_num_seqs=subject.batch,
        gpu_memory_utilization=subject.gpu_share,
        enable_prefix_caching=False,  # every round reads the same prompts
        seed=0,
    )
    vocab = open_checkpoint(subject.path).shape.vocab

    def timed(load: Load, count: int) -> tuple[float, list[list[int]]]:
        prompts = [{"prompt_token_ids": [token % vocab for token in prompt]} for prompt in load.prompts]
        options = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = perf_counter()
        answers = engine.generate(prompts, options, use_tqdm=False)
        return perf_counter() - start, [list(answer.outputs[0].token_ids) for answer in answers]

    def timer(load: Load) -> Timing:
        first, _ = timed(load, 1)
        both, made = timed(load, 1 + load.new_tokens)
        return Timing(first, both - first, made)

    return timer


ENGINES: dict[str, Callable[[Subject], Timer]] = {
    "transformers": _in_transformers,
    "llama.cpp": _in_llama_cpp,
    "vllm": _in_vllm,
}
