// Token data in HDF5: `input_ids` [N, L], optional `attention_mask` of the same shape; or pairs,
// the same in groups `a` and `b`, with `score` [N]. Or windows in memory.
#pragma once

#include <vernier/calibration/hdf5.h>
#include <vernier/recipes/models/text_model.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace vernier {

/// Samples of tokens: those of a file, read in blocks, so that memory does not grow with their
/// number; windows in memory; or the ones after the others. A sample is one sequence; of a file of
/// pairs, samples 2i and 2i + 1 are the two of pair i.
class TokenDataset {
 public:
  /// Throws Error when the file is missing or damaged, holds neither `input_ids` nor pairs, a
  /// dataset has the wrong rank, shape or kind of number, or there is no sample.
  static TokenDataset open(const std::filesystem::path& path);

  /// Windows int64 [count, length] in memory; `name` is what errors call them. Throws Error when
  /// there are none.
  static TokenDataset of_windows(const torch::Tensor& windows, const std::string& name);

  /// Puts the samples of windows in memory behind one's own. Throws Error when one of the two is a
  /// share, this one holds pairs or the other is a file.
  void append(const TokenDataset& windows);

  /// Samples [first, first + count) as a data set of their own; none: all from `first` on. Throws
  /// Error when they are not all there, and when they cut a pair in two.
  TokenDataset share(int64_t first, std::optional<int64_t> count) const;

  int64_t size() const { return size_; }
  bool pairs() const { return groups_.size() == 2; }
  /// The file's path, or what the windows are called; of both "tokens.h5+self:32".
  const std::string& name() const { return name_; }

  /// Tokens that the longest sample may have: the width of the file's rows, or of the windows.
  int64_t longest_row() const { return longest_; }

  /// Token ids of samples [first, first + count), each without what its attention mask hides.
  /// Throws Error when an id is not in [0, vocabulary), a mask is not ones followed by zeros, or a
  /// sample is empty or longer than max_length.
  std::vector<std::vector<int64_t>> read(int64_t first, int64_t count, int64_t vocabulary,
                                         int64_t max_length) const;

  /// Reads everything once, so that what is wrong with it is found before long work and not in the
  /// middle. Throws Error as read() and, where there are pairs, as scores().
  void check(int64_t vocabulary, int64_t max_length) const;

  /// Scores of the pairs. Throws Error when the file holds no pairs or no finite scores.
  std::vector<double> scores() const;

  /// Hash of the ids of all samples, of a share those of the whole, the same wherever they lie.
  std::string fingerprint() const;

 private:
  TokenDataset() = default;
  // Samples of the file, before any share is taken.
  int64_t in_file() const { return rows_ * groups(); }
  bool whole() const { return size_ == in_file() + static_cast<int64_t>(memory_.size()); }
  int64_t groups() const { return static_cast<int64_t>(groups_.size()); }
  std::vector<std::vector<int64_t>> read_rows(const std::string& group, int64_t first,
                                              int64_t count) const;
  // Samples of the file.
  std::vector<std::vector<int64_t>> read_file(int64_t first, int64_t count) const;
  // A sample's place, for errors: "tokens.h5: row 3 of 'a/input_ids'".
  std::string place(int64_t sample) const;

  std::string name_;
  std::shared_ptr<const hdf5::File> file_;    // null: only windows in memory
  std::vector<std::string> groups_;           // prefixes of its datasets: {""} or {"a/", "b/"}
  int64_t rows_ = 0;                          // of each of its groups
  std::vector<std::vector<int64_t>> memory_;  // samples behind those of the file
  int64_t longest_ = 0;
  int64_t first_ = 0, size_ = 0;  // the share of all of them
};

/// Sequences as one batch on a device.
TokenBatch make_batch(const std::vector<std::vector<int64_t>>& sequences, torch::Device device);

/// Indices of sequences in groups of equal length, each of at most `batch_size`: batches without
/// padding.
std::vector<std::vector<int64_t>> batches_by_length(
    const std::vector<std::vector<int64_t>>& sequences, int64_t batch_size);

/// Calls f(batch, samples) for all samples of the data in batches of equal length on the model's
/// device; `samples` are their numbers. Throws Error as TokenDataset::read.
void for_each_batch(
    const TextModel& model, const TokenDataset& data, int64_t batch_size,
    const std::function<void(const TokenBatch&, const std::vector<int64_t>& samples)>& f);

}  // namespace vernier
