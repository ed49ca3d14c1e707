# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Train a model with LUFFY, or with plain GRPO, from a YAML recipe and command-line flags; the script of `luffy train`:

    accelerate launch examples/train_luffy.py --config examples/configs/quickstart.yaml --learning_rate 1e-4
"""

from luffy_trl.scripts.train import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
