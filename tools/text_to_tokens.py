#!/usr/bin/env python3
"""Turns text into token data in HDF5, as `vernier --data` reads it.

  text_to_tokens.py --tokenizer MODEL --text  FILE.txt --seq-len 128 --out OUT.h5              one sample a line
  text_to_tokens.py --tokenizer MODEL --text  FILE.txt --seq-len 512 --out OUT.h5 --windows    windows of one long text
  text_to_tokens.py --tokenizer MODEL --pairs FILE.csv --seq-len 128 --out OUT.h5              scored sentence pairs
  text_to_tokens.py --tokenizer MODEL --pairs FILE.csv --seq-len 128 --out OUT.h5 --sentences-of-pairs

MODEL is a model folder that holds a tokenizer.json, or such a file.

The output holds input_ids and attention_mask (ones, then zeros), both int64 [samples, longest sample]; for pairs, these in
groups a/ and b/, and score, float64 [pairs]. The attributes tokenizer_sha256 and source say what it was made from. The same
input gives the same bytes. The file appears whole or not at all. Exit codes: 0 done, 2 wrong usage or bad input.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

try:
    import h5py
    import numpy as np
    from tokenizers import Tokenizer
except ImportError as error:
    print(f"text_to_tokens: {error}; needed are numpy, h5py and tokenizers (tools/setup.sh demo installs them)", file=sys.stderr)
    raise SystemExit(2)

BATCH = 1024  # texts tokenized between two updates of the progress line
LONGEST = 2**20  # tokens of a sample that vernier reads


class InputError(Exception):
    """Bad input: one line that says what is wrong and where."""


# ---- Reading -------------------------------------------------------------------------------------------------------------------
def read_bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def decoded_lines(path):
    """The lines of a UTF-8 file. Decoded one by one, so that an error can name its line."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError:
                    raise InputError(f"{path}:{number}: this line is not UTF-8 text") from None
                yield text.removeprefix("\ufeff") if number == 1 else text
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def read_lines(path, limit=None):
    """(where, text) of every line that is not blank."""
    samples = []
    for number, line in enumerate(decoded_lines(path), 1):
        if line.strip():
            samples.append((f"{path}:{number}", line.strip()))
        if len(samples) == limit:
            break
    if not samples:
        raise InputError(f"{path}: the file holds no text")
    return samples


def read_pairs(path, limit=None):
    """(where, sentence1, sentence2, score) of every row of a CSV file without header."""
    pairs = []
    reader = csv.reader(decoded_lines(path), strict=True)
    while len(pairs) != limit:
        where = f"{path}:{reader.line_num + 1}"  # where the row starts: a quoted field may span lines
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{where}: bad CSV row: {error}") from None
        if row is None:
            break
        if not row:
            continue
        if len(row) != 3:
            raise InputError(f"{where}: bad CSV row: {len(row)} fields where sentence1,sentence2,score is expected")
        if not row[0].strip() or not row[1].strip():
            raise InputError(f"{where}: bad CSV row: a sentence is empty")
        try:
            score = float(row[2])
        except ValueError:
            hint = " (the file is to have no header line)" if not pairs else ""
            raise InputError(f"{where}: bad CSV row: score {row[2]!r} is not a number{hint}") from None
        if not math.isfinite(score):
            raise InputError(f"{where}: bad CSV row: score {row[2]!r} is not finite")
        pairs.append((where, row[0], row[1], score))
    if not pairs:
        raise InputError(f"{path}: the file holds no rows")
    return pairs


# ---- Tokens --------------------------------------------------------------------------------------------------------------------
@dataclass
class TextTokenizer:
    tokenizer: Tokenizer
    path: Path
    sha256: str
    pad_id: int
    id_limit: int  # ids are below it
    id_limit_of: str  # what sets it, for messages


