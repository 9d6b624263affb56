#!/usr/bin/env python3
"""Holds examples/consumer to what README says of it: after.cc is before.cc with at most ten lines changed, and README shows
exactly those, as a diff. With --fix writes the diff into README.

Exits with 1 and says why where that is not so.
"""

import difflib
import pathlib
import re
import sys

MOST_LINES = 10
BLOCK = re.compile(r"\n```diff\n(.*?)```\n", re.S)  # README has one


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    before, after = ((root / "examples/consumer" / name).read_text().splitlines(True) for name in ("before.cc", "after.cc"))
    lines = list(difflib.unified_diff(before, after, n=2))[2:]  # without the files' names
    changed = max(sum(line.startswith(sign) for line in lines) for sign in "+-")
    if changed > MOST_LINES:
        print(f"examples/consumer: {changed} lines changed from before.cc to after.cc, at most {MOST_LINES} may be")
        return 1
    diff = "".join("\n" if line.startswith("@@") else line for line in lines).lstrip("\n")
    path = root / "README.md"
    readme = path.read_text()
    blocks = BLOCK.findall(readme)
    if len(blocks) != 1:
        print(f"README.md: {len(blocks)} diff blocks, expected one")
        return 1
    if "--fix" in sys.argv[1:]:
        path.write_text(BLOCK.sub(lambda _: f"\n```diff\n{diff}```\n", readme))
    elif blocks[0] != diff:
        print("README.md: its diff is not that of examples/consumer; run tools/check_consumer.py --fix")
        return 1
    print(f"consumer: {changed} lines changed, README shows them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
