#!/usr/bin/env python3
"""Checks which file includes what, so that the layers of the code stay layers.

  direction     A file includes from its own folder and from lower ones: kernels < calibration < qat < smoothquant < export <
                recipes < cli. Tests, benchmarks and examples may use all, and are used by none of them.
  spelling      Own headers are included as <vernier/folder/file.h>, which also holds for an installed package.
  exists        An own header that is included exists.
  device        What nvcc compiles (.cu, .cuh and every header they reach) includes no header of LibTorch.
  heavy         kernels/ and calibration/ never include the whole of torch or ATen (a third of a minute a file); their headers
                stay with ATen/core/ and c10/, the declarations of tensors and devices.

Prints file:line: rule: what is wrong, one violation a line, and exits 1 where there is one.
"""

import pathlib
import re
import sys

LAYERS = ["kernels", "calibration", "qat", "smoothquant", "export", "recipes", "cli"]
USERS = ["tests", "bench", "examples", "tools"]
LOW = LAYERS[:2]
SUFFIXES = {".h", ".cc", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
LIBTORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
WHOLE = re.compile(r"^(torch/(torch|all|extension|nn|optim|serialize)\.h|torch/nn/.*|ATen/ATen\.h|ATen/Functions\.h)$")
LIGHT = re.compile(r"^(ATen/core/|c10/)")


def includes(path):
    """(line number, how it is quoted, what is included) for every include of a file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = INCLUDE.match(line)
        if match:
            yield number, match.group(1), match.group(2)


def own(root, path, quote, name):
    """The file of this repository that an include names, or None for a header of someone else."""
    if name.startswith("vernier/"):
        return root / name.removeprefix("vernier/")
    if quote == '"':
        return (path.parent / name).resolve()
    return None


def check(root):
    files = sorted(p for folder in LAYERS + USERS for p in (root / folder).rglob("*") if p.suffix in SUFFIXES)
    problems = []

    def report(path, number, rule, text):
        problems.append(f"{path.relative_to(root)}:{number}: {rule}: {text}")

    for path in files:
        folder = path.relative_to(root).parts[0]
        for number, quote, name in includes(path):
            target = own(root, path, quote, name)
            if target is not None:
                if quote == '"':
                    report(path, number, "spelling", f'"{name}" should be included as <vernier/...>')
                if not target.is_file():
                    report(path, number, "exists", f"{name} does not exist")
                elif folder in LAYERS and target.is_relative_to(root):
                    other = target.relative_to(root).parts[0]
                    if other not in LAYERS or LAYERS.index(other) > LAYERS.index(folder):
                        report(path, number, "direction", f"{folder}/ may not use {other}/")
            elif folder in LOW:
                if WHOLE.match(name):
                    report(path, number, "heavy", f"<{name}> is not for {folder}/")
                elif path.suffix == ".h" and LIBTORCH.match(name) and not LIGHT.match(name):
                    report(path, number, "heavy", f"a header of {folder}/ may include <ATen/core/...> and <c10/...>, not <{name}>")

    # Device code: walk from every file that nvcc sees through own headers. The first way to reach a header is the one told.
    reached, todo = {}, [(p, None) for p in files if p.suffix in (".cu", ".cuh")]
    while todo:
        path, origin = todo.pop(0)
        if path in reached or not path.is_file():
            continue
        reached[path] = origin
        for number, quote, name in includes(path):
            target = own(root, path, quote, name)
            if target is not None:
                todo.append((target, origin or path))
            elif LIBTORCH.match(name):
                via = f" (reached from {origin.relative_to(root)})" if origin else ""
                report(path, number, "device", f"<{name}> in device code{via}")
    return problems, len(files)


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent).resolve()
    problems, count = check(root)
    print("\n".join(problems) if problems else f"includes: {count} files, no violations")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
