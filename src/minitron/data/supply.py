"""The corpus for a command or a run: the length of its blocks, the amount of text, and its directory."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.core.errors import DataError, RunError
from minitron.core.files import scratch_directory, scratch_errors
from minitron.core.progress import Listener
from minitron.data.config import DataConfig
from minitron.data.corpus import SAMPLED, Corpus, open_corpus
from minitron.data.sampling import sample_text
from minitron.data.sources import TEACHER, is_hub_id
from minitron.data.writing import hold_out_all, prepare, read_documents
from minitron.model.checkpoint import Checkpoint, ModelConfig

LARGEST_DEFAULT_BLOCK = 2048


def block_length(config: DataConfig, model: Checkpoint | ModelConfig) -> int:
    """The tokens in a block: by the config, else the model's context, but at most LARGEST_DEFAULT_BLOCK.

    Raises: RunError if the model's context is shorter.
    """
    context = model.config.get("max_position_embeddings") or LARGEST_DEFAULT_BLOCK
    length = config.block_tokens or min(context, LARGEST_DEFAULT_BLOCK)
    if length > context:
        raise RunError(f"data.block_tokens={length} is longer than the model's context of {context} tokens")
    return length


def bounded(config: DataConfig, tokens: int | None) -> DataConfig:
    """The config with a limit of `tokens` training tokens, if the text is endless and the config has no limit.

    Raises: RunError if the text is endless and `tokens` is None; DataError if held-out text is to be sampled.
    """
    if config.heldout == TEACHER:
        raise DataError(
            f"data.heldout cannot be {TEACHER!r}: of text sampled from the teacher (data.source) a part is "
            "held out anyway; leave data.heldout out, or name a text"
        )
    reason = "is a dataset id, which may be endless" if is_hub_id(config.source) else None
    reason = "is text without end, sampled from the teacher" if config.source == TEACHER else reason
    if reason is None or config.max_tokens is not None:
        return config
    if tokens is None:
        raise RunError(
            f"{config.source!r} {reason}: "
            "say how many tokens to train on with --tokens (distill.tokens), or to read with data.max_tokens"
        )
    return config.model_copy(update={"max_tokens": tokens})


def make_corpus(
    config: DataConfig, teacher: Checkpoint, *, seed: int, out: Path, listener: Listener, state: Path | None = None
) -> dict[str, object]:
    """Make a corpus in the existing directory `out`; its text is sampled first where the config says so.

    Args:
        state: the directory that keeps sampled text from one call to the next.

    Returns the result of the stage, for its record.
    """
    block_tokens = block_length(config, teacher)
    facts: dict[str, object] = {}
    documents = None
    if config.source == TEACHER:
        file = (state or out) / SAMPLED
        rows = sample_text(teacher, config, file, block_tokens=block_tokens, seed=seed, progress=listener.progress)
        if state is not None:
            shutil.copyfile(file, out / SAMPLED)
        facts["sampled"] = {"documents": len(rows), "ended": sum(row.ended for row in rows)}
        documents = read_documents(str(file), DataConfig())
        config = config.model_copy(update={"max_tokens": None})  # all of it is read
    corpus = prepare(
        config,
        teacher.tokenizer,
        vocab=teacher.shape.vocab,
        block_tokens=block_tokens,
        out=out,
        documents=documents,
        listener=listener,
    )
    if (config.delimiter, corpus.delimiter) == ("auto", "none"):
        listener.warn("the tokenizer has neither a BOS nor an EOS token: nothing stands between documents")
    return corpus.facts() | facts


def keep_sampled(corpus: Path, out: Path) -> None:
    """Copy sampled text, which took the most time, so that the next command can be given it."""
    if (corpus / SAMPLED).exists():
        shutil.copyfile(corpus / SAMPLED, out / SAMPLED)


@contextmanager
def corpus_for(
    checkpoint: Checkpoint,
    config: DataConfig,
    listener: Listener,
    samples: int | None = None,
    seed: int = 0,
    *,
    whole: bool = False,
    scratch: Path | None = None,
) -> Iterator[Corpus]:
    """Yield a corpus that is removed after the block.

    Args:
        samples: the number of training blocks that are needed of endless text, which may be sampled.
        seed: the seed of sampled text.
        whole: whether all of the text is held out.
        scratch: an existing directory for the corpus; default the system's temporary directory.
    """
    listener.stage("data", "running")
    if samples is not None:
        config = bounded(config, samples * block_length(config, checkpoint))
    if whole:
        config = hold_out_all(config)
    with scratch_directory(scratch) as path:
        with scratch_errors(scratch):
            make_corpus(config, checkpoint, seed=seed, out=path, listener=listener)
        yield open_corpus(path)
