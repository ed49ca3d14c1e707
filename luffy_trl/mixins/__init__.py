# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What TRL's GRPOTrainer lacks, with demonstrations or without. Each is a subclass of it that works by itself, and says
what it overrides, calls, adds and keeps.
"""
