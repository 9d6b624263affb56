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
// Samples are sorted by length within blocks of this many, so that batches need no padding and
// memory stays bounded.
constexpr int64_t kBatchedSamples = 8192;

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
  TokenDataset data;
  data.name_ = path.string();
  data.file_ = std::make_shared<hdf5::File>(hdf5::File::open(path));
  const hdf5::File& file = *data.file_;
  const std::string& where = data.name_;
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
    data.longest_ = std::max(data.longest_, shape[1]);
    VERNIER_CHECK(shape[0] > 0 && shape[1] > 0, where, ": dataset '", group,
                  "input_ids' is empty: at least one sample is needed");
  }
  data.rows_ = rows;
  data.size_ = data.in_file();
  return data;
}

TokenDataset TokenDataset::of_windows(const torch::Tensor& windows, const std::string& name) {
  VERNIER_CHECK(windows.dim() == 2 && windows.scalar_type() == torch::kLong && windows.numel() > 0,
                name, ": windows must be int64 [samples, tokens], at least one token, not ",
                c10::toString(windows.scalar_type()), " ", windows.sizes());
  TokenDataset data;
  data.name_ = name;
  data.longest_ = windows.size(1);
  const torch::Tensor ids = windows.cpu().contiguous();
  const int64_t* first = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.size(0); ++i)
    data.memory_.emplace_back(first + i * ids.size(1), first + (i + 1) * ids.size(1));
  data.size_ = ids.size(0);
  return data;
}

void TokenDataset::append(const TokenDataset& windows) {
  VERNIER_CHECK(!windows.file_ && windows.whole() && whole(), windows.name_,
                " cannot be put behind ", name_,
                ": whole windows in memory can, behind whole data");
  VERNIER_CHECK(!pairs(), name_, " holds pairs: ", windows.name_, " cannot be put behind them");
  size_ += windows.size_;
  memory_.insert(memory_.end(), windows.memory_.begin(), windows.memory_.end());
  longest_ = std::max(longest_, windows.longest_);
  name_ += "+" + windows.name_;
}

TokenDataset TokenDataset::share(int64_t first, std::optional<int64_t> count) const {
  const int64_t wanted = count.value_or(std::max<int64_t>(size_ - first, 1));
  VERNIER_CHECK(first >= 0 && first < size_ && wanted > 0 && wanted <= size_ - first, name_,
                " has ", size_, " samples: ", wanted, " from number ", first,
                " on are not all there");
  VERNIER_CHECK(first % groups() == 0 && wanted % groups() == 0, name_,
                " holds pairs, two samples each: ", wanted, " from number ", first,
                " on cut one in two: use even numbers");
  TokenDataset data = *this;
  data.first_ += first;
  data.size_ = wanted;
  return data;
}

std::vector<std::vector<int64_t>> TokenDataset::read_rows(const std::string& group, int64_t first,
                                                          int64_t count) const {
  const std::vector<int64_t> ids = file_->read_rows<int64_t>(group + "input_ids", first, count);
  std::vector<int64_t> mask;
  if (file_->exists(group + "attention_mask"))
    mask = file_->read_rows<int64_t>(group + "attention_mask", first, count);
  const int64_t width = static_cast<int64_t>(ids.size()) / std::max<int64_t>(count, 1);
  const std::string where = file_->path().string();
  std::vector<std::vector<int64_t>> rows;
  for (int64_t r = 0; r < count; ++r) {
    int64_t length = width;
    if (!mask.empty()) {
      const int64_t* m = mask.data() + r * width;
      length = std::find(m, m + width, 0) - m;
      const bool prefix = std::all_of(m, m + length, [](int64_t v) { return v == 1; }) &&
                          std::all_of(m + length, m + width, [](int64_t v) { return v == 0; });
      VERNIER_CHECK(prefix, where, ": row ", first + r, " of '", group,
                    "attention_mask' is not ones followed by zeros: pad on the right");
    }
    VERNIER_CHECK(length > 0, where, ": row ", first + r, " of '", group,
                  "input_ids' has no token that its mask does not hide");
    rows.emplace_back(ids.begin() + r * width, ids.begin() + r * width + length);
  }
  return rows;
}

std::vector<std::vector<int64_t>> TokenDataset::read_file(int64_t first, int64_t count) const {
  if (count == 0) return {};
  const int64_t first_row = first / groups(), last_row = (first + count + groups() - 1) / groups();
  std::vector<std::vector<std::vector<int64_t>>> rows;
  for (const std::string& group : groups_)
    rows.push_back(read_rows(group, first_row, last_row - first_row));
  std::vector<std::vector<int64_t>> samples;
  for (int64_t i = first; i < first + count; ++i)
    samples.push_back(std::move(rows[i % groups()][i / groups() - first_row]));
  return samples;
}

