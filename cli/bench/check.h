// Whether outputs are right, before anything is timed. Each function returns an empty string, or
// one line that says what is wrong.
#pragma once

#include <torch/types.h>

#include <string>

namespace vernier::bench {

/// Every element is the same.
std::string check_equal(const torch::Tensor& output, const torch::Tensor& expected);

/// |output - expected| <= relative * |expected| + absolute for every element; NaN never is.
std::string check_close(const torch::Tensor& output, const torch::Tensor& expected, double relative,
                        double absolute);

/// The exact product codes [M, K] times weight [N, K] transposed, in float64, which holds every sum
/// of int8 products exactly and decoded FP8 or bfloat16 ones to 53 bits.
torch::Tensor exact_product(const torch::Tensor& codes, const torch::Tensor& weight);

}  // namespace vernier::bench
