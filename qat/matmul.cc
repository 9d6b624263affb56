#include <ATen/ExpandUtils.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/int8_bmm.h>
#include <vernier/qat/matmul.h>

#include <cmath>
#include <limits>
#include <ostream>

namespace vernier::nn {

using torch::Tensor;

namespace {

/// A batch of products as the kernels take it, and the shape of its result.
struct Batch {
  Int8BmmOperands operands;
  std::vector<int64_t> output;

  /// `b` is [..., N, K]; scales are [1] or one a row.
  Batch(const QuantizerImpl::Codes& a, const QuantizerImpl::Codes& b,
        const std::optional<Tensor>& zero_point) {
    const int64_t m = a.codes.size(-2), n = b.codes.size(-2), k = a.codes.size(-1);
    operands.a_zero_point = zero_point;
    if (b.codes.dim() == 2) {  // one product, however many rows
      output = a.codes.sizes().vec();
      output.back() = n;
      operands.a = a.codes.reshape({-1, k});
      operands.a_scale = a.scale.flatten();
      operands.b = b.codes;
      operands.b_scale = b.scale;
      return;
    }
    output = at::infer_size(a.codes.sizes().slice(0, a.codes.dim() - 2),
                            b.codes.sizes().slice(0, b.codes.dim() - 2));
    const auto expand = [&](const Tensor& values, std::initializer_list<int64_t> tail) {
      std::vector<int64_t> sizes = output;
      sizes.insert(sizes.end(), tail);
      return values.expand(sizes);
    };
    operands.a = expand(a.codes, {m, k});
    operands.b = expand(b.codes, {n, k});
    operands.a_scale = a.scale.numel() == 1 ? a.scale : expand(a.scale, {m});
    operands.b_scale = b.scale.numel() == 1 ? b.scale : expand(b.scale, {n});
    output.insert(output.end(), {m, n});
  }
};

}  // namespace

MatMulImpl::MatMulImpl(const MatMulOptions& matmul_options) : DropIn(matmul_options) {
  MatMulImpl::reset();
}

void MatMulImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "vernier::nn::MatMul(transpose_other=" << options.transpose_other()
         << ")";
}

void MatMulImpl::make_quantizers() {
  register_input_quantizer("input_quantizer", input_quantizer);
  register_input_quantizer("other_quantizer", other_quantizer);
}

std::vector<NamedQuantizer> MatMulImpl::quantizers() const {
  auto all = QuantizedLayer::quantizers();
  all.push_back({"other", other_quantizer.ptr()});
  return all;
}

QuantizerImpl* MatMulImpl::quantizer_of_input(size_t index) const {
  return index == 1 ? other_quantizer.ptr().get() : QuantizedLayer::quantizer_of_input(index);
}

QuantizerSettings MatMulImpl::fitting(const std::string& quantizer,
                                      const QuantizerSettings& wanted) const {
  if (quantizer != "other") return wanted;
  QuantizerSettings settings = options.transpose_other() ? wanted : for_whole_tensor(wanted);
  if (!settings.scheme.symmetric) {
    settings.scheme.symmetric = true;
    settings.scheme.narrow_range = symmetric_scheme(settings.scheme.bits).narrow_range;
  }
  return settings;
}

Tensor MatMulImpl::compute(at::TensorList inputs, const Tensor&, const Tensor&) const {
  return torch::matmul(inputs[0],
                       options.transpose_other() ? inputs[1].transpose(-2, -1) : inputs[1]);
}

int64_t MatMulImpl::accumulation_length(at::TensorList inputs) const {
  return inputs.empty() ? 0 : inputs[0].size(-1);
}

void MatMulImpl::check_inputs(at::TensorList inputs) const {
  const Tensor &a = inputs[0], &b = inputs[1];
  VERNIER_CHECK(
      a.dim() >= 2 && b.dim() >= 2 && a.size(-1) == b.size(options.transpose_other() ? -1 : -2),
      "operands of shapes ", a.sizes(), " and ", b.sizes(),
      options.transpose_other() ? ", the second one transposed," : "", " have no matrix product");
  VERNIER_CHECK(a.device() == b.device(), "the first operand is on ", a.device(),
                " but the second is on ", b.device(), ": move one of them");
}

