# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Names of the files that a run keeps in its output folder. The Hub leaves out names that begin like this."""

LOG_FILE = "_log.jsonl"  # a line for each record of the trainer's log
RUN_FILE = "_run.json"  # what the run is
LOCK_FILE = "_run.lock"  # held while a run writes to the folder
