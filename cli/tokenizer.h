// Texts to token ids and back, by tools/tokenizer.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vernier::cli {

/// Token ids of texts, with the special tokens that the tokenizer adds. `folder` holds its
/// tokenizer.json, or is such a file. Throws Error with the script's own line where it fails.
std::vector<std::vector<int64_t>> encode_texts(const std::string& folder,
                                               const std::vector<std::string>& texts);

/// Texts of token ids, without special tokens.
std::vector<std::string> decode_ids(const std::string& folder,
                                    const std::vector<std::vector<int64_t>>& ids);

}  // namespace vernier::cli
