#!/usr/bin/env python3
"""Makes tests/fixtures/families/: tiny random models of every causal family, and the logits that transformers computes with them.

Deterministic, so that running it again changes nothing. transformers is needed here only and is not installed by tools/setup.sh:

  .deps/venv/bin/python -m pip install --target /tmp/tf 'transformers==5.23.0'
  PYTHONPATH=/tmp/tf .deps/venv/bin/python tools/make_family_fixtures.py

Each folder holds config.json and safetensors as save_pretrained writes them (but where a case says otherwise), and expected.safetensors:
input_ids int64 [total], of sequences laid end to end, lengths int64 [sequences], logits float32 [total, vocabulary], computed in float32.
"""

import argparse
import json
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file

SEED = 20250311
LENGTHS = [9, 1, 24, 5, 9]
VOCABULARY = 48
FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "families"
SHARED = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
DECODER = dict(SHARED, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, max_position_embeddings=32)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


def old_rotary_fields(config, folder):
    """As transformers 4 wrote them."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    config["torch_dtype"] = config.pop("dtype")


def bare_names(config, folder):
    """As the first GPT-2 checkpoints were written: of the model without its head, with masks."""
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    positions = config["n_positions"]
    for layer in range(config["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, positions, positions, dtype=torch.uint8).tril()
    save_file(tensors, path, metadata={"format": "pt"})


# Folder, class of the configuration, its fields, dtype of the file, size of shards, changes to the folder.
CASES = [
    # Grouped heads of a size that is not hidden / heads, biases everywhere, scaled rotary embeddings, an output layer of its own.
    ("llama3", transformers.LlamaConfig, dict(DECODER, num_key_value_heads=2, head_dim=12, attention_bias=True, mlp_bias=True,
                                              rope_parameters=LLAMA3), torch.float32, None, None),
    ("llama-sharded", transformers.LlamaConfig, dict(DECODER, num_key_value_heads=1, tie_word_embeddings=True,
                                                     rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0)),
     torch.bfloat16, "16KB", old_rotary_fields),
    ("mistral", transformers.MistralConfig, dict(DECODER, num_key_value_heads=2, sliding_window=None), torch.bfloat16, None, None),
    ("qwen2", transformers.Qwen2Config, dict(DECODER, num_key_value_heads=2, tie_word_embeddings=True), torch.bfloat16, None, None),
    ("qwen3", transformers.Qwen3Config, dict(DECODER, num_key_value_heads=2, head_dim=12), torch.float16, None, None),
    ("opt", transformers.OPTConfig, dict(SHARED, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=40,
                                         max_position_embeddings=32, word_embed_proj_dim=32), torch.bfloat16, None, None),
    # As the 350m of the family: norms after the residuals, embeddings of another size.
    ("opt-post-norm", transformers.OPTConfig, dict(SHARED, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=40,
                                                   max_position_embeddings=32, word_embed_proj_dim=16, do_layer_norm_before=False),
     torch.bfloat16, None, None),
    ("gpt-neox", transformers.GPTNeoXConfig, dict(DECODER, rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                                                               partial_rotary_factor=0.5)),
     torch.bfloat16, None, None),
    ("gpt-neox-serial", transformers.GPTNeoXConfig, dict(DECODER, use_parallel_residual=False, tie_word_embeddings=True,
                                                         hidden_act="gelu_fast", rotary_pct=0.25), torch.bfloat16, None, None),
    ("gpt2", transformers.GPT2Config, dict(SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=32, n_inner=40), torch.bfloat16, None,
     bare_names),
]


def make_case(folder, config, dtype, shard_size, change):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # Far from the initial values, where biases are 0, norms 1 and attention is all but uniform: every parameter counts.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3)
            if "norm" in name.lower() or ".ln_" in name:
                parameter.add_(float(name.endswith("weight")))
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if change:
        fields = json.loads((folder / "config.json").read_text())
        change(fields, folder)
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")

    # Of the folder as it is read, not of the model as it was made.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences = [torch.randint(0, VOCABULARY, (length,)) for length in LENGTHS]
    with torch.no_grad():
        logits = torch.cat([model(input_ids=ids[None]).logits[0] for ids in sequences])
    save_file({"input_ids": torch.cat(sequences), "lengths": torch.tensor(LENGTHS), "logits": logits.contiguous()},
              folder / "expected.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, help="folder to write (default: %(default)s)")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    for name, kind, fields, dtype, shard_size, change in CASES:
        torch.manual_seed(SEED)
        make_case(out / name, kind(**fields), dtype, shard_size, change)


if __name__ == "__main__":
    main()
