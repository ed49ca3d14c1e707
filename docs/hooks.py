# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""What mkdocs does beside its plugins: the site holds the files of the repository that its pages speak of."""

from pathlib import Path

from mkdocs.structure.files import File


REPOSITORY = Path(__file__).parent.parent
# Pages and pictures of measurements stand beside their numbers, and not in docs/.
LINKED = (
    "benchmarks/**/*.md",
    "benchmarks/**/*.png",
    "benchmarks/**/*.csv",
    "benchmarks/**/*.py",
    "examples/**/*.sbatch",
)


def on_files(files, config):
    for pattern in LINKED:
        for path in sorted(REPOSITORY.glob(pattern)):
            source = path.relative_to(REPOSITORY).as_posix()
            files.append(File.generated(config, source, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    # docs/ is flat, so that a link which leaves it begins at the root of the repository.
    return markdown.replace("](../", "](") if "/" not in page.file.src_uri else markdown
