// Where a run's tokens come from: a file, the model itself, or both.
#pragma once

#include <vernier/recipes/models/text_model.h>
#include <vernier/recipes/token_dataset.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace vernier {

struct TokenSourceOptions {
  /// Tokens of a sampled window; none: as long as the file's rows, or 512, and at most max_length.
  std::optional<int64_t> length;
  uint64_t seed = 0;
};

/// Whether a specification asks for windows of the model itself.
bool samples_the_model(const std::string& spec);

/// The tokens that `spec` names:
///
///     file.h5            a file (TokenDataset::open)
///     self  self:64      32, or so many, windows sampled from the model (sample_windows)
///     file.h5+self:64    the file's samples, then the model's
///
/// A file of the name self is ./self. `model`, on the device where it is to run, is needed for
/// windows of its own: a causal language model in full precision. `progress` is called with the
/// tokens sampled so far and their total. Throws Error as TokenDataset::open and sample_windows,
/// when the model is none that can be sampled, and for a number of windows that is none.
TokenDataset open_tokens(
    const std::string& spec, TextModel* model, const TokenSourceOptions& options = {},
    const std::function<void(int64_t done, int64_t total)>& progress = nullptr);

}  // namespace vernier
