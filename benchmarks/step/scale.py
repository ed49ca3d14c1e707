# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
What cutting an optimizer step by length costs on many processes: seconds of planning, and bytes that are sent.

    python benchmarks/step/scale.py

No process is started. Each of up to 1,024 has 8 sequences, in two micro-batches of 4, with lengths as in the paper:
one trace for each seven shorter rollouts. What is timed is what every process does, `plan_processes`. Bytes are
counted from the plan, for a step with old and reference log-probs: the lengths of all sequences, and the sequences
that come from other processes. tests/test_batching.py compares such a count with what real processes receive.
"""

import argparse
import os
import random
import time
import tracemalloc
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch

from luffy_trl.batching import plan_processes


PROCESSES = [32, 64, 128, 256, 512, 1024]
NUM_LOCAL, NUM_MICRO_BATCHES, MAX_LENGTH, TOKEN_BUDGET = 8, 2, 8192, 32768
MODES = {
    "as many as before": {},
    "token budget": {"max_tokens": TOKEN_BUDGET},
    "token budget, padding-free": {"max_tokens": TOKEN_BUDGET, "padding_free": True},
}
# Bytes of a token of a prompt and of a completion, and of a sequence: as sent (int32 ids, a bool, two log-probs; the
# advantage), and as TRL stores them (int64 ids and masks, padding included)
SENT, STORED, PER_SEQUENCE, BYTES_OF_LENGTHS = (4, 4 + 1 + 2 * 4), (16, 16 + 1 + 2 * 4), 4, 8


def make_lengths(num_processes: int) -> torch.Tensor:
    """Tokens of prompts and completions, of shape `(N, 2)`; each process has one trace and seven rollouts."""
    rng = random.Random(num_processes)
    lengths = []
    for _ in range(num_processes):
        prompt = rng.randint(60, 1000)
        for slot in range(NUM_LOCAL):
            completion = rng.lognormvariate(0, 0.5) * (4096 if slot == 0 else 1600) / 1.133
            lengths.append([prompt, max(16, min(MAX_LENGTH, round(completion)))])
    return torch.tensor(lengths)


def measure(num_processes: int, mode: str) -> dict[str, float | str]:
    lengths = make_lengths(num_processes)
    arguments = lengths, num_processes, NUM_MICRO_BATCHES
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        shares = plan_processes(*arguments, **MODES[mode])
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()
    plan_processes(*arguments, **MODES[mode])
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    weights = (lengths @ torch.tensor(SENT) + PER_SEQUENCE).tolist()
    own, received, tokens = [], [], []
    for process, share in enumerate(shares):
        rows = [row for micro_batch, _ in share for row in micro_batch]
        own.append(sum(weights[row] for row in rows))
        received.append(sum(weights[row] for row in rows if row // NUM_LOCAL != process))
        if "padding_free" in MODES[mode]:
            tokens.append(sum(int(lengths[row].sum()) for row in rows))
        else:
            tokens.append(sum(len(micro_batch) * sum(widths) for micro_batch, widths in share))
    num_others = len(lengths) - NUM_LOCAL
    gathered = num_others * (int(lengths.amax(0) @ torch.tensor(STORED)) + PER_SEQUENCE)
    return {
        "processes": num_processes,
        "sequences": len(lengths),
        "mode": mode,
        "micro_batches": sum(map(len, shares)),
        "seconds": min(seconds),
        "memory_mib": memory / 2**20,
        "own_mib": sum(own) / num_processes / 2**20,
        "lengths_mib": BYTES_OF_LENGTHS * num_others / 2**20,
        "received_mib": sum(received) / num_processes / 2**20,
        "gathered_mib": gathered / 2**20,
        "fullest": max(tokens) / (sum(tokens) / num_processes),
    }


def table(results: pd.DataFrame) -> str:
    """What a plan takes, and what is sent because of it (Markdown)."""
    lines = [
        "| sequences | processes | cut | micro-batches | seconds of planning | its memory, MiB "
        "| a process's sequences, MiB | it receives: sequences + lengths, MiB | in all | to gather the step, MiB "
        "| tokens of the fullest process, over the mean |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results.itertuples():
        cells = [
            f"{row.sequences:,}",
            f"{row.processes:,}",
            row.mode,
            f"{row.micro_batches:,}",
            f"{row.seconds:.2f}",
            f"{row.memory_mib:.1f}",
            f"{row.own_mib:.2f}",
            f"{row.received_mib:.2f} + {row.lengths_mib:.2f}",
            f"{(row.received_mib + row.lengths_mib) / row.own_mib:.0%}",
            f"{row.gathered_mib:,.0f}",
            f"{row.fullest:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--processes", nargs="+", type=int, default=PROCESSES, help="How many processes there are.")
    parser.add_argument("--results_dir", type=Path, help="Folder for the table. If not given, it is printed only.")
    args = parser.parse_args()
    results = pd.DataFrame([measure(number, mode) for number in args.processes for mode in MODES])
    print(table(results))
    if args.results_dir is not None:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        results.round(4).to_csv(args.results_dir / "scale.csv", index=False)
        (args.results_dir / "scale.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
