# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import os
import signal
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`, here and in launched scripts

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests comes from the Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "TEST_GPU" not in os.environ:  # make test-gpu
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# A shell that starts the tests in the background has it ignored, and so would every process that they start
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def environment_as_before():
    """What a test, or a library in it, leaves in the environment is not there for the next one."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
