# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""TRL's docstring format as Markdown, for the API page."""

import re

from griffe import Extension


_SECTION = re.compile(r"(Args|Parameters|Returns|Raises|Example):")
_PARAMETER = re.compile(r"([\w*, ]+?)( \(.*\))?:")


def to_markdown(docstring: str) -> str:
    """Sections become bold words, parameters items of a list, and references like [`~trl.GRPOConfig`] plain code."""
    docstring = re.sub(r"\[`(?:~[\w.]*\.)?([\w.]+)`\]", r"`\1`", docstring)
    docstring = re.sub(r"^(    \w[\w, ]*,)\n    (?=\w)", r"\1 ", docstring, flags=re.MULTILINE)  # names over two lines
    lines, section = [], None
    for line in docstring.splitlines():
        if match := _SECTION.fullmatch(line):
            section = match[1]
            lines += ["", f"**{section}**", ""]
        elif section is None or line and not line.startswith(" "):
            section = None
            lines.append(line)
        else:
            line = line[4:]
            if line.startswith("> "):
                lines += ["", f"**{line[2:]}**", ""]
            elif section in ("Args", "Parameters") and (match := _PARAMETER.fullmatch(line)):
                lines.append(f"- **`{match[1]}`**{match[2] or ''}:")
            else:
                lines.append(line)
    return "\n".join(lines)


class TrlDocstrings(Extension):
    """Rewrites what griffe collects."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
