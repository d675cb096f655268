"""A process of its own answers, or its end is an error with what was said last."""

import os

import pytest

from minitron.core.worker import Child, ChildEnded, say_last


def test_what_a_process_says_last_is_in_the_error_and_the_next_call_has_a_new_process() -> None:
    with Child() as child:
        assert child.call(divmod, 7, 2) == (3, 1)
        child.call(say_last, "GGML_ASSERT(n_rot) failed")
        with pytest.raises(ChildEnded, match=r"^GGML_ASSERT\(n_rot\) failed$"):
            child.call(os._exit, 3)
        with pytest.raises(ChildEnded, match=r"^it said nothing$"):
            child.call(os._exit, 3)
