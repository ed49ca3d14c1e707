# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What several processes of a run need that accelerate leaves to chance."""

import pytest
import tiny


def test_the_process_group_is_closed_when_python_ends(tmp_path):
    """A script of a user's, which does not call `trainer.end()`."""
    tiny.launch("ended", tmp_path)
    assert [(tmp_path / f"left_{rank}").read_text() for rank in range(2)] == ["False", "False"]


def test_an_error_waits_for_nobody(tmp_path):
    """After an error the group stays as it is: closing it could wait for processes that wait for this one."""
    with pytest.raises(AssertionError, match="after training"):
        tiny.launch("ended", tmp_path, fails=True)
    assert "True" in [
        (tmp_path / f"left_{rank}").read_text() for rank in range(2) if (tmp_path / f"left_{rank}").exists()
    ]
