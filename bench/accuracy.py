#!/usr/bin/env python3
"""Accuracy of the language-model recipes on trained reference models, beside what others reach.

usage: accuracy.py --models DIR [--vernier build/bin/vernier] [--rows NAME ...] [--out RESULTS.json]
                   [--results EARLIER.json ...] [--markdown TABLE.md] [--probe qat_probe.py]
                   [-- further options of vernier]

DIR holds llama-13m and opt-14m (Hugging Face folders with token_ids.npz) and plant_outliers.py,
which makes copies with activation outliers that compute the same function. Perplexity is that of
the first 300 windows of docs_heldout, 512 tokens each, the first not scored; "docs" are its last
32 windows, "wiki" the first 32 of wikitext2_valid, "self" windows sampled from the float model.
Every figure is that of mode integer, from the checkpoint as it was written.

Needs numpy and h5py, and for the copies with outliers torch and safetensors.
"""
import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

FLOAT = {"llama-13m": 19.8825, "opt-14m": 19.2803}


@dataclass
class Row:
    name: str
    title: str
    model: str
    command: str                      # quantize or train
    options: list = field(default_factory=list)
    peer: str = ""                    # the best found by hand or by a probe, perplexity
    goal: float = 0.0


def search(name, title, model, data, peer, goal, recipe="w8a8-smoothquant"):
    options = ["--recipe", recipe, "--data", data]
    return Row(name, title, model, "quantize", options, peer, goal)


def train(name, title, recipe, peer, goal, data=None):
    options = ["--recipe", recipe] + (["--data", data] if data else [])
    return Row(name, title, "llama-13m", "train", options, peer, goal)


ROWS = [
    search("llama-docs", "llama-13m W8A8 static, docs", "llama-13m", "{docs}", "20.071", 20.06),
    search("llama-outliers-docs", "the same, with outliers", "llama-13m-outliers", "{docs}",
           "20.119", 20.07),
    search("llama-wiki-self", "llama-13m W8A8 static, wiki + self", "llama-13m", "{wiki}+self",
           "20.072", 20.08),
    search("llama-self", "llama-13m W8A8 static, no data", "llama-13m", "self:256", "20.121",
           20.11),
    search("opt-docs", "opt-14m W8A8 static, docs", "opt-14m", "{docs}", "19.293", 19.293),
    search("opt-outliers-docs", "the same, with outliers", "opt-14m-outliers", "{docs}", "19.297",
           19.293),
    search("llama-outliers-token", "llama-13m with outliers, W8A8 per token, docs",
           "llama-13m-outliers", "{docs}", "19.964", 19.945, "w8a8-smoothquant-dynamic"),
    search("opt-outliers-token", "opt-14m with outliers, W8A8 per token, docs",
           "opt-14m-outliers", "{docs}", "19.288", 19.288, "w8a8-smoothquant-dynamic"),
    train("train-w4a8", "llama-13m W4A8 per token, trained, no data", "qat-lm-w4a8", "19.847",
          19.80),
    train("train-w3a8", "W3A8 per token, trained, no data", "qat-lm-w3a8", "21.83", 21.3),
    train("train-w2a8", "W2A8 per token, trained, no data", "qat-lm-w2a8", "28.0", 26),
    train("train-w8a8-static", "W8A8 static, trained, no data", "qat-lm-w8a8-static", "19.839",
          19.82),
    train("train-w4a8-static", "W4A8 static, trained, no data", "qat-lm-w4a8-static", "19.960",
          19.90),
    train("train-w4a4", "W4A4 per token, trained, no data", "qat-lm-w4a4", "26.27", 22),
    train("train-w4a8-text", "W4A8 per token, trained on text", "qat-lm-w4a8", "20.81", 20.6,
          "{text}"),
]


