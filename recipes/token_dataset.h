// Token data in HDF5: `input_ids` [N, L], optional `attention_mask` of the same shape; or pairs,
// the same in groups `a` and `b`, with `score` [N].
#pragma once

#include <vernier/calibration/hdf5.h>
#include <vernier/recipes/models/text_model.h>

#include <filesystem>
#include <string>
#include <vector>

namespace vernier {

/// A data file, read in blocks: memory does not grow with the number of samples. A sample is one
/// sequence; of a file of pairs, samples 2i and 2i + 1 are the two of pair i.
class TokenDataset {
 public:
  /// Throws Error when the file is missing or damaged, holds neither `input_ids` nor pairs, a
  /// dataset has the wrong rank, shape or kind of number, or there is no sample.
  static TokenDataset open(const std::filesystem::path& path);

  int64_t size() const { return size_; }
  bool pairs() const { return groups_.size() == 2; }
  const std::filesystem::path& path() const { return file_.path(); }

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

  /// Hash of the ids and masks of all samples.
  std::string fingerprint() const;

 private:
  explicit TokenDataset(hdf5::File file) : file_(std::move(file)) {}
  std::vector<std::vector<int64_t>> read_rows(const std::string& group, int64_t first,
                                              int64_t count) const;

  hdf5::File file_;
  std::vector<std::string> groups_;  // prefixes of the datasets: {""} or {"a/", "b/"}
  int64_t size_ = 0;
};

/// Sequences as one batch on a device.
TokenBatch make_batch(const std::vector<std::vector<int64_t>>& sequences, torch::Device device);

/// Indices of sequences in groups of equal length, each of at most `batch_size`: batches without
/// padding.
std::vector<std::vector<int64_t>> batches_by_length(
    const std::vector<std::vector<int64_t>>& sequences, int64_t batch_size);

}  // namespace vernier
