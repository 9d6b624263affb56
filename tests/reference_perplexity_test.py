#!/usr/bin/env python3
"""Perplexities of reference models, computed by transformers, against `vernier eval --metric perplexity`.

VERNIER_REFERENCE_MODELS names a folder with a folder for every model: the model itself, token_ids.npz (streams of token ids) and
reference.json (NAME: [perplexity, summed negative log-likelihood, tokens scored] over contiguous windows of 512 tokens of the
stream NAME, the first of each not scored). Skipped where it is not set. VERNIER_REFERENCE_STREAMS, names with commas, chooses
the streams (wikitext2_test).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WINDOW = 512


def main():
    folder = os.environ.get("VERNIER_REFERENCE_MODELS")
    if not folder:
        print("skipped: VERNIER_REFERENCE_MODELS does not name a folder of models")
        return 77
    try:
        import h5py
        import numpy as np
    except ImportError as error:
        print(f"skipped: {error}")
        return 77
    streams = os.environ.get("VERNIER_REFERENCE_STREAMS", "wikitext2_test").split(",")
    failed = tested = 0
    for reference in sorted(Path(folder).glob("*/reference.json")):
        figures = json.loads(reference.read_text())
        ids = np.load(reference.parent / "token_ids.npz")
        for stream in streams:
            if stream not in figures or stream not in ids:
                continue
            expected, _, scored = figures[stream]
            windows = ids[stream].size // WINDOW
            if windows * (WINDOW - 1) != scored:
                continue  # the file keeps only a part of what the figure is of
            with tempfile.TemporaryDirectory() as work:
                data = Path(work) / "tokens.h5"
                with h5py.File(data, "w") as file:
                    file["input_ids"] = ids[stream][: windows * WINDOW].astype(np.int64).reshape(-1, WINDOW)
                answer = subprocess.run(
                    [os.environ["VERNIER_PROGRAM"], "eval", "--model", reference.parent, "--data", data, "--metric", "perplexity", "--json"],
                    check=True, stdout=subprocess.PIPE)
            found = json.loads(answer.stdout)["value"]
            good = abs(found / expected - 1) < 1e-4
            print(f"{reference.parent.name} {stream}: {found:.5f}, transformers {expected:.5f}{'' if good else '  FAILED'}", flush=True)
            tested += 1
            failed += not good
    if not tested:
        print(f"skipped: no model in {folder} has figures of the streams {', '.join(streams)}")
        return 77
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
