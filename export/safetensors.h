// Hugging Face safetensors: a checked, memory-mapped reader of files and sharded folders, a writer.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace vernier {

struct SafetensorsInfo {
  std::string dtype;  ///< As in the file: "F64", "F32", "F16", "BF16", "I8", "BOOL", ...
  std::vector<int64_t> shape;
};

/// One safetensors file, mapped into memory. Everything in its header is checked when it is opened,
/// so a damaged or hostile file is refused there and costs no memory. Cheap to copy; all copies and
/// all tensors share the mapping.
class SafetensorsFile {
 public:
  /// Throws Error when the file does not exist or is not valid: too short, header beyond the file
  /// or over 100 MB, bad JSON, duplicate names, unknown dtype, bad shape, or data that the tensors
  /// do not cover exactly and without overlap.
  static SafetensorsFile open(const std::filesystem::path& path);

  /// Names of the tensors, in the order of their data in the file.
  const std::vector<std::string>& names() const;

  bool contains(const std::string& name) const;

  /// Throws Error when there is no such tensor, as tensor() does.
  const SafetensorsInfo& info(const std::string& name) const;

  /// The tensor, contiguous on the CPU, without copying: a view that keeps the mapping alive.
  /// Writing into it changes private memory and never the file. Data that is not aligned to its
  /// element size is copied. Dtypes: F64 F32 F16 BF16 F8_E4M3 F8_E5M2 I64 I32 I16 I8 U64 U32 U16 U8
  /// BOOL.
  at::Tensor tensor(const std::string& name) const;

  /// The strings of `__metadata__`; empty when there is none.
  const std::map<std::string, std::string>& metadata() const;

  const std::filesystem::path& path() const;

 private:
  struct State;
  explicit SafetensorsFile(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

/// The weights of a Hugging Face folder as one map from name to tensor: `model.safetensors`, or all
/// shards of `model.safetensors.index.json`.
class SafetensorsFolder {
 public:
  /// Throws Error when the folder has neither file, a shard is missing or outside the folder (an
  /// absolute path or `..` in the index), a tensor of the index is not in its shard, a name is in
  /// two shards, or a file is not valid. Tensors that a shard holds beyond the index are included.
  static SafetensorsFolder open(const std::filesystem::path& folder);

  /// Names of all tensors, sorted by their bytes.
  const std::vector<std::string>& names() const { return names_; }

  bool contains(const std::string& name) const;

  /// As SafetensorsFile.
  const SafetensorsInfo& info(const std::string& name) const;
  at::Tensor tensor(const std::string& name) const;

  /// The files read, each once: one, or the shards sorted by name.
  const std::vector<SafetensorsFile>& files() const { return files_; }

 private:
  SafetensorsFolder() = default;
  const SafetensorsFile& file_of(const std::string& name) const;

  std::filesystem::path folder_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::size_t> file_of_;  // Index into files_.
  std::vector<std::string> names_;
};

/// A tensor that is made when it is written, so that a model need not be in memory twice.
struct TensorToWrite {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  std::function<at::Tensor()> make;  ///< of that dtype and shape, on any device, strided or not

  /// A tensor that is there.
  TensorToWrite(std::string tensor_name, const at::Tensor& tensor);
  TensorToWrite(std::string tensor_name, at::ScalarType tensor_dtype,
                std::vector<int64_t> tensor_shape, std::function<at::Tensor()> maker);
};

/// Writes a safetensors file that appears whole or not at all (AtomicFile). Tensors are made and
/// copied one at a time. The data is laid out by decreasing element size, in the given order within
/// one size, so that every tensor is aligned.
/// Throws Error for a duplicate or reserved (`__metadata__`) name, text that is not UTF-8, a dtype
/// the format lacks, an undefined or sparse tensor, one of another dtype or shape than was said, or
/// a failing disk.
void stream_safetensors(const std::filesystem::path& path,
                        const std::vector<TensorToWrite>& tensors,
                        const std::map<std::string, std::string>& metadata = {});
/// The same of tensors that are there, on any device, strided or not.
void write_safetensors(const std::filesystem::path& path,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

/// The largest file that Hugging Face's own tools write, by default.
inline constexpr int64_t kShardBytes = 5'000'000'000;

/// Writes tensors, sorted by name, into a folder as SafetensorsFolder reads them:
/// `model.safetensors`, or where that would hold more than `shard_bytes` of data, shards of at most
/// as many (a larger tensor has one of its own) and `model.safetensors.index.json`. Throws Error as
/// write_safetensors.
void write_safetensors_folder(const std::filesystem::path& folder,
                              std::vector<TensorToWrite> tensors,
                              int64_t shard_bytes = kShardBytes);

}  // namespace vernier