std::string TokenDataset::place(int64_t sample) const {
  if (sample >= in_file()) return concat(name_, ": window ", sample - in_file());
  return concat(file_->path().string(), ": row ", sample / groups(), " of '",
                groups_[sample % groups()], "input_ids'");
}

std::vector<std::vector<int64_t>> TokenDataset::read(int64_t first, int64_t count,
                                                     int64_t vocabulary, int64_t max_length) const {
  VERNIER_CHECK(first >= 0 && first <= size_ && count >= 0 && count <= size_ - first, name_,
                " has ", size_, " samples: ", count, " from number ", first,
                " on are not all there");
  first += first_;
  std::vector<std::vector<int64_t>> samples =
      read_file(first, std::clamp<int64_t>(in_file() - first, 0, count));
  const auto window = [&](int64_t i) {
    return memory_.begin() + std::max<int64_t>(i - in_file(), 0);
  };
  samples.insert(samples.end(), window(first), window(first + count));
  for (int64_t i = 0; i < count; ++i) {
    const std::vector<int64_t>& ids = samples[i];
    for (const int64_t id : ids)
      VERNIER_CHECK(id >= 0 && id < vocabulary, place(first + i), " holds token id ", id,
                    " outside the model's vocabulary of ", vocabulary,
                    ": use the model's own tokenizer");
    VERNIER_CHECK(static_cast<int64_t>(ids.size()) <= max_length, place(first + i), " has ",
                  ids.size(), " tokens, more than the model's ", max_length,
                  " positions: cut the data shorter");
  }
  return samples;
}

void TokenDataset::check(int64_t vocabulary, int64_t max_length) const {
  for (int64_t first = 0; first < size_; first += kBlockRows)
    read(first, std::min(kBlockRows, size_ - first), vocabulary, max_length);
  if (pairs()) scores();
}

std::vector<double> TokenDataset::scores() const {
  VERNIER_CHECK(pairs() && file_->exists("score"), name_,
                ": needs pairs in groups 'a' and 'b' and the dataset 'score'");
  const hdf5::DatasetInfo info = file_->info("score");
  const bool real =
      info.type == hdf5::ElementType::float32 || info.type == hdf5::ElementType::float64;
  VERNIER_CHECK(real && info.shape == std::vector<int64_t>{rows_}, name_,
                ": dataset 'score' must be float [", rows_, "], one a pair");
  std::vector<double> scores = file_->read_rows<double>("score", first_ / 2, size_ / 2);
  for (const double score : scores)
    VERNIER_CHECK(std::isfinite(score), name_, ": dataset 'score' holds NaN or Inf");
  return scores;
}

std::string TokenDataset::fingerprint() const {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a over the ids, lengths between them
  const auto mix = [&](int64_t value) {
    hash = (hash ^ static_cast<uint64_t>(value)) * 0x100000001b3u;
    hash ^= hash >> 29;
  };
  const auto mix_sample = [&](const std::vector<int64_t>& ids) {
    mix(static_cast<int64_t>(ids.size()));
    for (const int64_t id : ids) mix(id);
  };
  for (const std::string& group : groups_)
    for (int64_t first = 0; first < rows_; first += kBlockRows)
      for (const auto& ids : read_rows(group, first, std::min(kBlockRows, rows_ - first)))
        mix_sample(ids);
  for (const auto& ids : memory_) mix_sample(ids);
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

void for_each_batch(
    const TextModel& model, const TokenDataset& data, int64_t batch_size,
    const std::function<void(const TokenBatch&, const std::vector<int64_t>& samples)>& f) {
  VERNIER_CHECK(batch_size >= 1, "the batch size must be at least 1, not ", batch_size);
  const torch::Device device = model.parameters().front().device();
  for (int64_t first = 0; first < data.size(); first += kBatchedSamples) {
    const auto sequences = data.read(first, std::min(kBatchedSamples, data.size() - first),
                                     model.vocabulary(), model.max_length());
    for (auto& samples : batches_by_length(sequences, batch_size)) {
      std::vector<std::vector<int64_t>> members;
      for (int64_t& sample : samples) {
        members.push_back(sequences[sample]);
        sample += first;
      }
      f(make_batch(members, device), samples);
    }
  }
}

}  // namespace vernier
