"""These functions set up the process of a command: its memory, and the messages of libraries."""

import ctypes
import os


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning them to the system.

    Training on a CPU allocates the same activations at every step; without this each step pays for them again in page
    faults, and takes up to twice as long. Blocks above 256 MB are still returned.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc: nothing to tune
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 256 << 20)
    libc.mallopt(trim_threshold, 2**31 - 1)


def quiet_libraries() -> None:
    """Keep the libraries' own messages and bars off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