def cut(models, folder):
    """The windows of the protocol as HDF5 files, by model and name."""
    import h5py
    import numpy as np

    def write(path, parts):
        if path.exists():
            return
        with h5py.File(path, "w") as file:
            file.create_dataset("input_ids", data=np.concatenate(parts).astype(np.int32),
                                compression="gzip")

    for model in FLOAT:
        streams = np.load(models / model / "token_ids.npz")

        def windows(key, first, count=None):
            ids = streams[key]
            ids = ids[: len(ids) // 512 * 512].reshape(-1, 512) if first >= 0 else ids
            if first < 0:
                return ids[first * 512:].reshape(-1, 512)
            return ids[first:] if count is None else ids[first:first + count]

        write(folder / f"{model}-docs.h5", [windows("docs_heldout", -32)])
        write(folder / f"{model}-eval.h5", [windows("docs_heldout", 0, 300)])
        write(folder / f"{model}-wiki.h5", [windows("wikitext2_valid", 0, 32)])
        write(folder / f"{model}-text.h5",
              [windows("wikitext2_test", 0), windows("docs_heldout", 300)])


def run_row(row, args, folder):
    base = row.model.removesuffix("-outliers")
    source = args.models / base
    if row.model != base:
        source = folder / row.model
        if not (source / "config.json").exists():
            subprocess.run([sys.executable, args.models / "plant_outliers.py", args.models / base,
                            source], check=True, stdout=subprocess.DEVNULL)
    files = {key: folder / f"{base}-{key}.h5" for key in ("docs", "eval", "wiki", "text")}
    out = folder / f"{row.name}.h5"
    command = [args.vernier, row.command, "--model", source, "--eval-data", files["eval"], "--out",
               out, "--json"] + [option.format(**files) for option in row.options] + args.further
    start = time.time()
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        return {"name": row.name, "failed": done.returncode}
    report = json.loads(done.stdout)
    result = {"name": row.name, "seconds": round(time.time() - start, 1),
              "perplexity": report["integer"], "fake_quant": report["fake_quant"],
              "float": report["float"], "kl": report.get("kl_integer"),
              "code_mismatches": report["code_mismatches"],
              "accumulator_mismatches": report["accumulator_mismatches"],
              "passed": report["passed"], "device": report.get("device")}
    for key in ("tokens_per_second", "steps", "perplexity_before"):
        if key in report:
            result[key] = report[key]
    return result


def probe_speed(args, source):
    """Tokens a second of a plain PyTorch program that trains the same, alone on the machine."""
    steps = 200
    done = subprocess.run([sys.executable, args.probe, source, source, "4", "text", str(steps), "3e-4",
                           "learned"], stdout=subprocess.PIPE, text=True, check=True)
    # Progress lines end with the seconds since the start: of the last three quarters.
    seconds = [float(match[1]) for match in re.finditer(r" s (\d+(?:\.\d+)?)$", done.stdout, re.M)]
    return (steps * 3 // 4) * 16 * 512 / max(seconds[-1] - seconds[0], 1e-9), done.stdout


def table(rows, results):
    by_name = {result["name"]: result for result in results}
    lines = ["| | float | best by hand or probe | asked | vernier | fake-quant | codes and "
             "accumulators that differ | s |",
             "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        result = by_name.get(row.name)
        if not result or "perplexity" not in result:
            lines.append(f"| {row.title} | | {row.peer} | {row.goal} | failed | | | |")
            continue
        wrong = result["code_mismatches"] + result["accumulator_mismatches"]
        mark = "" if result["perplexity"] <= row.goal else " (not reached)"
        lines.append(f"| {row.title} | {result['float']:.4f} | {row.peer} | {row.goal} | "
                     f"**{result['perplexity']:.4f}**{mark} | {result['fake_quant']:.4f} | "
                     f"{wrong} | {result['seconds']:.0f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--vernier", default="build/bin/vernier")
    parser.add_argument("--rows", nargs="*", help="names of rows (default: all)")
    parser.add_argument("--work", type=Path, help="folder for windows, copies and checkpoints, kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path, nargs="*", default=[],
                        help="--out files of runs whose rows are taken over instead of run")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--probe", help="qat_probe.py, to time beside vernier train")
    parser.add_argument("further", nargs="*", help="after --: options for every vernier command")
    args = parser.parse_args()
    rows = [row for row in ROWS if not args.rows or row.name in args.rows]
    known = {result["name"]: result for path in args.results
             for result in json.loads(path.read_text())["rows"] if "perplexity" in result}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if (any(row.name not in known for row in rows)
                and not all((folder / f"{model}-eval.h5").exists() for model in FLOAT)):
            cut(args.models, folder)
        results = []
        for row in rows:
            if row.name in known:
                results.append(known[row.name])
                continue
            print(f"--- {row.title}", file=sys.stderr, flush=True)
            results.append(run_row(row, args, folder))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        report = {"date": time.strftime("%Y-%m-%d"), "host": platform.machine(), "rows": results}
        if args.probe:
            report["probe_tokens_per_second"], report["probe_output"] = probe_speed(
                args, args.models / "llama-13m")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    text = table(rows, results)
    if args.probe:
        ours = [r["tokens_per_second"] for r in results if "tokens_per_second" in r]
        text += (f"\n\nTraining speed: {', '.join(f'{v:,.0f}' for v in ours)} tokens/s; the probe "
                 f"alone {report['probe_tokens_per_second']:,.0f}.")
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    return 0 if all("perplexity" in result for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
