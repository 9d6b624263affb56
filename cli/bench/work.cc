#include <vernier/cli/bench/work.h>
#include <vernier/kernels/error.h>

#include <algorithm>
#include <charconv>

namespace vernier::bench {

std::string Shape::str() const { return n > 0 ? concat(m, "x", k, "x", n) : concat(m, "x", k); }

Shape parse_shape(const std::string& text) {
  constexpr int64_t kLargest = int64_t{1} << 24;
  const auto refuse = [&] {
    throw Error(concat("--shape '", text,
                       "': give MxKxN (or MxK for works on one tensor), each 1 to ", kLargest));
  };
  std::vector<int64_t> sizes;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (true) {
    int64_t size = 0;
    const auto [next, status] = std::from_chars(at, end, size);
    if (status != std::errc() || size < 1 || size > kLargest) refuse();
    sizes.push_back(size);
    if (next == end) break;
    if (*next != 'x') refuse();
    at = next + 1;
  }
  if (sizes.size() < 2 || sizes.size() > 3) refuse();
  return {sizes[0], sizes[1], sizes.size() == 3 ? sizes[2] : 0};
}

void Case::add(const std::string& name, const std::function<Implementation()>& make) {
  try {
    implementations.push_back(make());
    implementations.back().name = name;
  } catch (const std::exception& error) {
    const std::string what = error.what();
    left_out.push_back(concat(name, ": ", what.substr(0, what.find('\n'))));
  }
}

int64_t Place::sets(int64_t bytes_of_a_set) const {
  // Two sets at least, so that no call reads what the call before it left in the cache.
  const int64_t needed = 2 * cache_bytes / std::max<int64_t>(bytes_of_a_set, 1) + 1;
  return std::clamp<int64_t>(needed, 2, 64);
}

const std::vector<Shape>& Work::default_shapes(const Place& place, bool quick) const {
  return !place.cuda() ? cpu_shapes : quick ? quick_shapes : shapes;
}

const std::vector<Work>& works() {
  static const std::vector<Work> all = [] {
    std::vector<Work> list = gemm_works();
    for (const auto& more : {memory_works(), training_works(), inference_works()})
      list.insert(list.end(), more.begin(), more.end());
    return list;
  }();
  return all;
}

}  // namespace vernier::bench
