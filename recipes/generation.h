// Text that a causal language model makes: continued prompts, and windows sampled from nothing.
#pragma once

#include <vernier/recipes/models/causal_lm.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace vernier {

/// How the next token is chosen from the logits.
struct Sampling {
  double temperature = 0;  ///< 0: the likeliest token; else logits are divided by it
  int64_t top_k = 0;       ///< only the k likeliest tokens; 0: all
  double top_p = 1;        ///< only the likeliest tokens that together reach this probability

  /// Throws Error when a value is out of range.
  void check() const;
};

struct WindowOptions {
  int64_t count = 32;
  int64_t length = 512;
  uint64_t seed = 0;
  double temperature = 1;
  /// Windows at a time; 0: as many as keep caches and logits within some GB.
  int64_t batch_size = 0;
};

/// Windows that the model writes by itself, int64 [count, length] on the CPU: the start token, then
/// tokens sampled from its distribution over the whole vocabulary. Data for calibration and
/// training where none is given (Liu et al. 2023, arXiv 2305.17888; Williams et al. 2025, arXiv
/// 2410.17170).
///
/// Every window has random numbers of its own, made from the seed and its index. On one device
/// equal options give equal windows; another batch size, number of windows or device changes the
/// roundings of the logits, and with them now and then a token, but nothing else. Nothing waits for
/// the device until a batch of windows is whole. `progress` is called with the number of tokens so
/// far. Throws Error when the length is below 2 or above max_length(), and when the logits are not
/// finite.
torch::Tensor sample_windows(CausalLanguageModel& model, const WindowOptions& options = {},
                             const std::function<void(int64_t tokens)>& progress = nullptr);

struct GenerationOptions {
  int64_t max_tokens = 128;  ///< new ones, for each prompt
  Sampling sampling;
  uint64_t seed = 0;
  std::vector<int64_t> stop;  ///< tokens after which a text ends, and with which
  int64_t batch_size = 16;    ///< prompts of equal length that are continued together
  CacheFormat cache = CacheFormat::full;
};

struct Generation {
  std::vector<std::vector<int64_t>> tokens;  ///< of each prompt the new ones, the stop token too
  int64_t prompt_tokens = 0;                 ///< read
  int64_t new_tokens = 0;                    ///< made
  int64_t decoded_tokens = 0;                ///< computed one by one: all but each text's first
  double prefill_seconds = 0;                ///< reading the prompts, to the first new token
  double decode_seconds = 0;
};

/// Continues prompts with a key and value cache, in the model's present mode. Throws Error when a
/// prompt is empty, holds a token outside the vocabulary, or is with max_tokens longer than
/// max_length(), and when the logits are not finite.
Generation generate(CausalLanguageModel& model, const std::vector<std::vector<int64_t>>& prompts,
                    const GenerationOptions& options,
                    const std::function<void(int64_t tokens)>& progress = nullptr);

/// eos_token_id of the model's configuration, which is one token or a list; empty where there is
/// none.
std::vector<int64_t> stop_tokens(const TextModel& model);

}  // namespace vernier
