#!/usr/bin/env python3
"""Tests of tools/text_to_tokens.py with a tiny tokenizer made here. Exits 77 ("skipped") without the packages it needs."""

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

try:
    import h5py
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

sys.dont_write_bytecode = True
SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "text_to_tokens.py"
sys.path.insert(0, str(SCRIPT.parent))
import text_to_tokens

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran"]
PAD, UNK, CLS, SEP = 3, 4, 5, 6  # padding is not 0 on purpose
IDS = {"[PAD]": PAD, "[UNK]": UNK, "[CLS]": CLS, "[SEP]": SEP} | {word: 10 + i for i, word in enumerate(WORDS)}


def make_tokenizer(path, vocabulary=IDS, padding=True, special=True):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    if padding:  # as in many a published tokenizer.json: every sample padded and cut to one length
        tokenizer.enable_padding(length=32, pad_id=PAD, pad_token="[PAD]")
        tokenizer.enable_truncation(4)
    tokenizer.save(str(path))


class TextToTokens(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.tokenizer = self.folder / "model" / "tokenizer.json"
        self.tokenizer.parent.mkdir()
        make_tokenizer(self.tokenizer)
        self.out = self.folder / "out" / "tokens.h5"
        self.out.parent.mkdir()

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def main(self, *arguments, tokenizer=None, seq_len=8):
        """Exit code, stdout and stderr of a run."""
        arguments = ["--tokenizer", tokenizer or self.tokenizer.parent, "--seq-len", seq_len, "--out", self.out, *arguments]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = text_to_tokens.main([str(a) for a in arguments])
        return code, out.getvalue(), err.getvalue()

    def run_good(self, *arguments, **options):
        code, out, err = self.main(*arguments, "--json", **options)
        self.assertEqual((code, err), (0, ""))
        self.assertEqual([p.name for p in self.out.parent.iterdir()], [self.out.name])  # no temporary file stays
        return json.loads(out)

    def run_bad(self, expected, *arguments, **options):
        code, out, err = self.main(*arguments, **options)
        self.assertEqual((code, out), (2, ""), err)
        self.assertIn(expected, err)
        self.assertEqual(err.count("\n"), 1, err)
        self.assertTrue(err.startswith("text_to_tokens: "), err)
        self.assertEqual(list(self.out.parent.iterdir()), [])

    def read(self, *names):
        with h5py.File(self.out) as file:
            return [file[name][()] for name in names]

    # ---- What is written ----
    def test_lines(self):
        text = self.file("a.txt", "the cat sat\n\n  \r\na dog\r\nthe zebra")
        result = self.run_good("--text", text)
        self.assertEqual(result, {"samples": 3, "longest": 5, "truncated": 0, "out": str(self.out)})
        ids, mask = self.read("input_ids", "attention_mask")
        np.testing.assert_array_equal(ids, [[CLS, 10, 11, 12, SEP], [CLS, 14, 16, SEP, PAD], [CLS, 10, UNK, SEP, PAD]])
        np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
        self.assertEqual((ids.dtype, mask.dtype), (np.int64, np.int64))
        with h5py.File(self.out) as file:
            self.assertEqual(sorted(file), ["attention_mask", "input_ids"])
            self.assertEqual(file.attrs["source"], "a.txt")
            self.assertEqual(file.attrs["tokenizer_sha256"], hashlib.sha256(self.tokenizer.read_bytes()).hexdigest())

    def test_cut_to_length_keeps_special_tokens(self):
        result = self.run_good("--text", self.file("a.txt", "the cat sat on a mat\na dog\n"), seq_len=4)
        self.assertEqual((result["longest"], result["truncated"]), (4, 1))
        np.testing.assert_array_equal(self.read("input_ids")[0], [[CLS, 10, 11, SEP], [CLS, 14, 16, SEP]])

    def test_limit_and_byte_order_mark(self):
        text = self.file("a.txt", b"\xef\xbb\xbfthe cat\na dog\n\xff is not reached\n")
        self.assertEqual(self.run_good("--text", text, "--limit", 2)["samples"], 2)
        self.assertEqual(self.read("input_ids")[0][0, 1], IDS["the"])

    def test_more_than_one_batch(self):
        lines = [" ".join(WORDS[: 1 + i % len(WORDS)]) for i in range(2 * text_to_tokens.BATCH + 5)]
        result = self.run_good("--text", self.file("a.txt", "\n".join(lines)), seq_len=16)
        self.assertEqual((result["samples"], result["longest"]), (len(lines), 10))
        ids, mask = self.read("input_ids", "attention_mask")
        np.testing.assert_array_equal(mask.sum(1), [3 + i % len(WORDS) for i in range(len(lines))])
        self.assertTrue((ids[mask == 0] == PAD).all())

    def test_windows(self):
        text = self.file("a.txt", "the cat sat on\n\na mat the dog ran\nthe\n")
        result = self.run_good("--text", text, "--windows", seq_len=4)
        self.assertEqual((result["samples"], result["longest"]), (2, 4))
        ids, mask = self.read("input_ids", "attention_mask")
        np.testing.assert_array_equal(ids, [[10, 11, 12, 13], [14, 15, 10, 16]])  # across lines, the last two dropped
        self.assertTrue((mask == 1).all())
        self.assertEqual(self.run_good("--text", text, "--windows", "--limit", 1, seq_len=4)["samples"], 1)

    def test_pairs(self):
        pairs = self.file("p.csv", 'the cat,"a dog, ""ran""",2.5\n"the\nmat",a,0\n\na dog,a dog ran on the mat,5.0\n')
        result = self.run_good("--pairs", pairs)
        self.assertEqual((result["samples"], result["longest"]), (3, 8))
        a, a_mask, b, b_mask, score = self.read("a/input_ids", "a/attention_mask", "b/input_ids", "b/attention_mask", "score")
        np.testing.assert_array_equal(score, [2.5, 0, 5])
        self.assertEqual((score.dtype, a.shape, b.shape), (np.float64, (3, 8), (3, 8)))
        np.testing.assert_array_equal(a[:, :5], [[CLS, 10, 11, SEP, PAD], [CLS, 10, 15, SEP, PAD], [CLS, 14, 16, SEP, PAD]])
        np.testing.assert_array_equal(b[2], [CLS, 14, 16, 17, 13, 10, 15, SEP])
        np.testing.assert_array_equal(a_mask.sum(1), [4, 4, 4])
        self.assertEqual(b_mask.sum(1)[2], 8)
        self.assertEqual(self.run_good("--pairs", pairs, "--limit", 2)["samples"], 2)

    def test_sentences_of_pairs(self):
        pairs = self.file("p.csv", "the,cat,1\nsat,on,2\na,mat,3\n")
        self.assertEqual(self.run_good("--pairs", pairs, "--sentences-of-pairs")["samples"], 6)
        np.testing.assert_array_equal(self.read("input_ids")[0][:, 1], range(10, 16))
        self.assertEqual(self.run_good("--pairs", pairs, "--sentences-of-pairs", "--limit", 3)["samples"], 3)
        np.testing.assert_array_equal(self.read("input_ids")[0][:, 1], range(10, 13))

    def test_same_input_same_bytes(self):
        text = self.file("a.txt", "the cat sat\na dog\n")
        self.run_good("--text", text)
        first = self.out.read_bytes()
        self.run_good("--text", text)
        self.assertEqual(first, self.out.read_bytes())

    def test_padding_without_a_pad_id(self):
        make_tokenizer(self.tokenizer, {"[UNK]": UNK, "[CLS]": CLS, "[SEP]": SEP, "the": 10, "cat": 11}, padding=False)
        self.run_good("--text", self.file("a.txt", "the cat\nthe\n"), tokenizer=self.tokenizer)
        np.testing.assert_array_equal(self.read("input_ids")[0][1], [CLS, 10, SEP, 0])

    def test_as_a_program(self):
        command = [sys.executable, SCRIPT, "--tokenizer", self.tokenizer, "--out", self.out, "--seq-len", "8", "--text"]
        good = subprocess.run([*command, self.file("a.txt", "the cat\n")], capture_output=True, text=True)
        self.assertEqual((good.returncode, good.stderr), (0, ""))
        self.assertEqual(good.stdout, f"{self.out}: 1 samples, the longest of 4 tokens\n")
        bad = subprocess.run([*command, self.folder / "missing.txt"], capture_output=True, text=True)
        self.assertEqual((bad.returncode, bad.stdout), (2, ""))
        self.assertEqual(bad.stderr, f"text_to_tokens: {self.folder / 'missing.txt'}: No such file or directory\n")

    # ---- What is refused ----
    def test_bad_files(self):
        self.run_bad("missing.txt: No such file", "--text", self.folder / "missing.txt")
        self.run_bad("missing.csv: No such file", "--pairs", self.folder / "missing.csv")
        self.run_bad("Is a directory", "--text", self.folder)
        self.run_bad("holds no text", "--text", self.file("empty.txt", ""))
        self.run_bad("holds no text", "--text", self.file("blank.txt", "\n  \n"))
        self.run_bad("holds no text", "--text", self.file("blank.txt", "\n  \n"), "--windows")
        self.run_bad("holds no rows", "--pairs", self.file("empty.csv", "\n"))
        self.run_bad("bytes.txt:2: this line is not UTF-8", "--text", self.file("bytes.txt", b"the\n\xff\xfe\n"))
        self.run_bad("bytes.txt:1: this line is not UTF-8", "--text", self.file("bytes.txt", b"\x80"), "--windows")
        self.run_bad("bytes.csv:2: this line is not UTF-8", "--pairs", self.file("bytes.csv", b"a,a,1\n\xff,a,1\n"))

    def test_bad_rows(self):
        for row, expected in {
            "the,cat": "2 fields",
            "the,cat,1,2": "4 fields",
            "the,,1": "a sentence is empty",
            " ,cat,1": "a sentence is empty",
            "the,cat,high": "score 'high' is not a number",
            "the,cat,": "score '' is not a number",
            "the,cat,nan": "score 'nan' is not finite",
            "the,cat,-inf": "score '-inf' is not finite",
            'the,"cat,1': "",
            'the,"cat" dog,1': "",
        }.items():
            with self.subTest(row=row):
                # The row before spans two lines, and a blank one follows: the number is that of the line in the file.
                pairs = self.file("p.csv", f'"the\ncat",sat,1\n\n{row}\n')
                self.run_bad("p.csv:4: bad CSV row: " + expected, "--pairs", pairs)
        self.run_bad("no header line", "--pairs", self.file("h.csv", "sentence1,sentence2,score\nthe,cat,1\n"))

    def test_bad_tokenizers(self):
        text = self.file("a.txt", "the cat\n")
        self.run_bad("No such file", "--text", text, tokenizer=self.folder / "missing")
        self.run_bad("tokenizer.json: No such file", "--text", text, tokenizer=self.out.parent)
        for content in (b"", b"{}", b"\xff\xfe", b'{"model": 1}'):
            self.run_bad("not a tokenizer that can be loaded", "--text", text, tokenizer=self.file("t.json", content))
        make_tokenizer(self.tokenizer, {"the": 10}, padding=False, special=False)  # has no token for other words
        self.run_bad("a.txt:1: this text or one soon after cannot be tokenized", "--text", text)

    def test_ids_overflow(self):
        text = self.file("a.txt", "the cat\nthe mat\n")
        config = self.tokenizer.parent / "config.json"
        config.write_text('{"vocab_size": 15}')
        self.run_bad("a.txt:2: token id 15 overflows vocab_size in the model's config.json (15)", "--text", text)
        self.run_bad("token id 15 overflows", "--text", text, "--windows", seq_len=3)
        config.write_text("not JSON")
        content = json.loads(self.tokenizer.read_text())
        content["model"]["vocab"]["cat"] = 2**31
        self.tokenizer.write_text(json.dumps(content))
        self.run_bad("a.txt:1: token id 2147483648 overflows 32-bit ids", "--text", text)

    def test_bad_lengths_and_limits(self):
        text = self.file("a.txt", "the cat\n")
        self.run_bad("--seq-len 2: at least 3", "--text", text, seq_len=2)
        self.run_bad("--seq-len -1: at least 3", "--text", text, seq_len=-1)
        self.run_bad("at most 1048576", "--text", text, seq_len=2**64)
        self.run_bad("invalid int value", "--text", text, seq_len="many")
        self.run_bad("--limit 0: at least 1", "--text", text, "--limit", 0)
        self.run_bad("2 tokens are less than one window of 8", "--text", text, "--windows")
        tokenizer = Tokenizer.from_file(str(self.tokenizer))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] [CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
        tokenizer.save(str(self.tokenizer))
        self.run_bad("3 special tokens leave no room", "--text", text, seq_len=3)

    def test_text_without_tokens(self):
        make_tokenizer(self.tokenizer, special=False)
        tokenizer = Tokenizer.from_file(str(self.tokenizer))
        tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("-")
        tokenizer.save(str(self.tokenizer))
        self.run_bad("a.txt:2: the tokenizer makes no token", "--text", self.file("a.txt", "the\n-\n"))

    def test_bad_usage(self):
        text, pairs = self.file("a.txt", "the\n"), self.file("p.csv", "the,cat,1\n")
        self.run_bad("one of the arguments --text --pairs is required")
        self.run_bad("not allowed with", "--text", text, "--pairs", pairs)
        self.run_bad("--windows goes with --text", "--pairs", pairs, "--windows")
        self.run_bad("--sentences-of-pairs goes with --pairs", "--text", text, "--sentences-of-pairs")
        self.run_bad("unrecognized arguments: --frobnicate", "--text", text, "--frobnicate")

    def test_bad_outputs(self):
        text = self.file("a.txt", "the\n")
        for out, expected in ((self.folder / "no" / "x.h5", "there is no folder"), (self.folder, "not a regular file"),
                              (Path("/dev/null"), "not a regular file"), (text, "is an input"),
                              (self.tokenizer, "is an input"), (self.folder / ("x" * 300), "File name too long")):
            with self.subTest(out=out):
                self.run_bad(expected, "--text", text, "--out", out)
        self.assertEqual(text.read_text(), "the\n")

    def test_output_is_replaced_not_overwritten(self):
        self.run_good("--text", self.file("a.txt", "the cat\n"))
        before = self.out.read_bytes()
        with open(self.out, "rb") as reader:  # who reads the old file goes on reading the old file
            self.run_good("--text", self.file("a.txt", "the dog\n"))
            self.assertEqual(reader.read(), before)
        self.assertNotEqual(self.out.read_bytes(), before)

    def test_failure_leaves_the_old_output(self):
        self.run_good("--text", self.file("a.txt", "the cat\n"))
        before = self.out.read_bytes()
        self.assertEqual(self.main("--text", self.file("b.txt", b"\xff"))[0], 2)
        self.assertEqual(self.main("--text", self.file("b.txt", "the"), "--limit", 0)[0], 2)
        self.assertEqual(self.out.read_bytes(), before)
        self.assertEqual([p.name for p in self.out.parent.iterdir()], [self.out.name])


if __name__ == "__main__":
    unittest.main()