void MatMulImpl::prepare_integer() {
  const Scheme &inputs = input_quantizer->scheme(), &others = other_quantizer->scheme();
  VERNIER_CHECK(!inputs.is_fp8() && !others.is_fp8(),
                "products of two activations run on integer codes, not FP8: change the recipe or "
                "skip the layer");
  VERNIER_CHECK(others.symmetric,
                "the second operand of an integer product of two activations is symmetric, not ",
                to_string(others));
  VERNIER_CHECK(others.granularity == Granularity::per_tensor || options.transpose_other(),
                "the second operand has one scale, not ", to_string(others),
                ": use per_tensor, or transpose_other with operands [..., N, K]");
}

Tensor MatMulImpl::accumulators(at::TensorList codes) const {
  const Tensor other = options.transpose_other() ? codes[1] : codes[1].transpose(-2, -1);
  const Tensor none = torch::ones({1}, codes[0].options().dtype(torch::kFloat));
  const Batch batch({codes[0], none}, {other, none}, input_quantizer->zero_point());
  const Int8BmmOperands& o = batch.operands;
  return int8_bmm_accumulators(o.a, o.b, o.a_zero_point).view(batch.output);
}

Tensor MatMulImpl::integer_compute(at::TensorList inputs) const {
  const torch::Dtype dtype = output_dtype(inputs[0]);
  const QuantizerImpl::Codes a = input_codes(0, inputs[0]);
  QuantizerImpl::Codes b = input_codes(1, inputs[1]);
  if (!options.transpose_other()) b.codes = b.codes.transpose(-2, -1);
  const Batch batch(a, b, input_quantizer->zero_point());
  if (!output_quantizer || output_quantizer->scheme().is_fp8())
    return finish(int8_bmm(batch.operands, dtype).view(batch.output));
  const Tensor codes =
      int8_bmm_requantize(batch.operands, output_quantizer->scale().detach(),
                          output_quantizer->zero_point(), output_quantizer->scheme());
  return finish_codes(codes.view(batch.output), dtype);
}

void ScaledDotProductAttentionImpl::reset() {
  scores = register_module("scores", MatMul(MatMulOptions().transpose_other(true)));
  values = register_module("values", MatMul());
  QuantizerSettings probabilities = values->input_quantizer->settings();
  probabilities.scheme = asymmetric_scheme(8);
  values->input_quantizer->set_settings(probabilities);
}

Tensor ScaledDotProductAttentionImpl::forward(const Tensor& query, const Tensor& key,
                                              const Tensor& value, const Tensor& mask,
                                              double dropout, bool is_causal,
                                              std::optional<double> scale) {
  if (scores->mode() == Mode::full && values->mode() == Mode::full) {
    const std::optional<Tensor> given = mask.defined() ? std::optional(mask) : std::nullopt;
    return torch::scaled_dot_product_attention(query, key, value, given, dropout, is_causal, scale);
  }
  VERNIER_CHECK(!is_causal || !mask.defined(),
                "attention takes a mask or is_causal, not both: put the causal part into the mask");
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  const double factor = scale.value_or(1 / std::sqrt(static_cast<double>(query.size(-1))));
  Tensor score = scores->forward(query, key) * factor;
  Tensor used = mask;
  if (is_causal)
    used = torch::ones({query.size(-2), key.size(-2)}, query.options().dtype(torch::kBool)).tril();
  if (used.defined())
    score = used.scalar_type() == torch::kBool ? score.masked_fill(used.logical_not(), kNone)
                                               : score + used;
  const Tensor probabilities = torch::_safe_softmax(score, -1);
  return values->forward(torch::dropout(probabilities, dropout, /*train=*/true), value);
}

}  // namespace vernier::nn
