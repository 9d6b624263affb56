#include <vernier/kernels/layout_device.h>
#include <vernier/kernels/parallel.h>

#include <algorithm>

namespace vernier::cpu {
namespace {

template <typename T>
void convert(const ConvertLayoutArguments& a) {
  const T* input = static_cast<const T*>(a.input);
  T* output = static_cast<T*>(a.output);
  constexpr int64_t kGrain = int64_t{1} << 16;
  parallel_for(a.to.size(), kGrain,
               [&](int64_t begin, int64_t end) { std::fill(output + begin, output + end, T{0}); });
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(a.from.columns, 1));
  parallel_for(a.from.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t column = 0; column < a.from.columns; ++column)
        output[a.to.address(row, column)] = input[a.from.address(row, column)];
  });
}

}  // namespace

void convert_layout(const ConvertLayoutArguments& arguments) {
  if (arguments.element_bytes == 1) {
    convert<int8_t>(arguments);
  } else {
    convert<int32_t>(arguments);
  }
}

}  // namespace vernier::cpu
