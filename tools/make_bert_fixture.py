#!/usr/bin/env python3
"""Makes tests/fixtures/bert-tiny/: a random, tiny BertModel of transformers and the hidden states that transformers computes with it.

Deterministic, so that running it again changes nothing. transformers is needed here only and is not installed by tools/setup.sh:

  .deps/venv/bin/python -m pip install --target /tmp/tf 'transformers==4.57.6'
  PYTHONPATH=/tmp/tf .deps/venv/bin/python tools/make_bert_fixture.py

Writes config.json and model.safetensors as save_pretrained does, and expected.safetensors: input_ids and attention_mask
int64 [samples, 32], last_hidden_state float32 [samples, 32, 32]; what the mask hides is zero.
"""

import argparse
import pathlib

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

SEED = 20240607
LENGTHS = [12, 1, 32, 7, 12, 20]
FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "bert-tiny"


def make_model():
    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        max_position_embeddings=32, hidden_act="gelu")
    model = BertModel(config).eval()
    # Far from the initial values, where biases are 0, norms 1 and attention is all but uniform: every parameter counts.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3)
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1.0)
    return model


def make_batch(config):
    mask = torch.zeros(len(LENGTHS), config.max_position_embeddings, dtype=torch.int64)
    for row, length in zip(mask, LENGTHS):
        row[:length] = 1
    return torch.randint(0, config.vocab_size, mask.shape) * mask, mask


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, help="folder to write (default: %(default)s)")
    out = parser.parse_args().out
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model = make_model()
    model.save_pretrained(out, safe_serialization=True)
    ids, mask = make_batch(model.config)
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
    save_file({"input_ids": ids, "attention_mask": mask, "last_hidden_state": hidden.contiguous()}, out / "expected.safetensors")


if __name__ == "__main__":
    main()
