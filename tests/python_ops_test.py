#!/usr/bin/env python3
"""torch.ops.vernier from Python. Exits 77 ("skipped") without PyTorch or without VERNIER_LIBRARY, the path of libvernier.so."""

import os
import sys
import unittest

try:
    import torch
except (ImportError, OSError) as error:  # OSError: a library of CUDA's is missing
    print("skipped:", str(error).partition("\n")[0])
    sys.exit(77)
if not os.environ.get("VERNIER_LIBRARY"):
    print("skipped: VERNIER_LIBRARY, the path of libvernier.so, is not set")
    sys.exit(77)

torch.ops.load_library(os.environ["VERNIER_LIBRARY"])
ops = torch.ops.vernier
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPERATORS = ("quantize", "dequantize", "fake_quantize", "fake_quantize_backward", "fake_quantize_dynamic", "fake_quantize_learned",
             "fake_quantize_learned_backward", "per_token_scale", "quantize_per_token", "histogram", "channel_range", "int8_matmul",
             "int8_matmul_reference", "int8_linear", "quantize_masked", "quantize_masked_pair", "fake_quantized_linear")


def codes_of(x, scale, zero_point=0, qmin=-127, qmax=127):
    """The contract in PyTorch's words; torch.round goes to even at halves."""
    return torch.clamp(torch.round(x.float() / scale) + zero_point, qmin, qmax).to(torch.int8)


