// What `vernier bench` measures: works, each at several shapes, each by several implementations.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace vernier::bench {

/// Sizes of a work: activations [m, k] times weights [n, k]; n is 0 for a work on one [m, k]
/// tensor, as tokens are.
struct Shape {
  int64_t m = 0, k = 0, n = 0;

  /// "MxKxN", or "MxK" without n.
  std::string str() const;
  bool operator==(const Shape&) const = default;
};

/// "MxKxN" or "MxK", each from 1 to 2^24. Throws Error otherwise.
Shape parse_shape(const std::string& text);

using Tensors = std::vector<torch::Tensor>;

/// One call on the input set of this index; returns its outputs.
using Run = std::function<Tensors(int64_t set)>;

/// A step of an implementation, on inputs made beforehand.
struct Step {
  std::string name;
  Run run;
};

/// One way to do a work.
struct Implementation {
  std::string name;  ///< "vernier", or the name of a peer
  Run run;
  /// Given the outputs of set 0: empty where they are right, else what is wrong.
  std::function<std::string(const Tensors&)> check;
  std::vector<Step> steps;  ///< for the time breakdown; may be empty
};

/// The implementation that is ours, under this name in every work.
inline constexpr const char* kVernier = "vernier";

/// One work at one shape, with its data.
struct Case {
  int64_t sets = 1;       ///< input sets that the calls rotate over
  double operations = 0;  ///< multiplications and additions of a call; 0: bound by memory
  double bytes = 0;       ///< that a call has to move at least
  double tokens = 0;      ///< that a call reads; 0: no text
  /// Calls are whole steps of a model: timed as a loop launches them, and their memory is measured.
  bool launched = false;
  /// The first one is the baseline of the speed-up.
  std::vector<Implementation> implementations;
  /// Peers that could not be set up, and why.
  std::vector<std::string> left_out;

  /// Adds what `make` returns; a peer that cannot be set up is noted in left_out.
  void add(const std::string& name, const std::function<Implementation()>& make);
};

/// Where it runs.
struct Place {
  torch::Device device = torch::kCPU;
  int64_t cache_bytes = 0;  ///< of the L2; inputs rotate over more than twice as much

  bool cuda() const { return device.is_cuda(); }
  /// Input sets of this size to rotate over.
  int64_t sets(int64_t bytes_of_a_set) const;
};

/// A work: a line of the list of everything that can be measured.
struct Work {
  std::string name;      ///< as in the JSON
  std::string variant;   ///< follows the shape in the JSON; empty for the main one
  std::string baseline;  ///< for people
  std::vector<Shape> shapes, quick_shapes, cpu_shapes;
  bool needs_cuda = false;
  std::function<Case(const Place&, Shape)> prepare;

  bool is_gemm() const { return shapes.front().n > 0; }
  /// The shapes measured unless others are asked for.
  const std::vector<Shape>& default_shapes(const Place& place, bool quick) const;
};

/// All of them: matrix products, works bound by memory, training steps, inference.
const std::vector<Work>& works();
std::vector<Work> gemm_works();
std::vector<Work> memory_works();
std::vector<Work> training_works();
std::vector<Work> inference_works();

}  // namespace vernier::bench
