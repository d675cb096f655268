"""The length of a distillation as wall time: a speed is measured once, and the tokens that follow from it are kept."""

from dataclasses import replace
from pathlib import Path

from minitron.core import parallel
from minitron.core.errors import MinitronError, RunError
from minitron.core.files import write_json
from minitron.core.progress import Listener
from minitron.core.typed_files import read_typed
from minitron.distillation.config import DistillConfig
from minitron.distillation.layouts import BUDGET, Budget
from minitron.distillation.schedule import ModelSize, resolve
from minitron.pipeline.asked import Asked, TrainingSeconds
from minitron.pipeline.probe import WEIGHTS_RMS
from minitron.pipeline.timing import time_run

# A first guess, for what is resolved before the speed is known.
GUESSED_TOKENS_PER_SECOND = 1000
MOST_TOKENS = 1 << 50


def require_one_length(config: DistillConfig) -> None:
    """Refuse a length in tokens beside one in minutes.

    Raises: MinitronError.
    """
    if config.tokens is not None and config.minutes is not None:
        raise MinitronError(
            f"distill.tokens={config.tokens:,} and distill.minutes={config.minutes:g} both say how long the "
            "distillation is: leave one of them out (a recipe's own tokens with --set distill.tokens=null)"
        )


def with_guess(config: DistillConfig) -> DistillConfig:
    """Replace minutes by a guess of the tokens, for whatever needs some number of them."""
    require_one_length(config)
    return config if config.minutes is None else _of(config, round(60 * config.minutes * GUESSED_TOKENS_PER_SECOND))


def known_budget(file: Path, minutes: float) -> Budget | None:
    """Read the budget that an earlier call of the same command has settled; None where there was none.

    Raises: RunError for one of other minutes.
    """
    if not file.exists():
        return None
    found = read_typed(file, BUDGET, RunError, way_out=f"remove {file.parent} to start again")
    if found.minutes != minutes:
        raise RunError(
            f"{file} settled {found.minutes:g} minutes as {found.tokens:,} tokens, and distill.minutes is {minutes:g} "
            f"now: give {found.minutes:g} again, or --tokens {found.tokens} for the same, or choose another --out"
        )
    return found


def measure_budget(asked: Asked, listener: Listener) -> Budget:
    """Measure the speed of the distillation, and tell how many tokens its minutes are.

    Args:
        asked: its recipe has `distill.minutes`.

    Raises: MinitronError for so few minutes that there is no time for a step, and among several processes.
    """
    minutes = asked.recipe.distill.minutes
    assert minutes is not None
    if parallel.ranks().size > 1:
        raise MinitronError(
            f"distill.minutes={minutes:g} is measured in one process, and torchrun started {parallel.ranks().size}: "
            "give distill.tokens (--tokens)"
        )
    listener.stage("speed", "running")
    timed = replace(asked, recipe=asked.recipe.model_copy(update={"distill": with_guess(asked.recipe.distill)}))
    parts = time_run(timed).trainings["student"]
    listener.stage("speed", "done")
    tokens = most_tokens(asked, parts)
    found = Budget(minutes=minutes, tokens_per_second=tokens / (60 * minutes), tokens=tokens)
    listener.stage("distillation", f"of {found}")
    return found


def most_tokens(asked: Asked, parts: TrainingSeconds) -> int:
    """Find the most tokens, in whole blocks, whose training fits the minutes.

    Raises: MinitronError if not even a batch of one block does.
    """
    config, block_tokens = asked.recipe.distill, asked.block_tokens
    assert config.minutes is not None

    def seconds(tokens: int) -> float:
        sizes = (ModelSize(model.shape, WEIGHTS_RMS) for model in (asked.student, asked.teacher))
        resolved = resolve(_of(config, tokens), *sizes, block_tokens=block_tokens, train_tokens=tokens)
        assert resolved.evaluate_blocks
        return parts.of(resolved, block_tokens, resolved.evaluate_blocks)

    fits, beyond = config.batch_blocks or 1, MOST_TOKENS // block_tokens
    if seconds(fits * block_tokens) > 60 * config.minutes:
        raise MinitronError(
            f"distill.minutes={config.minutes:g} is too short: loading, one step, an evaluation and a state take about "
            f"{seconds(fits * block_tokens):.0f} s here; raise it, or give distill.tokens"
        )
    while beyond - fits > max(1, fits // 1000):
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if seconds(middle * block_tokens) <= 60 * config.minutes else (fits, middle)
    return fits * block_tokens


def with_budget(config: DistillConfig, budget: Budget) -> DistillConfig:
    """Replace the minutes by the tokens that were settled."""
    return _of(config, budget.tokens)


def keep_budget(budget: Budget | None, file: Path) -> None:
    """Write the budget, so that the next call of the same command does not measure again."""
    if budget is not None and parallel.is_first() and not file.exists():
        write_json(file, budget.model_dump())


def _of(config: DistillConfig, tokens: int) -> DistillConfig:
    return config.model_copy(update={"tokens": tokens, "minutes": None})