def random_codes(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


class TestCase(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(3)
        torch.set_num_threads(1)

    def assert_same(self, actual, expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


class Quantize(TestCase):
    def cases(self):
        """Input, scale, zero point, keyword arguments, and scale and zero point in shapes that broadcast."""
        for dtype in DTYPES:
            x = torch.randn(6, 5, 8).to(dtype)
            rand = lambda *shape: torch.rand(*shape) * 0.02 + 1e-3
            for kwargs, scale, view in (({}, rand(1), (1,)),
                                        ({"granularity": "per_channel"}, rand(6), (6, 1, 1)),
                                        ({"granularity": "per_channel", "axis": -1}, rand(8), (8,)),
                                        ({"granularity": "per_token"}, rand(6, 5), (6, 5, 1))):
                zero_point = torch.randint(-128, 128, scale.shape, dtype=torch.int32)
                yield x, scale, None, kwargs, scale.view(view), 0
                yield x, scale, zero_point, kwargs, scale.view(view), zero_point.view(view)

    def test_formula(self):
        for x, scale, zero_point, kwargs, wide_scale, wide_zero_point in self.cases():
            with self.subTest(dtype=x.dtype, symmetric=zero_point is None, **kwargs):
                expected = codes_of(x, wide_scale, wide_zero_point, -127 if zero_point is None else -128)
                codes = ops.quantize(x, scale, zero_point, **kwargs)
                self.assert_same(codes, expected)
                values = (codes.float() - wide_zero_point) * wide_scale
                self.assert_same(ops.dequantize(codes, scale, zero_point, **kwargs), values)
                self.assert_same(ops.dequantize(codes, scale, zero_point, dtype=x.dtype, **kwargs), values.to(x.dtype))
                self.assert_same(ops.fake_quantize(x, scale, zero_point, **kwargs), values.to(x.dtype))

    def test_widths_and_groups(self):
        x, scale = torch.randn(3, 12), torch.rand(3, 4) * 0.2
        wide = scale.repeat_interleave(3, dim=1)
        group = {"granularity": "per_group", "group_size": 3}
        self.assert_same(ops.quantize(x, scale, bits=4, narrow_range=False, **group), codes_of(x, wide, 0, -8, 7))
        self.assert_same(ops.quantize(x, scale, bits=4, **group), codes_of(x, wide, 0, -7, 7))
        self.assert_same(ops.quantize(x, scale[0, :1], narrow_range=False), codes_of(x, scale[0, 0], 0, -128))

    def test_by_hand(self):
        x = torch.tensor([0.5, 1.5, -2.5, -0.0, 127.5, 1e9, float("nan"), float("inf"), -float("inf")])
        expected = torch.tensor([0, 2, -2, 0, 127, 127, -127, 127, -127], dtype=torch.int8)
        self.assert_same(ops.quantize(x, torch.ones(1)), expected)
        self.assertFalse(torch.signbit(ops.fake_quantize(x, torch.ones(1))[3]))

    def test_as_pytorch_fake_quantizes(self):
        # PyTorch multiplies by the reciprocal, which is exact for powers of two only.
        x = torch.randn(64, 33)
        for scale, zero_point, qmin in ((2**-5, 0, -127), (2**-6, -17, -128)):
            mine, theirs = (x.clone().requires_grad_() for _ in range(2))
            z = None if qmin == -127 else torch.tensor([zero_point], dtype=torch.int32)
            ops.fake_quantize(mine, torch.tensor([scale]), z).square().sum().backward()
            torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, qmin, 127).square().sum().backward()
            self.assert_same(mine.grad, theirs.grad)
            self.assertTrue((mine.grad == 0).any() and (mine.grad != 0).any())

    def test_gradient(self):
        for dtype in DTYPES:
            x = torch.randn(40, 8).to(dtype).requires_grad_()
            scale = torch.full((1,), 2**-6, requires_grad=True)
            y = ops.fake_quantize(x, scale)
            gradient = torch.randn(40, 8).to(dtype)
            y.backward(gradient)
            inside = torch.round(x.detach().double() * 64).abs() <= 127
            self.assert_same(x.grad, torch.where(inside, gradient, torch.zeros((), dtype=dtype)))
            self.assertIsNone(scale.grad)
            self.assert_same(ops.fake_quantize_backward(gradient, x.detach(), scale.detach()), x.grad)

    def test_per_token(self):
        for dtype in DTYPES:
            x = torch.randn(4, 3, 50).to(dtype)
            x[0, 0] = 0
            x[1, 1, 2] = float("nan")
            x[1, 2, 3] = -float("inf")
            amax = torch.where(x.isfinite(), x, torch.zeros_like(x)).float().abs().amax(-1)
            scale = torch.where(amax > 0, amax / 127, 1.0)
            codes, actual = ops.quantize_per_token(x)
            self.assert_same(actual, scale)
            self.assert_same(ops.per_token_scale(x), scale)
            self.assert_same(codes, ops.quantize(x, scale, granularity="per_token"))
            self.assert_same(codes[3], codes_of(x[3], scale[3].unsqueeze(-1)))


class Statistics(TestCase):
    def test_histogram(self):
        x = torch.tensor([1, 2.5, -3, 0, -0.0, float("nan"), float("inf"), -float("inf"), 0.5])
        counts, extremes, tallies = ops.histogram(x, bins=4)
        self.assertEqual(counts.tolist(), [[0, 0, 0, 1], [1, 1, 1, 0]])
        self.assertEqual(extremes.tolist(), [-3, 2.5])
        self.assertEqual(tallies.tolist(), [0, 2, 1, 2])  # width 2^0, zeros, NaN, Inf
        for dtype in DTYPES:
            x = torch.randn(10000).to(dtype)
            counts, extremes, tallies = ops.histogram(x)
            width = 2.0 ** tallies[0].item()
            for side, values in zip(counts, (-x[x < 0], x[x > 0])):
                self.assert_same(side, torch.bincount((values.double() / width).long(), minlength=4096))

    def test_channel_range(self):
        x = torch.randn(5, 7, 9)
        self.assert_same(ops.channel_range(x), torch.stack([x.amin((0, 1)), x.amax((0, 1))]))
        x[:, :, 2] = float("nan")
        self.assertEqual(ops.channel_range(x)[:, 2].tolist(), [float("inf"), -float("inf")])


class Int8(TestCase):
    def test_matmul(self):
        for m, n, k in ((1, 1, 1), (3, 5, 1), (17, 33, 65), (64, 48, 256), (0, 3, 4), (2, 3, 0)):
            codes, weight = random_codes(m, k), random_codes(n, k)
            expected = (codes.long() @ weight.long().t()).int()
            self.assert_same(ops.int8_matmul(codes, weight), expected)
            self.assert_same(ops.int8_matmul_reference(codes, weight), expected)
        extreme = torch.full((16, 640), 127, dtype=torch.int8)
        self.assert_same(ops.int8_matmul(extreme, extreme), torch.full((16, 16), 127 * 127 * 640, dtype=torch.int32))

    def test_linear(self):
        codes, weight = random_codes(17, 65), random_codes(9, 65)
        zero_point = torch.tensor([-11], dtype=torch.int32)
        bias = torch.randn(9)
        for input_scale in (torch.rand(1), torch.rand(17)):
            for weight_scale in (torch.rand(1), torch.rand(9)):
                for z in (None, zero_point):
                    acc = ((codes.long() - (z or 0)) @ weight.long().t()).float()
                    expected = (acc * weight_scale) * input_scale.unsqueeze(1) + bias
                    sums = None if z is None else weight.sum(1, dtype=torch.int32)
                    for dtype in DTYPES:
                        actual = ops.int8_linear(codes, weight, input_scale, weight_scale, bias, z, sums, dtype=dtype)
                        self.assert_same(actual, expected.to(dtype))

    def test_is_what_fake_quantized_layers_compute(self):
        x, layer = torch.randn(20, 64), torch.nn.Linear(64, 24)
        codes, scale = ops.quantize_per_token(x)
        weight_scale = layer.weight.detach().abs().amax(1) / 127
        weight = ops.quantize(layer.weight, weight_scale, granularity="per_channel")
        actual = ops.int8_linear(codes, weight, scale, weight_scale, layer.bias)
        fake = [ops.fake_quantize(x, scale, granularity="per_token"),
                ops.fake_quantize(layer.weight, weight_scale, granularity="per_channel")]
        torch.testing.assert_close(actual, torch.nn.functional.linear(*fake, layer.bias), rtol=1e-5, atol=1e-5)


def samples():
    """Each operator with arguments that suit it."""
    x, scale, codes = torch.randn(4, 6), torch.rand(1) + 0.1, random_codes(4, 6)
    zero_point, channels = torch.tensor([3], dtype=torch.int32), torch.rand(4) + 0.1
    sums = torch.zeros(4, dtype=torch.int32)
    yield "quantize", (x, scale), {}
    yield "quantize", (x.half(), channels), {"granularity": "per_channel", "bits": 4}
    yield "dequantize", (codes, scale, zero_point), {"dtype": torch.bfloat16}
    yield "fake_quantize", (x, scale), {}
    yield "fake_quantize", (x.clone().requires_grad_(), scale, zero_point), {}
    yield "fake_quantize_backward", (x, x, scale), {}
    yield "fake_quantize_dynamic", (x.clone().requires_grad_(),), {"granularity": "per_group", "group_size": 3, "bits": 4}
    yield "fake_quantize_learned", (x.clone().requires_grad_(), scale.clone().requires_grad_(), zero_point.float().requires_grad_()), {}
    yield "fake_quantize_learned", (x.clone().requires_grad_(), channels.clone().requires_grad_()), {"granularity": "per_channel"}
    yield "fake_quantize_learned_backward", (x, x, scale, zero_point.float()), {"gradient_scale": 0.1}
    yield "fake_quantize_learned_backward", (x, x, scale), {}
    yield "per_token_scale", (x,), {}
    yield "quantize_per_token", (x.bfloat16(),), {"bits": 4}
    yield "histogram", (x, 64), {}
    yield "channel_range", (x,), {}
    yield "int8_matmul", (codes, codes), {}
    yield "int8_matmul_reference", (codes, codes), {}
    yield "quantize_masked", (x, scale, zero_point), {}
    yield "quantize_masked", (x.half(), scale), {"dtype": torch.bfloat16, "mask": False}
    tensor, channel = (8, "per_tensor", 0, 0, True, True), (4, "per_channel", 0, 0, True, False)
    yield "quantize_masked_pair", (x, scale, None, x, channels, None, *tensor, *channel, torch.float32), {}
    yield "fake_quantized_linear", (x.clone().requires_grad_(), x.clone().requires_grad_()), {"input_granularity": "per_token"}
    yield "int8_linear", (codes, codes, scale, channels, None, zero_point, sums), {"dtype": torch.float16}


class Tracing(TestCase):
    def test_meta_tensors(self):
        self.assertEqual({name for name, _, _ in samples()}, set(OPERATORS))
        for name, args, kwargs in samples():
            with self.subTest(name):
                meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
                results = [getattr(ops, name)(*a, **kwargs) for a in (args, meta)]
                real, traced = (r if isinstance(r, (tuple, list)) else (r,) for r in results)
                self.assertEqual([(t.device.type, t.dtype, t.shape) for t in traced], [("meta", t.dtype, t.shape) for t in real])

    def test_opcheck(self):
        for name, args, kwargs in samples():
            with self.subTest(name):
                torch.library.opcheck(getattr(ops, name).default, args, kwargs)

    def test_training_steps(self):
        x, w, bias, channels = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5), torch.rand(5) * 0.02 + 0.01
        scale, zero_point = torch.rand(1) * 0.02 + 0.01, torch.tensor([3], dtype=torch.int32)
        leaf = lambda t: t.clone().requires_grad_()
        learned = {"input_gradient_scale": 0.5, "weight_gradient_scale": 0.5}
        for args, kwargs in (((leaf(x), leaf(w), leaf(bias), scale, None, channels), {}),
                             ((leaf(x), leaf(w), leaf(bias), scale, zero_point, channels), {"product_of_codes": True}),
                             ((leaf(x), leaf(w), None, leaf(scale), None, leaf(channels)), learned),
                             ((leaf(x), w, None, scale, None, channels), {}),
                             ((x, leaf(w), None, scale), {"weight_bits": 4})):
            with self.subTest(**kwargs):
                torch.library.opcheck(ops.fake_quantized_linear.default, args, kwargs)
        mask = lambda t: torch.zeros((t.numel() + 7) // 8, dtype=torch.uint8)
        gradient = torch.randn(6, 8)
        expected = ops.fake_quantize_learned_backward(gradient, x, scale, zero_point.float())
        self.assert_same(ops.fake_quantize_learned_backward_(gradient, x, scale, zero_point.float()), expected[1:])
        self.assert_same(gradient, expected[0])
        torch.library.opcheck(ops.fake_quantize_learned_backward_.default, (x.clone(), x, scale), {})
        torch.library.opcheck(ops.zero_clipped_.default, (x.clone(), mask(x)), {})
        torch.library.opcheck(ops.zero_clipped_pair_.default, (x.clone(), mask(x), w.clone(), mask(w)), {})

    def test_schemas(self):
        self.assertEqual(str(ops.fake_quantize.default._schema),
                         "vernier::fake_quantize(Tensor input, Tensor scale, Tensor? zero_point=None, *, int bits=8, "
                         "str granularity=\"per_tensor\", int axis=0, int group_size=0, bool narrow_range=True) -> Tensor")


class Errors(TestCase):
    def test_messages(self):
        x, one, codes = torch.randn(4, 6), torch.ones(1), random_codes(4, 6)
        for call, expected in (
                (lambda: ops.quantize(x.double(), one), "input must be float32, float16 or bfloat16, not Double"),
                (lambda: ops.quantize(x, one.double()), "scale must be Float, not Double"),
                (lambda: ops.quantize(x, torch.ones(3)), "scale has 3 elements but per_tensor needs 1"),
                (lambda: ops.quantize(x, torch.ones(4), granularity="per_row"), "unknown granularity 'per_row'"),
                (lambda: ops.quantize(x, one, granularity="per_channel", axis=2), "axis 2 is outside"),
                (lambda: ops.quantize(x, one, granularity="per_group", group_size=4), "group_size 4 does not divide"),
                (lambda: ops.quantize(x, one, bits=9), "bits must be 2 to 8, not 9"),
                (lambda: ops.quantize(x, one, torch.zeros(1)), "zero_point must be Int"),
                (lambda: ops.dequantize(x, one), "codes must be Char"),
                (lambda: ops.fake_quantize_backward(x[:2], x, one), "gradient has shape [2, 6]"),
                (lambda: ops.histogram(x, 100), "bins must be a power of two"),
                (lambda: ops.int8_matmul(codes, codes[:, :5]), "codes must be [M, K] and weight [N, K]"),
                (lambda: ops.int8_matmul(*[torch.zeros(1, 131072, dtype=torch.int8)] * 2), "K = 131072"),
                (lambda: ops.int8_linear(codes, codes, torch.ones(3), one), "input_scale has 3 elements")):
            with self.subTest(expected), self.assertRaises(RuntimeError) as caught:
                call()
            self.assertIn(expected, str(caught.exception))


if __name__ == "__main__":
    unittest.main()
