# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
Takes the screenshots of the documentation in a headless Chromium, from a run of the quickstart that it makes first:

    python docs/screenshots/take.py

Of a language model, from the cold start of benchmarks/language_model and its problems, it makes one picture:

    python docs/screenshots/take.py --language_model outputs/language_model/.../model --problems .../train.jsonl
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
sys.path[:0] = [str(ROOT / "tests"), str(QUICKSTART)]
import browser  # noqa: E402
import task  # noqa: E402


def luffy(*arguments: str):
    print("$ luffy " + shlex.join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "luffy_trl", *arguments], cwd=ROOT, check=True)


def make_reports(folder: Path, num_steps: int):
    """A run and its report, and the tokens of two traces before and after it."""
    model, data = str(QUICKSTART / "checkpoint" / "model"), folder / "train.jsonl"
    if not (folder / "run" / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        task.make_splits(seed=0)["train"].to_json(data)
        luffy(
            *("train", "--config", "quickstart", "--model_name_or_path", model, "--dataset_name", str(data)),
            *("--output_dir", str(folder / "run"), "--max_steps", str(num_steps), "--use_cpu", "true"),
            *(
                "--eval_strategy",
                "no",
                "--eval_on_start",
                "false",
                "--logging_steps",
                "1",
                "--log_completions",
                "true",
            ),
        )
    luffy("report", str(folder / "run"))
    luffy(
        *("report", "--model", str(folder / "run"), "--before", model, "--rows", "1", "--dataset_name", str(data)),
        *("--config", "quickstart", "--output", str(folder / "tokens.html")),
    )


def take(folder: Path, output: Path):
    """Three pictures: the curves, a group, and the tokens."""
    with browser.chromium(1400, 800) as driver:
        browser.open_page(driver, folder / "run" / "_report.html")
        driver.save_screenshot(str(output / "curves.png"))
        choose = "const kind = document.getElementById('kind'); kind.value = 'differs'; "
        driver.execute_script(choose + "kind.dispatchEvent(new Event('input'))")
        driver.execute_script("document.querySelector('.group > button').click()")
        driver.execute_script("document.getElementById('search').parentNode.scrollIntoView()")
        driver.save_screenshot(str(output / "group.png"))
    take_tokens(folder / "tokens.html", output / "tokens.png")


def take_tokens(page: Path, picture: Path):
    with browser.chromium(900, 2000) as driver:  # an element is cut at the end of the window
        browser.open_page(driver, page)
        driver.find_element("id", "weights").screenshot(str(picture))


def take_language_model(model: str, problems: str, folder: Path, output: Path):
    """The tokens of the first trace."""
    page = folder / "language_model.html"
    folder.mkdir(parents=True, exist_ok=True)
    luffy(*("report", "--model", model, "--rows", "1", "--dataset_name", problems, "--output", str(page)))
    take_tokens(page, output / "language_model.png")


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "screenshots", help="Where the run goes.")
    parser.add_argument("--steps", type=int, default=40, help="Updates of the run.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="Where the pictures go.")
    parser.add_argument("--language_model", help="Folder of a model that the benchmark has trained.")
    parser.add_argument("--problems", help="Its training problems.")
    args = parser.parse_args()
    if args.language_model:
        take_language_model(args.language_model, args.problems, args.folder.absolute(), args.output)
    else:
        make_reports(args.folder.absolute(), args.steps)
        take(args.folder.absolute(), args.output)


if __name__ == "__main__":
    main()
