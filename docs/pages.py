# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The programs on the pages of the documentation: run, and held to what the pages show.

The blocks marked ``python`` of a page are one program, run from top to bottom in one namespace. Where a block marked
``output`` follows, it shows what the program has printed since the output before. A picture that the page shows from
``pictures/`` is one that its program saves under the same name.

    python docs/pages.py docs/quickstart.md ...     run pages and write their outputs and pictures anew

The tests run every page and compare (`disagreement`).
"""

import contextlib
import io
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
RELATIVE = 0.02  # by which a number may differ: another processor rounds otherwise, and Monte Carlo amplifies it

_FENCE = re.compile(r"^```(?P<kind>python|output)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
_PICTURE = re.compile(r"\]\((?:docs/)?pictures/([^)]+)\)")
_NUMBER = re.compile(r"([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)")


def all_pages():
    """The pages of the documentation and the README."""
    return [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]


def run(page):
    """Run the program of a page in an empty directory that sees the examples.

    Returns:
        The text of the page with the outputs as printed now, and the pictures that were saved, {name: bytes}.
    """
    text = page.read_text()
    namespace = {"__name__": "__main__"}
    printed = io.StringIO()

    def replace(fence):
        if fence["kind"] == "python":
            line = text.count("\n", 0, fence.start("body"))
            code = compile("\n" * line + fence["body"], str(page), "exec")  # so that errors name lines of the page
            exec(code, namespace)
            return fence[0]
        shown = "\n".join(line.rstrip() for line in printed.getvalue().strip("\n").split("\n"))
        printed.seek(0)
        printed.truncate()
        return f"```output\n{shown}\n```"

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        os.symlink(ROOT / "examples", "examples")
        new = _FENCE.sub(replace, text)
        pictures = {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}
    return new, pictures


def disagreement(shown, printed):
    """The first difference between two texts, or None; numbers may differ by `RELATIVE` or by one in the last digit."""
    shown_parts, printed_parts = (_NUMBER.split(" ".join(text.split())) for text in (shown, printed))
    for k, (old, new) in enumerate(itertools.zip_longest(shown_parts, printed_parts, fillvalue="")):
        if (k % 2 and not _close(old, new)) or (k % 2 == 0 and old.split() != new.split()):
            return f"{new!r} was printed instead of {old!r}, behind {''.join(shown_parts[max(0, k - 4) : k])!r}"
    return None


def pictures_shown(page):
    """Names of the pictures that a page shows."""
    return _PICTURE.findall(page.read_text())


def has_program(page):
    """Whether there is anything to run on a page."""
    return "```python\n" in page.read_text()


def _close(shown, printed):
    if not (shown and printed):
        return False
    digits = shown.partition(".")[2].partition("e")[0]
    unit = 0.0 if "e" in shown.lower() else 10.0 ** -len(digits)
    return abs(float(shown) - float(printed)) <= max(1.001 * unit, RELATIVE * abs(float(shown)))


def main(names):
    """Write outputs and pictures of the named pages anew."""
    for name in names:
        page = Path(name).resolve()
        text, pictures = run(page)
        page.write_text(text)
        PICTURES.mkdir(exist_ok=True)
        for picture in set(pictures_shown(page)) & set(pictures):
            (PICTURES / picture).write_bytes(pictures[picture])


if __name__ == "__main__":
    main(sys.argv[1:])
