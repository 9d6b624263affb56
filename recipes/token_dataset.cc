#include <vernier/kernels/error.h>
#include <vernier/recipes/token_dataset.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

namespace vernier {
namespace {

// A row of ids may be long, but not so long that one block of rows is out of proportion to any
// model.
constexpr int64_t kLongestRow = int64_t{1} << 20;
constexpr int64_t kBlockRows = 256;

void check_ids(const hdf5::File& file, const std::string& name, std::vector<int64_t>& shape) {
  const hdf5::DatasetInfo info = file.info(name);
  const std::string where = file.path().string();
  const bool integers =
      info.type >= hdf5::ElementType::boolean && info.type <= hdf5::ElementType::uint64;
  VERNIER_CHECK(integers, where, ": dataset '", name, "' holds ",
                hdf5::element_type_name(info.type), " but token ids and masks are integers");
  VERNIER_CHECK(info.shape.size() == 2, where, ": dataset '", name, "' has ", info.shape.size(),
                " dimensions but needs 2, [samples, tokens]");
  VERNIER_CHECK(info.shape[1] <= kLongestRow, where, ": dataset '", name, "' has rows of ",
                info.shape[1], " tokens: at most ", kLongestRow, " are read");
  VERNIER_CHECK(shape.empty() || shape == info.shape, where, ": dataset '", name,
                "' has another shape than 'input_ids'");
  shape = info.shape;
}

}  // namespace

TokenDataset TokenDataset::open(const std::filesystem::path& path) {
  TokenDataset data(hdf5::File::open(path));
  const hdf5::File& file = data.file_;
  const std::string where = path.string();
  if (file.exists("input_ids")) {
    data.groups_ = {""};
  } else if (file.exists("a/input_ids") && file.exists("b/input_ids")) {
    data.groups_ = {"a/", "b/"};
  } else {
    std::string found;
    for (const std::string& name : file.children("/")) found += " '" + name + "'";
    throw Error(concat(where,
                       ": needs the dataset 'input_ids', or pairs in groups 'a' and 'b'; it holds",
                       found.empty() ? " nothing" : found));
  }
  int64_t rows = -1;
  for (const std::string& group : data.groups_) {
    std::vector<int64_t> shape;
    check_ids(file, group + "input_ids", shape);
    if (file.exists(group + "attention_mask")) check_ids(file, group + "attention_mask", shape);
    VERNIER_CHECK(rows < 0 || rows == shape[0], where, ": 'a' has ", rows, " rows but 'b' has ",
                  shape[0]);
    rows = shape[0];
    VERNIER_CHECK(shape[0] > 0 && shape[1] > 0, where, ": dataset '", group,
                  "input_ids' is empty: at least one sample is needed");
  }
  data.size_ = rows * static_cast<int64_t>(data.groups_.size());
  return data;
}

std::vector<std::vector<int64_t>> TokenDataset::read_rows(const std::string& group, int64_t first,
                                                          int64_t count) const {
  const std::vector<int64_t> ids = file_.read_rows<int64_t>(group + "input_ids", first, count);
  std::vector<int64_t> mask;
  if (file_.exists(group + "attention_mask"))
    mask = file_.read_rows<int64_t>(group + "attention_mask", first, count);
  const int64_t width = static_cast<int64_t>(ids.size()) / std::max<int64_t>(count, 1);
  std::vector<std::vector<int64_t>> rows;
  for (int64_t r = 0; r < count; ++r) {
    int64_t length = width;
    if (!mask.empty()) {
      const int64_t* m = mask.data() + r * width;
      length = std::find(m, m + width, 0) - m;
      const bool prefix = std::all_of(m, m + length, [](int64_t v) { return v == 1; }) &&
                          std::all_of(m + length, m + width, [](int64_t v) { return v == 0; });
      VERNIER_CHECK(prefix, file_.path().string(), ": row ", first + r, " of '", group,
                    "attention_mask' is not ones followed by zeros: pad on the right");
    }
    VERNIER_CHECK(length > 0, file_.path().string(), ": row ", first + r, " of '", group,
                  "input_ids' has no token that its mask does not hide");
    rows.emplace_back(ids.begin() + r * width, ids.begin() + r * width + length);
  }
  return rows;
}

std::vector<std::vector<int64_t>> TokenDataset::read(int64_t first, int64_t count,
                                                     int64_t vocabulary, int64_t max_length) const {
  VERNIER_CHECK(first >= 0 && first <= size_ && count >= 0 && count <= size_ - first,
                path().string(), " has ", size_, " samples: ", count, " from number ", first,
                " on are not all there");
  const auto groups = static_cast<int64_t>(groups_.size());
  const int64_t first_row = first / groups, last_row = (first + count + groups - 1) / groups;
  std::vector<std::vector<std::vector<int64_t>>> rows;
  for (const std::string& group : groups_)
    rows.push_back(read_rows(group, first_row, last_row - first_row));
  std::vector<std::vector<int64_t>> samples;
  for (int64_t i = first; i < first + count; ++i) {
    std::vector<int64_t>& ids = rows[i % groups][i / groups - first_row];
    const std::string name = groups_[i % groups] + "input_ids";
    for (const int64_t id : ids)
      VERNIER_CHECK(id >= 0 && id < vocabulary, path().string(), ": row ", i / groups, " of '",
                    name, "' holds token id ", id, " outside the model's vocabulary of ",
                    vocabulary, ": use the model's own tokenizer");
    VERNIER_CHECK(static_cast<int64_t>(ids.size()) <= max_length, path().string(), ": row ",
                  i / groups, " of '", name, "' has ", ids.size(),
                  " tokens, more than the model's ", max_length,
                  " positions: cut the data shorter");
    samples.push_back(std::move(ids));
  }
  return samples;
}

void TokenDataset::check(int64_t vocabulary, int64_t max_length) const {
  for (int64_t first = 0; first < size_; first += kBlockRows)
    read(first, std::min(kBlockRows, size_ - first), vocabulary, max_length);
  if (pairs()) scores();
}

std::vector<double> TokenDataset::scores() const {
  VERNIER_CHECK(pairs() && file_.exists("score"), path().string(),
                ": needs pairs in groups 'a' and 'b' and the dataset 'score'");
  const hdf5::DatasetInfo info = file_.info("score");
  const bool real =
      info.type == hdf5::ElementType::float32 || info.type == hdf5::ElementType::float64;
  VERNIER_CHECK(real && info.shape == std::vector<int64_t>{size_ / 2}, path().string(),
                ": dataset 'score' must be float [", size_ / 2, "], one a pair");
  std::vector<double> scores = file_.read<double>("score");
  for (const double score : scores)
    VERNIER_CHECK(std::isfinite(score), path().string(), ": dataset 'score' holds NaN or Inf");
  return scores;
}

std::string TokenDataset::fingerprint() const {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a over the ids, lengths between them
  const auto mix = [&](int64_t value) {
    hash = (hash ^ static_cast<uint64_t>(value)) * 0x100000001b3u;
    hash ^= hash >> 29;
  };
  const int64_t rows = size_ / static_cast<int64_t>(groups_.size());
  for (const std::string& group : groups_) {
    for (int64_t first = 0; first < rows; first += kBlockRows) {
      for (const auto& ids : read_rows(group, first, std::min(kBlockRows, rows - first))) {
        mix(static_cast<int64_t>(ids.size()));
        for (const int64_t id : ids) mix(id);
      }
    }
  }
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

TokenBatch make_batch(const std::vector<std::vector<int64_t>>& sequences, torch::Device device) {
  TokenBatch batch;
  std::vector<int64_t> tokens;
  for (const auto& sequence : sequences) {
    batch.lengths.push_back(static_cast<int64_t>(sequence.size()));
    tokens.insert(tokens.end(), sequence.begin(), sequence.end());
  }
  batch.tokens = torch::tensor(tokens, torch::kLong).to(device);
  return batch;
}

std::vector<std::vector<int64_t>> batches_by_length(
    const std::vector<std::vector<int64_t>>& sequences, int64_t batch_size) {
  std::map<size_t, std::vector<int64_t>> by_length;
  for (size_t i = 0; i < sequences.size(); ++i)
    by_length[sequences[i].size()].push_back(static_cast<int64_t>(i));
  std::vector<std::vector<int64_t>> batches;
  for (const auto& [length, indices] : by_length)
    for (size_t first = 0; first < indices.size(); first += batch_size)
      batches.emplace_back(indices.begin() + first,
                           indices.begin() + std::min(indices.size(), first + batch_size));
  return batches;
}

}  // namespace vernier
