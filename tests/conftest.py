# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`, here and in launched scripts

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests comes from the Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "TEST_GPU" not in os.environ:  # make test-gpu
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
