# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Evaluate models on the benchmarks of the paper, from flags or a YAML file (`--config`):

    python -m luffy_trl.eval --model_name_or_path my/model Qwen/Qwen2.5-Math-7B --template own qwen \
        --benchmarks aime24 math500 --output_dir results
"""

from pathlib import Path

from ..arguments import Parser
from ..errors import TO_CONTINUE, in_one_line, in_one_line_if_interrupted
from .report import to_markdown
from .runner import EvaluationArguments, evaluate


if __name__ == "__main__":
    with in_one_line_if_interrupted(TO_CONTINUE["eval"]), in_one_line():
        (args,) = Parser(EvaluationArguments, prog="luffy eval").parse_args_and_config()
        summary = evaluate(args)
        print(to_markdown(summary))
        print(f"Results are in {Path(args.output_dir).resolve()}.")
