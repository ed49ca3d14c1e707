# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Supervised fine-tuning on the traces of a dataset; the script of `luffy sft`:

    accelerate launch examples/train_sft.py --config examples/configs/sft.yaml --learning_rate 1e-5
"""

from luffy_trl.scripts.sft import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
