// Works bound by memory: ours and every peer on the same tensors, beside a copy of as many bytes.
#include <torch/torch.h>
#include <vernier/cli/bench/check.h>
#include <vernier/cli/bench/work.h>
#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/norm_quantize.h>
#include <vernier/kernels/quantize.h>
#include <vernier/kernels/statistics.h>

#include <cmath>
#include <memory>

namespace vernier::bench {
namespace {

using torch::Tensor;

// ---- Data ---------------------------------------------------------------------------------------

using SharedTensors = std::shared_ptr<const Tensors>;

SharedTensors random_inputs(const Place& place, Shape shape, torch::ScalarType type, int64_t sets) {
  auto inputs = std::make_shared<Tensors>();
  for (int64_t set = 0; set < sets; ++set)
    inputs->push_back(torch::randn({shape.m, shape.k}, torch::dtype(type).device(place.device)));
  return inputs;
}

int64_t elements(Shape shape) { return shape.m * shape.k; }

// A copy that reads and writes half of `bytes` each: what memory allows.
Implementation copy_of(const Place& place, int64_t bytes, int64_t sets) {
  auto sources = std::make_shared<Tensors>();
  for (int64_t set = 0; set < sets; ++set)
    sources->push_back(torch::randint(256, {std::max<int64_t>(bytes / 2, 1)},
                                      torch::dtype(torch::kByte).device(place.device)));
  return {"copy",
          [sources](int64_t set) { return Tensors{(*sources)[static_cast<size_t>(set)].clone()}; },
          [sources](const Tensors& y) { return check_equal(y[0], sources->front()); },
          {}};
}

// Starts the case of a work that moves so many bytes an element, and makes its inputs.
SharedTensors begin(Case& c, const Place& place, Shape shape, torch::ScalarType type,
                    int64_t bytes_an_element) {
  const int64_t bytes = elements(shape) * bytes_an_element;
  c.sets = place.sets(elements(shape) * static_cast<int64_t>(c10::elementSize(type)));
  c.bytes = static_cast<double>(bytes);
  c.implementations.push_back(copy_of(place, bytes, c.sets));
  return random_inputs(place, shape, type, c.sets);
}

// Calls f(x) for the tensor x of a set.
template <typename F>
Run on_each(const SharedTensors& x, const F& f) {
  return [x, f](int64_t set) -> Tensors { return f((*x)[static_cast<size_t>(set)]); };
}

// ---- References, in the arithmetic of docs/numerics.md ------------------------------------------

constexpr int kQmax = 127;

// Torch divides by a number through its reciprocal; by a tensor it divides.
Tensor exact_quotient(const Tensor& x, const Tensor& y) { return x.to(torch::kFloat).div(y); }

// float32 [M, 1]
Tensor row_scales(const Tensor& x) {
  const Tensor qmax = torch::full({1}, kQmax, x.options().dtype(torch::kFloat));
  return exact_quotient(x.abs().amax(-1, /*keepdim=*/true), qmax);
}

// Codes as float32; the scales broadcast.
Tensor real_codes(const Tensor& x, const Tensor& scale) {
  return exact_quotient(x, scale).round_().clamp_(-kQmax, kQmax);
}

using Check = std::function<std::string(const Tensors&)>;

// Codes equal, and scales where there are any.
Check check_codes(const Tensor& x, const Tensor& scale) {
  return [=](const Tensors& y) {
    const std::string wrong = check_equal(y[0], real_codes(x, scale).to(torch::kChar));
    if (!wrong.empty() || y.size() < 2) return wrong;
    return check_equal(y[1].reshape({-1}), scale.reshape({-1}));
  };
}

// Peers multiply by a reciprocal or take a scale from other roundings: a code may be the next one.
Check check_near_codes(const Tensor& x, const Tensor& scale, double steps) {
  return [=](const Tensors& y) { return check_close(y[0], real_codes(x, scale), 0, steps); };
}

// ---- quantize -----------------------------------------------------------------------------------

Tensors quantize_rows_eagerly(const Tensor& x) {
  const Tensor real = x.to(torch::kFloat);
  const Tensor scale = real.abs().amax(-1, /*keepdim=*/true) / kQmax;
  return {torch::clamp(torch::round(real / scale), -kQmax, kQmax).to(torch::kChar), scale};
}

// bfloat16 rows to int8 codes, each with its own scale: 2 bytes read and 1 written an element.
Case prepare_quantize_per_token(const Place& place, Shape shape) {
  Case c;
  const SharedTensors x = begin(c, place, shape, torch::kBFloat16, 3);
  const Tensor scale = row_scales(x->front());
  const Scheme scheme = symmetric_scheme(8, Granularity::per_token);
  c.implementations.push_back({kVernier,
                               on_each(x,
                                       [scheme](const Tensor& t) -> Tensors {
                                         const auto [codes, scales] = quantize_per_token(t, scheme);
                                         return {codes, scales};
                                       }),
                               check_codes(x->front(), scale),
                               {}});
  c.implementations.push_back({"torch eager",
                               on_each(x, quantize_rows_eagerly),
                               check_near_codes(x->front(), scale, 1),
                               {}});
  return c;
}

// bfloat16 to int8 codes with one given scale.
Case prepare_quantize_static(const Place& place, Shape shape) {
  Case c;
  const SharedTensors x = begin(c, place, shape, torch::kBFloat16, 3);
  const Tensor scale =
      torch::full({1}, 3.0 / kQmax, torch::dtype(torch::kFloat).device(place.device));
  c.implementations.push_back({kVernier,
                               on_each(x,
                                       [scale](const Tensor& t) -> Tensors {
                                         return {
                                             quantize(t, scale, std::nullopt, symmetric_scheme(8))};
                                       }),
                               check_codes(x->front(), scale),
                               {}});
  c.implementations.push_back(
      {"torch eager",
       on_each(x,
               [scale](const Tensor& t) -> Tensors {
                 return {torch::clamp(torch::round(t / scale), -kQmax, kQmax).to(torch::kChar)};
               }),
       check_near_codes(x->front(), scale, 1),
       {}});
  return c;
}

// ---- fake_quantize ------------------------------------------------------------------------------

const Scheme& per_channel() {
  static const Scheme scheme = symmetric_scheme(8, Granularity::per_channel);
  return scheme;
}

Check check_fake_quantized(const Tensor& x, const Tensor& scale) {
  return [=](const Tensors& y) {
    return check_equal(y[0], real_codes(x, scale).mul_(scale).to(x.scalar_type()));
  };
}

// A peer's value may be that of the next code.
Check check_near_fake_quantized(const Tensor& x, const Tensor& scale) {
  const double step = scale.max().item<double>();
  return [=](const Tensors& y) {
    return check_close(y[0], real_codes(x, scale).mul_(scale), 0x1p-7, 1.01 * step);
  };
}

// bfloat16 per channel, the scale from the channel's abs-max: 2 bytes read and 2 written an element
// where the row stays on the chip between the two.
Case prepare_fake_quantize_dynamic(const Place& place, Shape shape) {
  Case c;
  const SharedTensors x = begin(c, place, shape, torch::kBFloat16, 4);
  const Tensor scale = row_scales(x->front());
  c.implementations.push_back({kVernier,
                               on_each(x,
                                       [](const Tensor& t) -> Tensors {
                                         const auto [y, scales] =
                                             fake_quantize_dynamic(t, per_channel());
                                         return {y, scales};
                                       }),
                               check_fake_quantized(x->front(), scale),
                               {}});
  const Tensor zero_points =
      torch::zeros({shape.m}, torch::dtype(torch::kInt).device(place.device));
  c.implementations.push_back({"torch eager",
                               on_each(x,
                                       [zero_points](const Tensor& t) -> Tensors {
                                         const Tensor scales =
                                             t.abs().amax(-1).to(torch::kFloat) / kQmax;
                                         return {torch::fake_quantize_per_channel_affine(
                                             t, scales, zero_points, 0, -kQmax, kQmax)};
                                       }),
                               check_near_fake_quantized(x->front(), scale),
                               {}});
  return c;
}

// Scales that clip some of a row, so that the straight-through mask is not all ones.
Tensor clipping_scales(const Tensor& x) { return row_scales(x).mul_(0.6).contiguous(); }

Case prepare_fake_quantize_static(const Place& place, Shape shape) {
  Case c;
  const SharedTensors x = begin(c, place, shape, torch::kBFloat16, 4);
  const Tensor scale = clipping_scales(x->front());
  const Tensor flat = scale.flatten();
  const Tensor zero_points = torch::zeros_like(flat, torch::kInt);
  c.implementations.push_back({kVernier,
                               on_each(x,
                                       [flat](const Tensor& t) -> Tensors {
                                         return {
                                             fake_quantize(t, flat, std::nullopt, per_channel())};
                                       }),
                               check_fake_quantized(x->front(), scale),
                               {}});
  c.implementations.push_back({"torch eager",
                               on_each(x,
                                       [flat, zero_points](const Tensor& t) -> Tensors {
                                         const auto [y, mask] =
                                             torch::fake_quantize_per_channel_affine_cachemask(
                                                 t, flat, zero_points, 0, -kQmax, kQmax);
                                         return {y, mask};
                                       }),
                               check_near_fake_quantized(x->front(), scale),
                               {}});
  return c;
}

// Ours recomputes the mask from the input: 4 bytes read and 2 written an element.
Case prepare_fake_quantize_backward(const Place& place, Shape shape) {
  Case c;
  const SharedTensors x = begin(c, place, shape, torch::kBFloat16, 6);
  const SharedTensors gradients = random_inputs(place, shape, torch::kBFloat16, c.sets);
  const Tensor scale = clipping_scales(x->front());
  const Tensor flat = scale.flatten();
  const auto right = [x, gradients, scale](const Tensors& y) {
    const Tensor inside = exact_quotient(x->front(), scale).round_().abs_().le(kQmax);
    return check_equal(y[0], gradients->front() * inside);
  };
  using Backward = Tensor(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                          int64_t, std::string_view, int64_t, int64_t, bool);
  static const auto backward = operator_handle<Backward>("vernier::fake_quantize_backward");
  const Scheme scheme = per_channel();
  c.implementations.push_back(
      {kVernier,
       [x, gradients, flat, scheme](int64_t set) {
         const auto i = static_cast<size_t>(set);
         return Tensors{backward.call((*gradients)[i], (*x)[i], flat, std::nullopt, scheme.bits,
                                      to_string(scheme.granularity), /*axis=*/0, scheme.group_size,
                                      scheme.narrow_range)};
       },
       right,
       {}});
  c.add("torch eager", [&] {
    auto masks = std::make_shared<Tensors>();
    const Tensor zero_points = torch::zeros_like(flat, torch::kInt);
    for (int64_t set = 0; set < c.sets; ++set)
      masks->push_back(std::get<1>(torch::fake_quantize_per_channel_affine_cachemask(
          (*x)[static_cast<size_t>(set)], flat, zero_points, 0, -kQmax, kQmax)));
    return Implementation{
        "",
        [gradients, masks](int64_t set) {
          const auto i = static_cast<size_t>(set);
          return Tensors{torch::fake_quantize_per_channel_affine_cachemask_backward((*gradients)[i],
                                                                                    (*masks)[i])};
        },
        [gradients, masks](const Tensors& y) {
          return check_equal(y[0], gradients->front() * masks->front());
        },
        {}};
  });
  return c;
}

// ---- norm_quantize ------------------------------------------------------------------------------

// Codes of a bfloat16 norm's output, a scale a row: 2 bytes read and 1 written an element.
Case prepare_norm_quantize(const Place& place, Shape shape, bool rms) {
  Case c;
  const SharedTensors x = begin(c, place, shape, torch::kBFloat16, 3);
  const auto options = x->front().options();
  const Tensor weight = torch::rand({shape.k}, options) + 0.5;
  const Tensor bias = torch::randn({shape.k}, options) * 0.1;
  const auto norm = [=](const Tensor& t, torch::ScalarType type) {
    const Tensor w = weight.to(type);
    return rms ? torch::rms_norm(t.to(type), {shape.k}, w, 1e-5)
               : torch::layer_norm(t.to(type), {shape.k}, w, bias.to(type), 1e-5);
  };
  // A peer's output is rounded to bfloat16's 8 bits before it is quantized.
  const Tensor exact = norm(x->front(), torch::kDouble).to(torch::kFloat);
  c.implementations.push_back({kVernier,
                               on_each(x,
                                       [=](const Tensor& t) -> Tensors {
                                         const NormCodes y =
                                             rms ? rms_norm_quantize(t, weight, {})
                                                 : layer_norm_quantize(t, weight, bias, {});
                                         return {y.codes, *y.scale};
                                       }),
                               check_near_codes(exact, row_scales(exact), 1),
                               {}});
  c.implementations.push_back(
      {"torch eager",
       on_each(
           x, [norm](const Tensor& t) { return quantize_rows_eagerly(norm(t, torch::kBFloat16)); }),
       check_near_codes(exact, row_scales(exact), 2),
       {}});
  return c;
}

// ---- histogram ----------------------------------------------------------------------------------

// The counts of vernier::histogram() by torch's operators. Bins are powers of two wide, so that
// dividing is exact.
Check check_histogram(const Tensor& x, int64_t bins) {
  return [=](const Tensors& y) -> std::string {
    const int64_t exponent = y[2][0].item<int64_t>();
    const double largest = x.abs().amax().item<double>();
    if (!(largest < std::ldexp(static_cast<double>(bins), static_cast<int>(exponent))) ||
        !(largest >= std::ldexp(static_cast<double>(bins / 2), static_cast<int>(exponent))))
      return concat("the bin width 2^", exponent, " does not fit the largest magnitude ", largest);
    const Tensor real = x.to(torch::kFloat).flatten();
    const Tensor magnitudes = real.abs().mul_(std::ldexp(1.0, -static_cast<int>(exponent)));
    const Tensor indices = magnitudes.floor_().to(torch::kLong);
    const auto counts = [&](const Tensor& which) {
      return torch::bincount(indices.masked_select(which), /*weights=*/{}, bins);
    };
    return check_equal(y[0], torch::stack({counts(real.lt(0)), counts(real.gt(0))}));
  };
}

Case prepare_histogram(const Place& place, Shape shape, torch::ScalarType type) {
  constexpr int64_t kBins = 2048;
  const auto element = static_cast<int64_t>(c10::elementSize(type));
  Case c;
  const SharedTensors x = begin(c, place, shape, type, element);
  // The tensor read once is the baseline, the copy a peer.
  c.implementations.insert(
      c.implementations.begin(),
      {"read once, torch.sum",
       on_each(x, [](const Tensor& t) -> Tensors { return {t.sum()}; }),
       [x](const Tensors& y) {
         const Tensor expected = x->front().sum(torch::kDouble).reshape({1});
         const double spread = std::sqrt(static_cast<double>(x->front().numel()));
         return check_close(y[0].reshape({1}), expected, 0x1p-7, 1e-2 * spread);
       },
       {}});
  c.implementations.push_back({kVernier,
                               on_each(x,
                                       [](const Tensor& t) -> Tensors {
                                         const HistogramTensors h = vernier::histogram(t, kBins);
                                         return {h.counts, h.range, h.tallies};
                                       }),
                               check_histogram(x->front(), kBins),
                               {}});
  if (type == torch::kFloat) {
    c.implementations.push_back(
        {"torch.histc",
         on_each(x, [](const Tensor& t) -> Tensors { return {torch::histc(t, kBins, -8, 8)}; }),
         [numel = elements(shape)](const Tensors& y) {
           return check_close(y[0].sum().reshape({1}),
                              torch::full({1}, numel, y[0].options().dtype(torch::kDouble)), 1e-6,
                              0);
         },
         {}});
  }
  return c;
}

}  // namespace

std::vector<Work> memory_works() {
  const std::vector<Shape> shapes = {{8192, 8192}, {16384, 2048}};
  const std::vector<Shape> quick = {{4096, 4096}};
  const std::vector<Shape> cpu = {{64, 256}};
  const auto layer_norm = [](const Place& place, Shape shape) {
    return prepare_norm_quantize(place, shape, /*rms=*/false);
  };
  const auto rms_norm = [](const Place& place, Shape shape) {
    return prepare_norm_quantize(place, shape, /*rms=*/true);
  };
  const auto float32_histogram = [](const Place& place, Shape shape) {
    return prepare_histogram(place, shape, torch::kFloat);
  };
  const auto bfloat16_histogram = [](const Place& place, Shape shape) {
    return prepare_histogram(place, shape, torch::kBFloat16);
  };
  const auto work = [&](const char* name, const char* variant, const auto& prepare) {
    const bool reads = std::string(name) == "histogram";
    return Work{name,   variant, reads ? "reading the tensor once" : "a copy of as many bytes",
                shapes, quick,   cpu,
                false,  prepare};
  };
  return {
      work("fake_quantize", "", prepare_fake_quantize_dynamic),
      work("fake_quantize", "static", prepare_fake_quantize_static),
      work("fake_quantize", "backward", prepare_fake_quantize_backward),
      work("norm_quantize", "", layer_norm),
      work("norm_quantize", "rms", rms_norm),
      work("quantize", "", prepare_quantize_per_token),
      work("quantize", "static", prepare_quantize_static),
      work("histogram", "", float32_histogram),
      work("histogram", "bf16", bfloat16_histogram),
  };
}

}  // namespace vernier::bench
