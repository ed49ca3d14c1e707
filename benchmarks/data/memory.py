# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Peak memory of `luffy_trl.data.openr1` by number of rows, on synthetic traces of 8k tokens:

    python benchmarks/data/memory.py --rows 4500 45000

Each size is a process of its own, followed from outside with psutil. Prints the table of the README.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GenerationConfig, PreTrainedTokenizerFast

from luffy_trl.chat_templates import CHAT_TEMPLATES


WORDS = "so we have the sum of x and y is equal to wait let me check".split()


def write_tokenizer(folder: str):
    """A tokenizer with a token per word, as a model folder without weights."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATES["luffy"]
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=1).save_pretrained(folder)


def write_dataset(path: Path, num_rows: int, num_words: int, row_group: int):
    """Rows as in `Elliott/Openr1-Math-46k-8192`; every tenth trace is wrong."""
    rng, writer = random.Random(0), None
    for start in range(0, num_rows, row_group):
        rows = []
        for i in range(start, min(start + row_group, num_rows)):
            thought = " ".join(rng.choices(WORDS, k=num_words))
            text = f"<think>\n{thought}\n</think>\n\nThe answer is \\boxed{{{i + (i % 10 == 0)}}}."
            rows.append(
                {
                    "prompt": [{"role": "user", "content": f"What is {i} + 0, in the ring of integers?"}],
                    "target": [{"role": "assistant", "content": text}],
                    "reward_model": {"style": "rule", "ground_truth": str(i)},
                }
            )
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def measure(command: list[str]) -> tuple[float, float, float]:
    """Peak resident memory of the process and of its children together, in MiB, and its time in seconds."""
    start, main, children = time.monotonic(), 0, 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            main = max(main, process.memory_info().rss)
            children = max(children, sum(child.memory_info().rss for child in process.children(recursive=True)))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.1)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed.")
    return main / 2**20, children / 2**20, time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[4500, 45000])
    parser.add_argument("--num_words", type=int, default=8000, help="words of a trace, each of them a token")
    parser.add_argument("--row_group", type=int, default=1000, help="rows of a row group of the source")
    args = parser.parse_args()
    print("| rows | text, MB | kept | peak of the process, MiB | of its workers, MiB | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num_rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder) / "source.parquet", Path(folder) / "data"
            write_tokenizer(folder)
            write_dataset(source, num_rows, args.num_words, args.row_group)
            command = [sys.executable, "-m", "luffy_trl.data.openr1", "--dataset_name", str(source)]
            command += ["--output_dir", str(output), "--model_name_or_path", folder, "--max_completion_length", "8192"]
            peak, workers, seconds = measure(command)
            kept = json.loads((output / "report.json").read_text())["rows"]["kept"]
            metadata = pq.ParquetFile(source).metadata
            size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)) / 1e6
            cells = [num_rows, size, kept, peak, workers, seconds]
            print(f"| {' | '.join(f'{cell:.0f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
