// Matrix products: ours and every peer on the same operands.
#include <torch/torch.h>
#include <vernier/cli/bench/check.h>
#include <vernier/cli/bench/work.h>
#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/int8_gemm_device.h>
#include <vernier/kernels/quantize.h>

#include <cmath>
#include <limits>
#include <memory>

#ifdef VERNIER_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#include <vernier/cli/bench/cublaslt_peer.h>
#endif
#ifdef VERNIER_WITH_CUTLASS_PEER
#include <vernier/cli/bench/cutlass_peer.h>
#endif

namespace vernier::bench {
namespace {

using torch::Tensor;

constexpr double kBfloat16Rounding = 0x1p-8;
constexpr double kFloat32Rounding = 0x1p-24;

// ---- Data ---------------------------------------------------------------------------------------

// Activations and weights with their codes; an element of each a set.
struct Operands {
  Tensors x, w;              // bfloat16 [M, K], [N, K]
  Tensors codes, weight;     // int8
  Tensors x_scale, w_scale;  // float32 [M] or [1], [N]
  Tensor bias;               // float32 [N]

  int64_t sets() const { return static_cast<int64_t>(x.size()); }
};
using SharedOperands = std::shared_ptr<const Operands>;

enum class Activations { per_token, per_tensor };

SharedOperands make_operands(const Place& place, Shape shape, Activations granularity) {
  VERNIER_CHECK(shape.k <= kMaxInt8GemmK, "--shape ", shape.str(), ": K = ", shape.k,
                " could overflow the int32 accumulators: use K <= ", kMaxInt8GemmK);
  const auto options = torch::TensorOptions(torch::kBFloat16).device(place.device);
  const Scheme rows = symmetric_scheme(8, Granularity::per_token);
  auto operands = std::make_shared<Operands>();
  for (int64_t set = place.sets((shape.m + shape.n) * shape.k); set > 0; --set) {
    const Tensor x = torch::randn({shape.m, shape.k}, options);
    const Tensor w = torch::randn({shape.n, shape.k}, options);
    operands->x.push_back(x);
    operands->w.push_back(w);
    if (granularity == Activations::per_token) {
      auto [codes, scale] = quantize_per_token(x, rows);
      operands->codes.push_back(codes);
      operands->x_scale.push_back(scale);
    } else {
      const Tensor scale = (x.abs().amax().to(torch::kFloat) / 127).reshape({1});
      operands->codes.push_back(quantize(x, scale, std::nullopt, symmetric_scheme(8)));
      operands->x_scale.push_back(scale);
    }
    auto [codes, scale] = quantize_per_token(w, rows);  // a row of the weight is a channel
    operands->weight.push_back(codes);
    operands->w_scale.push_back(scale);
  }
  operands->bias = torch::randn({shape.n}, options.dtype(torch::kFloat));
  return operands;
}

// acc * w_scale * x_scale + bias in float64, for set 0.
Tensor exact_linear(const Operands& o) {
  return exact_product(o.codes[0], o.weight[0])
      .mul_(o.w_scale[0].to(torch::kDouble))
      .mul_(o.x_scale[0].to(torch::kDouble).unsqueeze(1))
      .add_(o.bias.to(torch::kDouble));
}

// ---- Checks -------------------------------------------------------------------------------------

using Check = std::function<std::string(const Tensors&)>;

// Exact sums, a float32 epilogue, a rounding to bfloat16.
Check check_integer_linear(const Operands& o, const Tensor& expected) {
  const double roundings = 2 * kEpilogueRoundings * kFloat32Rounding;
  const double absolute = roundings * o.bias.abs().amax().item<double>();
  return [=](const Tensors& y) {
    return check_close(y[0], expected, 1.02 * kBfloat16Rounding + roundings, absolute);
  };
}

// Floating-point sums of K products of numbers around 1, whose own size is around sqrt(K): what is
// lost by rounding partial sums (to bfloat16 where K is split, to the 13 bits that tensor cores
// keep of FP8) is small beside that.
Check check_float_product(const Tensor& expected, int64_t k) {
  const double absolute = 0x1p-5 * std::sqrt(static_cast<double>(k));
  return [=](const Tensors& y) {
    return check_close(y[0], expected, 2 * kBfloat16Rounding, absolute);
  };
}

// A code is the rounding of the exact value, which float32 arithmetic may move by little.
Check check_codes(const Tensor& exact) {
  return [=](const Tensors& y) { return check_close(y[0], exact, 0, 0.501); };
}

// ---- Implementations ----------------------------------------------------------------------------

Implementation bf16_product(const SharedOperands& o, const Place& place) {
  Implementation product;
  product.name = place.cuda() ? "bf16 cuBLAS" : "bf16 torch.mm";
  product.run = [o](int64_t i) {
    const auto set = static_cast<size_t>(i);
    return Tensors{torch::mm(o->x[set], o->w[set].t())};
  };
  // The reference is made when it is needed: one of the largest output takes gigabytes.
  product.check = [o](const Tensors& y) {
    return check_float_product(exact_product(o->x[0], o->w[0]), o->x[0].size(1))(y);
  };
  return product;
}

#ifdef VERNIER_WITH_CUDA
// What a separate kernel makes of accumulators.
Tensor dequantize_accumulators(const Tensor& accumulators, const Tensor& x_scale,
                               const Tensor& w_scale, const Tensor& bias) {
  Tensor output = torch::empty_like(accumulators, torch::kBFloat16);
  EpilogueArguments arguments;
  arguments.output_type = GemmOutput::bf16;
  arguments.rows = accumulators.size(0);
  arguments.columns = accumulators.size(1);
  arguments.input_scale = x_scale.const_data_ptr<float>();
  arguments.input_scale_per_row = x_scale.numel() > 1;
  arguments.weight_scale = w_scale.const_data_ptr<float>();
  arguments.weight_scale_per_column = w_scale.numel() > 1;
  arguments.bias = bias.const_data_ptr<float>();
  arguments.output = output.data_ptr();
  on_device_of(
      accumulators, [&] { cpu::int8_epilogue(accumulators.const_data_ptr<int32_t>(), arguments); },
      [&](void* stream) {
        cuda::int8_epilogue(accumulators.const_data_ptr<int32_t>(), arguments, stream);
      });
  return output;
}
#endif

// Real values of accumulators by torch's operators, one after the other.
Tensor dequantize_eagerly(const Tensor& accumulators, const Tensor& x_scale, const Tensor& w_scale,
                          const Tensor& bias) {
  return (accumulators.to(torch::kFloat) * w_scale * x_scale.unsqueeze(1) + bias)
      .to(torch::kBFloat16);
}

std::pair<Tensor, Tensor> quantize_rows_eagerly(const Tensor& x) {
  const Tensor real = x.to(torch::kFloat);
  const Tensor scale = real.abs().amax(-1) / 127;
  const Tensor codes = torch::clamp(torch::round(real / scale.unsqueeze(1)), -127, 127);
  return {codes.to(torch::kChar), scale};
}

// Calls f(operands, set) as a Run.
template <typename F>
Run on_sets(const SharedOperands& operands, const F& f) {
  return [operands, f](int64_t set) { return Tensors{f(*operands, static_cast<size_t>(set))}; };
}

// ---- Works --------------------------------------------------------------------------------------

Case gemm_case(const SharedOperands& o, Shape shape) {
  Case c;
  c.sets = o->sets();
  c.operations = 2.0 * static_cast<double>(shape.m) * static_cast<double>(shape.k) *
                 static_cast<double>(shape.n);
  return c;
}

Tensor vernier_linear(const Operands& o, size_t i) {
  return int8_linear(o.codes[i], o.weight[i], o.x_scale[i], o.w_scale[i], o.bias, std::nullopt,
                     std::nullopt, torch::kBFloat16);
}

#ifdef VERNIER_WITH_CUDA
std::shared_ptr<CublasLtProduct> tuned(const Place& place, LtProduct product, const Tensors& a,
                                       const Tensors& b, float scale = 1) {
  return std::make_shared<CublasLtProduct>(place, product, a, b, scale);
}
#endif

#ifdef VERNIER_WITH_CUTLASS_PEER
Tensor cutlass_linear(const Operands& o, size_t i, int kernel) {
  const Tensor &a = o.codes[i], &b = o.weight[i];
  Tensor y = torch::empty({a.size(0), b.size(0)}, a.options().dtype(torch::kBFloat16));
  run_cutlass(
      kernel,
      {a.const_data_ptr<int8_t>(), b.const_data_ptr<int8_t>(), o.x_scale[i].const_data_ptr<float>(),
       o.w_scale[i].const_data_ptr<float>(), o.bias.const_data_ptr<float>(), y.data_ptr(),
       static_cast<int>(a.size(0)), static_cast<int>(b.size(0)), static_cast<int>(a.size(1))},
      c10::cuda::getCurrentCUDAStream().stream());
  return y;
}

// CUTLASS's kernel that is fastest for the shape.
Run fastest_cutlass(const Place& place, const SharedOperands& o) {
  Run fastest;
  double least = std::numeric_limits<double>::infinity();
  for (int kernel = 0; kernel < static_cast<int>(cutlass_kernels().size()); ++kernel) {
    const Run run =
        on_sets(o, [kernel](const Operands& p, size_t i) { return cutlass_linear(p, i, kernel); });
    const auto timed = make_timed(place, run, o->sets(), 1000);
    double us = timed->replay();
    for (int i = 0; i < 4; ++i) us = std::min(us, timed->replay());
    if (us >= least) continue;
    least = us;
    fastest = run;
  }
  return fastest;
}
#endif

// int8 x int8 -> bfloat16, a scale a token and a channel, bias.
Case prepare_w8a8(const Place& place, Shape shape) {
  const SharedOperands o = make_operands(place, shape, Activations::per_token);
  Case c = gemm_case(o, shape);
  const Check right = check_integer_linear(*o, exact_linear(*o));
  c.implementations.push_back(bf16_product(o, place));
  c.implementations.push_back({kVernier, on_sets(o, vernier_linear), right, {}});
#ifdef VERNIER_WITH_CUDA
  if (place.cuda()) {
    c.add("bf16 cuBLASLt", [&] {
      const auto product = tuned(place, LtProduct::bf16, o->x, o->w);
      Implementation implementation = bf16_product(o, place);
      implementation.run = [product](int64_t set) { return Tensors{product->run(set)}; };
      return implementation;
    });
#ifdef VERNIER_WITH_CUTLASS_PEER
    c.add("CUTLASS", [&] { return Implementation{"", fastest_cutlass(place, o), right, {}}; });
#endif
    std::shared_ptr<CublasLtProduct> product;
    c.add("cuBLASLt i8i8i32, no scales", [&] {
      product = tuned(place, LtProduct::i8i8i32, o->codes, o->weight);
      return Implementation{"",
                            [product](int64_t set) { return Tensors{product->run(set)}; },
                            [o](const Tensors& y) {
                              return check_equal(y[0].to(torch::kDouble),
                                                 exact_product(o->codes[0], o->weight[0]));
                            },
                            {}};
    });
    if (product) {
      c.add("cuBLASLt i8i8i32 + dequantize", [&] {
        return Implementation{"",
                              [o, product](int64_t set) {
                                const auto i = static_cast<size_t>(set);
                                return Tensors{dequantize_accumulators(
                                    product->run(set), o->x_scale[i], o->w_scale[i], o->bias)};
                              },
                              right,
                              {}};
      });
    }
  }
#endif
  c.implementations.push_back({"torch._int_mm, eager",
                               on_sets(o,
                                       [](const Operands& p, size_t i) {
                                         return dequantize_eagerly(
                                             torch::_int_mm(p.codes[i], p.weight[i].t()),
                                             p.x_scale[i], p.w_scale[i], p.bias);
                                       }),
                               right,
                               {}});
  return c;
}

// int8 x int8 -> int8: one scale for the activations, one a channel of the weight, one for the
// output, and bias.
Case prepare_int8_out(const Place& place, Shape shape) {
  const SharedOperands o = make_operands(place, shape, Activations::per_tensor);
  Case c = gemm_case(o, shape);
  // Outputs have a standard deviation of sqrt(K): few of them are clipped.
  const double step = 4.5 * std::sqrt(static_cast<double>(shape.k)) / 127;
  const Tensor y_scale = torch::full({1}, step, o->bias.options());
  const Tensor scale = y_scale.to(torch::kDouble);
  c.implementations.push_back(bf16_product(o, place));
  c.implementations.push_back(
      {kVernier,
       on_sets(o,
               [y_scale](const Operands& p, size_t i) {
                 return int8_linear_requantize(
                     {p.codes[i], p.weight[i], p.x_scale[i], p.w_scale[i], p.bias}, y_scale,
                     std::nullopt, symmetric_scheme(8));
               }),
       check_codes(exact_linear(*o).div_(scale).clamp_(-127, 127)),
       {}});
#ifdef VERNIER_WITH_CUDA
  if (place.cuda()) {
    c.add("cuBLASLt i8i8i8, one scale", [&] {
      const float alpha = (o->x_scale[0] * o->w_scale[0].mean() / y_scale).item<float>();
      const auto product = tuned(place, LtProduct::i8i8i8, o->codes, o->weight, alpha);
      return Implementation{"",
                            [product](int64_t set) { return Tensors{product->run(set)}; },
                            [o, alpha](const Tensors& y) {
                              return check_codes(exact_product(o->codes[0], o->weight[0])
                                                     .mul_(static_cast<double>(alpha))
                                                     .clamp_(-128, 127))(y);
                            },
                            {}};
    });
  }
#endif
  return c;
}

// The layer as it runs: bfloat16 activations quantized per token, multiplied, bfloat16 out.
Case prepare_quantize_gemm(const Place& place, Shape shape) {
  const SharedOperands o = make_operands(place, shape, Activations::per_token);
  Case c = gemm_case(o, shape);
  const Check right = check_integer_linear(*o, exact_linear(*o));
  const Scheme rows = symmetric_scheme(8, Granularity::per_token);
  const Run quantize_rows = [o, rows](int64_t set) {
    const auto [codes, scale] = quantize_per_token(o->x[static_cast<size_t>(set)], rows);
    return Tensors{codes, scale};
  };
  c.implementations.push_back(bf16_product(o, place));
  c.implementations.push_back(
      {kVernier,
       on_sets(o,
               [rows](const Operands& p, size_t i) {
                 const auto [codes, scale] = quantize_per_token(p.x[i], rows);
                 return int8_linear(codes, p.weight[i], scale, p.w_scale[i], p.bias, std::nullopt,
                                    std::nullopt, torch::kBFloat16);
               }),
       right,
       {{"quantize", quantize_rows}, {"GEMM", on_sets(o, vernier_linear)}}});
#ifdef VERNIER_WITH_CUDA
  if (place.cuda()) {
    c.add("cuBLASLt i8i8i32 + kernels", [&] {
      const auto product = tuned(place, LtProduct::i8i8i32, o->codes, o->weight);
      const auto run = [o, product, quantize_rows](int64_t set) {
        const auto i = static_cast<size_t>(set);
        const Tensors quantized = quantize_rows(set);
        return Tensors{dequantize_accumulators(product->run(quantized[0], o->weight[i]),
                                               quantized[1], o->w_scale[i], o->bias)};
      };
      Tensors sums;
      for (int64_t set = 0; set < c.sets; ++set) sums.push_back(product->run(set));
      return Implementation{
          "",
          run,
          right,
          {{"quantize", quantize_rows},
           {"GEMM", [product](int64_t set) { return Tensors{product->run(set)}; }},
           {"dequantize", on_sets(o, [sums](const Operands& p, size_t i) {
              return dequantize_accumulators(sums[i], p.x_scale[i], p.w_scale[i], p.bias);
            })}}};
    });
  }
#endif
  c.add("torch._int_mm, eager", [&] {
    const auto multiply = [](const Operands& p, size_t i) {
      return torch::_int_mm(p.codes[i], p.weight[i].t());
    };
    Tensors sums;
    for (size_t i = 0; i < o->codes.size(); ++i) sums.push_back(multiply(*o, i));
    return Implementation{
        "",
        on_sets(o,
                [](const Operands& p, size_t i) {
                  const auto [codes, scale] = quantize_rows_eagerly(p.x[i]);
                  return dequantize_eagerly(torch::_int_mm(codes, p.weight[i].t()), scale,
                                            p.w_scale[i], p.bias);
                }),
        // Torch divides by a constant through its reciprocal, which moves a scale's last bit and
        // now and then a code.
        [o](const Tensors& y) {
          return check_float_product(exact_linear(*o), o->codes[0].size(1))(y);
        },
        {{"quantize",
          [o](int64_t set) {
            const auto [codes, scale] = quantize_rows_eagerly(o->x[static_cast<size_t>(set)]);
            return Tensors{codes, scale};
          }},
         {"GEMM", on_sets(o, multiply)},
         {"dequantize", on_sets(o, [sums](const Operands& p, size_t i) {
            return dequantize_eagerly(sums[i], p.x_scale[i], p.w_scale[i], p.bias);
          })}}};
  });
  return c;
}

// FP8 E4M3 codes with their scales, beside the bfloat16 numbers that they stand for.
struct Fp8Operands {
  Tensors x, w;              // float8_e4m3fn [M, K], [N, K]
  Tensors x_scale, w_scale;  // float32 [M, 1], [1, N]
};

Case prepare_fp8(const Place& place, Shape shape) {
  constexpr double kLargest = 448;
  const SharedOperands o = make_operands(place, shape, Activations::per_token);
  Case c = gemm_case(o, shape);
  c.implementations.push_back(bf16_product(o, place));
  auto fp8 = std::make_shared<Fp8Operands>();
  for (size_t i = 0; i < o->x.size(); ++i) {
    const auto add = [&](const Tensor& real, Tensors& codes, Tensors& scales) {
      const Tensor scale = real.abs().amax(-1, /*keepdim=*/true).to(torch::kFloat) / kLargest;
      codes.push_back((real / scale).to(torch::kFloat8_e4m3fn));
      scales.push_back(scale);
    };
    add(o->x[i], fp8->x, fp8->x_scale);
    add(o->w[i], fp8->w, fp8->w_scale);
    fp8->w_scale[i] = fp8->w_scale[i].t().contiguous();
  }
  const auto scaled_product = [](const Fp8Operands& p, size_t i, const Tensor& a, const Tensor& b) {
    return torch::_scaled_mm(p.x[i], p.w[i].t(), a, b, /*bias=*/{}, /*scale_result=*/{},
                             torch::kBFloat16);
  };
  // Around 1 again, as check_float_product wants it.
  const auto check_scaled = [fp8](const Tensor& a, const Tensor& b) -> Check {
    return [=](const Tensors& y) {
      const Tensor expected =
          exact_product(fp8->x[0], fp8->w[0]).mul_(a.to(torch::kDouble)).mul_(b.to(torch::kDouble));
      return check_float_product(expected, fp8->x[0].size(1))(y);
    };
  };
  const auto as_run = [fp8](const auto& f) -> Run {
    return [fp8, f](int64_t set) { return Tensors{f(*fp8, static_cast<size_t>(set))}; };
  };
  tune_fp8_linear(fp8->x[0], fp8->w[0], fp8->x_scale[0].flatten(), fp8->w_scale[0].flatten(),
                  std::nullopt, torch::kBFloat16);
  c.implementations.push_back({kVernier,
                               as_run([](const Fp8Operands& p, size_t i) {
                                 return fp8_linear(p.x[i], p.w[i], p.x_scale[i].flatten(),
                                                   p.w_scale[i].flatten(), std::nullopt,
                                                   torch::kBFloat16);
                               }),
                               check_scaled(fp8->x_scale[0], fp8->w_scale[0]),
                               {}});
  c.implementations.push_back({"torch._scaled_mm, row-wise",
                               as_run([scaled_product](const Fp8Operands& p, size_t i) {
                                 return scaled_product(p, i, p.x_scale[i], p.w_scale[i]);
                               }),
                               check_scaled(fp8->x_scale[0], fp8->w_scale[0]),
                               {}});
  const Tensor x_scale = fp8->x_scale[0].mean(), w_scale = fp8->w_scale[0].mean();
  c.implementations.push_back(
      {"torch._scaled_mm, tensor-wise",
       as_run([scaled_product, x_scale, w_scale](const Fp8Operands& p, size_t i) {
         return scaled_product(p, i, x_scale, w_scale);
       }),
       check_scaled(x_scale, w_scale),
       {}});
  return c;
}

}  // namespace

std::vector<Work> gemm_works() {
  const std::vector<Shape> shapes = {
      {16384, 2048, 2048},  {16384, 2048, 6144}, {16384, 2048, 22016},
      {16384, 11008, 2048}, {4096, 4096, 4096},  {8192, 8192, 8192},
      {2048, 1920, 1920},   {128, 4096, 4096},   {32, 2048, 2048}};
  const std::vector<Shape> quick = {{4096, 4096, 4096}, {128, 4096, 4096}};
  const std::vector<Shape> cpu = {{64, 256, 128}};
  const std::string baseline = "bf16 cuBLAS";
  return {
      {"w8a8_gemm", "", baseline, shapes, quick, cpu, false, prepare_w8a8},
      {"w8a8_int8_out", "", baseline, shapes, quick, cpu, false, prepare_int8_out},
      {"quantize_gemm", "", baseline, shapes, quick, cpu, false, prepare_quantize_gemm},
      {"fp8_gemm", "", baseline, shapes, quick, {}, true, prepare_fp8},
  };
}

}  // namespace vernier::bench