def load_tokenizer(path):
    """The tokenizer of a model folder or of a tokenizer.json."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    data = read_bytes(file)
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise InputError(f"{file}: not a tokenizer that can be loaded: {one_line(error)}") from None
    pad_ids = [(tokenizer.padding or {}).get("pad_id"), tokenizer.token_to_id("[PAD]"), tokenizer.token_to_id("<pad>"), 0]
    pad_id = next(i for i in pad_ids if i is not None)
    # A model indexes its embedding with the ids: where the model is at hand, its table sets the limit.
    limit, limit_of = 2**31, "32-bit ids"
    try:
        size = json.loads((file.parent / "config.json").read_bytes())["vocab_size"]
        if isinstance(size, int) and 0 < size < limit:
            limit, limit_of = size, "vocab_size in the model's config.json"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return TextTokenizer(tokenizer, file, hashlib.sha256(data).hexdigest(), pad_id, limit, limit_of)


def encode(loaded, samples, seq_len=None):
    """Token ids of (where, text) samples, and how many samples were cut.

    With seq_len, samples are cut to it and carry the tokenizer's special tokens; without, they are taken whole and bare.
    """
    tokenizer = loaded.tokenizer
    tokenizer.no_padding()  # many a tokenizer.json pads every sample to one length
    tokenizer.no_truncation()
    if seq_len is not None:
        special = tokenizer.num_special_tokens_to_add(False)
        if seq_len <= special:
            raise InputError(f"--seq-len {seq_len}: the tokenizer's {special} special tokens leave no room for text")
        tokenizer.enable_truncation(seq_len)
    rows, cut = [], 0
    start, shown = time.monotonic(), False
    try:
        for first in range(0, len(samples), BATCH):
            batch = samples[first : first + BATCH]
            try:
                encodings = tokenizer.encode_batch([text for _, text in batch], add_special_tokens=seq_len is not None)
            except Exception as error:
                raise InputError(f"{batch[0][0]}: this text or one soon after cannot be tokenized: {one_line(error)}") from None
            for (where, _), encoding in zip(batch, encodings):
                ids = np.array(encoding.ids, np.int64)
                if ids.size == 0:
                    raise InputError(f"{where}: the tokenizer makes no token of this text")
                if ids.max() >= loaded.id_limit:
                    raise InputError(f"{where}: token id {ids.max()} overflows {loaded.id_limit_of} ({loaded.id_limit})")
                rows.append(ids)
                cut += bool(encoding.overflowing)
            if sys.stderr.isatty() and time.monotonic() - start > 1:
                print(f"\rtokenizing {len(rows):,} of {len(samples):,}", end="", file=sys.stderr, flush=True)
                shown = True
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    return rows, cut


def encode_windows(loaded, path, seq_len, limit=None):
    """A whole text as one stream of tokens, in windows; what is left at the end is dropped."""
    text = "".join(decoded_lines(path))
    if not text.strip():
        raise InputError(f"{path}: the file holds no text")
    (stream,), _ = encode(loaded, [(path, text)])
    windows = stream[: stream.size // seq_len * seq_len].reshape(-1, seq_len)
    if len(windows) == 0:
        raise InputError(f"{path}: {stream.size} tokens are less than one window of {seq_len}")
    return list(windows[:limit])


def padded(rows, length, pad_id):
    """input_ids and attention_mask of rows of ids."""
    sizes = np.array([row.size for row in rows])
    mask = np.arange(length) < sizes[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.concatenate(rows)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}


# ---- Writing -------------------------------------------------------------------------------------------------------------------
def write(out, datasets, attributes):
    """Writes beside the output and renames, so that no one ever sees half a file."""
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(beside, "w") as file:
            file.attrs.update(attributes)
            for name, values in datasets.items():
                file.create_dataset(name, data=values)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, out)
    except (OSError, RuntimeError, ValueError) as error:  # h5py has all three
        raise InputError(f"{out}: cannot be written: {one_line(getattr(error, 'strerror', None) or error)}") from None
    finally:
        beside.unlink(missing_ok=True)


def check_out(out, inputs):
    try:
        if out.exists() and not out.is_file():
            raise InputError(f"{out}: cannot be written: it is not a regular file")
        if not out.parent.is_dir():
            raise InputError(f"{out}: cannot be written: there is no folder {out.parent}")
        if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
            raise InputError(f"{out}: is an input; name another --out")
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None


def convert(tokenizer, out, seq_len, text=None, pairs=None, limit=None, sentences_of_pairs=False, windows=False):
    """Does what the command line does; `text` or `pairs` is the input file. Returns what --json prints."""
    source, out = Path(pairs if text is None else text), Path(out)
    if seq_len < 3:
        raise InputError(f"--seq-len {seq_len}: at least 3 is needed, two special tokens and one of text")
    if seq_len > LONGEST:
        raise InputError(f"--seq-len {seq_len}: vernier reads samples of at most {LONGEST} tokens")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: at least 1 is needed")
    loaded = load_tokenizer(tokenizer)
    check_out(out, (source, loaded.path))

    scores, cut = None, 0
    if windows:
        rows = encode_windows(loaded, source, seq_len, limit)
    elif text is not None:
        rows, cut = encode(loaded, read_lines(source, limit), seq_len)
    else:
        row_limit = limit if limit is None or not sentences_of_pairs else (limit + 1) // 2
        read = read_pairs(source, row_limit)
        sentences = [(where, sentence) for where, one, two, _ in read for sentence in (one, two)]
        if sentences_of_pairs:
            sentences = sentences[:limit]
        else:
            scores = np.array([score for *_, score in read], np.float64)
        rows, cut = encode(loaded, sentences, seq_len)

    longest = max(row.size for row in rows)
    if scores is None:
        datasets = padded(rows, longest, loaded.pad_id)
    else:
        datasets = {f"{group}/{name}": values for group, half in (("a", rows[0::2]), ("b", rows[1::2]))
                    for name, values in padded(half, longest, loaded.pad_id).items()} | {"score": scores}
    source_name = source.name.encode("utf-8", "replace").decode()  # a file name need not be text
    write(out, datasets, {"tokenizer_sha256": loaded.sha256, "source": source_name})
    return {"samples": len(rows) if scores is None else len(scores), "longest": int(longest), "truncated": cut, "out": str(out)}


# ---- Command line --------------------------------------------------------------------------------------------------------------
def one_line(error):
    return " ".join(str(error).split())[:200]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help tells more)")


def main(arguments=None):
    parser = Parser(prog="text_to_tokens.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="model folder with a tokenizer.json, or such a file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help="UTF-8 text, one sample a line; blank lines are skipped")
    source.add_argument("--pairs", metavar="FILE.csv", help="CSV without header: sentence1,sentence2,score")
    parser.add_argument("--seq-len", required=True, type=int, metavar="N", help="longest sample in tokens; longer ones are cut")
    parser.add_argument("--out", required=True, metavar="OUT.h5")
    parser.add_argument("--limit", type=int, metavar="N", help="write at most N samples, the first ones")
    parser.add_argument("--windows", action="store_true", help="with --text: windows of exactly seq-len, without special tokens")
    parser.add_argument("--sentences-of-pairs", action="store_true", help="with --pairs: each sentence a sample")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        options = parser.parse_args(arguments)
        if options.windows and options.text is None:
            parser.error("--windows goes with --text")
        if options.sentences_of_pairs and options.pairs is None:
            parser.error("--sentences-of-pairs goes with --pairs")
        as_json = options.json
        del options.json
        result = convert(**vars(options))
    except InputError as error:
        print(f"text_to_tokens: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if as_json:
        print(json.dumps(result))
    else:
        cut = f", {result['truncated']:,} texts cut to fit" if result["truncated"] else ""
        print(f"{result['out']}: {result['samples']:,} samples, the longest of {result['longest']} tokens{cut}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
