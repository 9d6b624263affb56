#!/usr/bin/env python3
"""Texts to token ids and back, as `vernier generate --prompt` needs it.

  tokenizer.py encode MODEL    stdin: JSON list of texts            stdout: list of lists of ids
  tokenizer.py decode MODEL    stdin: JSON list of lists of ids     stdout: list of texts

MODEL is a model folder that holds a tokenizer.json, or such a file. Encoding adds the special tokens that the tokenizer adds,
decoding leaves them out. Exit codes: 0 done, 2 wrong usage or bad input, with one line that says what to do.
"""

import json
import sys
from pathlib import Path


def fail(message):
    print(f"tokenizer: {' '.join(str(message).split())[:200]}", file=sys.stderr)
    raise SystemExit(2)


def main(arguments):
    if len(arguments) != 2 or arguments[0] not in ("encode", "decode"):
        fail("usage: tokenizer.py encode|decode MODEL")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        fail(f"{error}; tokenizers is needed (tools/setup.sh demo installs it)")
    what, path = arguments[0], Path(arguments[1])
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        fail(f"{path} does not exist: give a folder with a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    except Exception as error:  # the library raises plain Exception
        fail(f"{path} is no tokenizer: {error}")
    try:
        items = json.load(sys.stdin)
        if what == "encode":
            result = [tokenizer.encode(text).ids for text in items]
        else:
            result = [tokenizer.decode(ids) for ids in items]
    except (ValueError, TypeError, OverflowError) as error:
        fail(f"stdin: {error}")
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
