#!/usr/bin/env python3
"""Vernier's operators beside what torch.compile makes of the same arithmetic, on one GPU.

    python bench/compile_peers.py --library build/lib/libvernier.so [--rows 8192] [--columns 8192] [--only training]
                                  [--out rows.json]

Needs PyTorch 2.11 with CUDA and Triton. Prints one JSON object as `vernier bench --json` does: device, versions, date, and
rows of {work, shape, implementation, us, gbs, speedup}; speedup is over a copy of as many bytes in the same run, of training
steps (qat_linear) over the plain layer. A result is compared with the eager one before it is timed; a wrong one is reported on
stderr, left out, and makes the exit code 1.
"""

import argparse
import datetime
import json
import math
import statistics
import sys

import torch
import torch.nn.functional as F

QMAX = 127.0


# ---- What is compiled: plain PyTorch, as a user would write it ------------------------------------------------------------------
def scales_of_rows(x):
    scale = x.abs().amax(-1, keepdim=True).float() / QMAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize_rows(x):
    scale = scales_of_rows(x)
    return torch.round(x.float() / scale).clamp(-QMAX, QMAX).to(torch.int8), scale


def fake_quantize_rows(x):
    """Per channel of axis 0, the scale from the channel's absolute maximum."""
    scale = scales_of_rows(x)
    return (torch.round(x.float() / scale).clamp(-QMAX, QMAX) * scale).to(x.dtype)


def fake_quantize_static(x, scale):
    return (torch.round(x.float() / scale).clamp(-QMAX, QMAX) * scale).to(x.dtype)


def fake_quantize_backward(gradient, x, scale):
    """The straight-through gradient, its mask recomputed."""
    inside = torch.round(x.float() / scale).abs() <= QMAX
    return torch.where(inside, gradient, torch.zeros_like(gradient))


def norm_and_quantize(x, weight, bias):
    return quantize_rows(F.layer_norm(x, (x.shape[-1],), weight, bias))


class FakeQuantize(torch.autograd.Function):
    """With the straight-through gradient."""

    @staticmethod
    def forward(ctx, x, scale):
        code = torch.round(x.float() / scale)
        ctx.save_for_backward(code.abs() <= QMAX)
        return (code.clamp(-QMAX, QMAX) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return torch.where(inside, gradient, torch.zeros_like(gradient)), None


def quantized_linear(x, weight, x_scale, weight_scale):
    return F.linear(FakeQuantize.apply(x, x_scale), FakeQuantize.apply(weight, weight_scale))


# ---- Timing ---------------------------------------------------------------------------------------------------------------------
def graph_of(function, sets):
    """A CUDA graph of calls on every set, and their number. The inputs are larger than the L2 together."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for inputs in sets:
                function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    passes = max(1, 16 // len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            outputs = [function(*inputs) for inputs in sets]  # outputs rotate as the inputs do
    del outputs
    return graph, passes * len(sets)


def measure(graphs, rounds):
    """Median microseconds of a call of each graph; a round replays each once."""
    times = [[] for _ in graphs]
    for _ in range(rounds):
        for (graph, calls), samples in zip(graphs, times):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()  # keeps the GPU busy while the host enqueues the timed one
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / calls)
    return [statistics.median(samples) for samples in times]


def measure_launched(steps, rounds):
    """Median microseconds of a step of each, launched one by one as a training loop does: the host takes part."""

    def time_of(step, calls):
        for _ in range(calls):  # keeps the GPU busy while the host enqueues the timed ones
            step()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls

    calls = [max(1, round(10000 / min(time_of(step, 3) for _ in range(3)))) for step in steps]
    times = [[] for _ in steps]
    for _ in range(rounds):
        for step, count, samples in zip(steps, calls, times):
            samples.append(time_of(step, count))
    return [statistics.median(samples) for samples in times]


# ---- Comparing ------------------------------------------------------------------------------------------------------------------
def as_tuple(outputs):
    return outputs if isinstance(outputs, (tuple, list)) else (outputs,)


def wrong(outputs, expected, step):
    """What is wrong with outputs that may be one quantization step away from the eager ones; empty when nothing is."""
    for got, want in zip(as_tuple(outputs), as_tuple(expected)):
        if got.numel() != want.numel():
            return f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        got, want = got.float().reshape(want.shape), want.float()
        outside = ~((got - want).abs() <= step + want.abs() * 2**-7)
        if outside.any():
            return f"{int(outside.sum())} of {want.numel()} elements differ"
    return ""


@torch.enable_grad()
def training_rows(shapes, rounds):
    """Forward, backward and gradients dropped of one linear layer, 8 bits, given scales; rows, and whether one was wrong."""
    rows, failed = [], False
    for m, k, n in shapes:
        new = lambda *sizes: torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        x, weight, gradient = new(m, k).requires_grad_(), (new(n, k) / math.sqrt(k)).requires_grad_(), new(m, n)
        x_scale = (x.detach().abs().max().float() * (0.9 / QMAX)).reshape(1)
        weight_scale = weight.detach().abs().amax(1, keepdim=True).float() * (0.9 / QMAX)
        flat = weight_scale.flatten()
        compiled = torch.compile(quantized_linear, dynamic=False)
        ours = torch.ops.vernier.fake_quantized_linear

        def step_of(forward):
            def step():
                forward().backward(gradient)
                gradients = x.grad, weight.grad
                x.grad = weight.grad = None
                return gradients

            return step

        steps = {
            "plain bf16": step_of(lambda: F.linear(x, weight)),
            "vernier": step_of(lambda: ours(x, weight, None, x_scale, None, flat)[0]),
            "vernier, int8 forward": step_of(lambda: ours(x, weight, None, x_scale, None, flat, product_of_codes=True)[0]),
            "eager": step_of(lambda: quantized_linear(x, weight, x_scale, weight_scale)),
            "torch.compile": step_of(lambda: compiled(x, weight, x_scale, weight_scale)),
        }
        expected, right = steps["eager"](), {}
        for name, step in steps.items():
            apart = max(float((g.float() - e.float()).norm() / e.float().norm()) for g, e in zip(step(), expected))
            # The plain layer is another function; a code next to the middle between two may be either.
            if apart > (0.5 if name == "plain bf16" else 0.01):
                failed = True
                print(f"WRONG: qat_linear {m}x{k}x{n}, {name}: gradients are {apart} of their length apart", file=sys.stderr)
                continue
            right[name] = step
        times = dict(zip(right, measure_launched(list(right.values()), rounds)))
        for name, us in times.items():
            rows.append({"work": "qat_linear", "shape": f"{m}x{k}x{n}", "implementation": name, "us": round(us, 3),
                         "speedup": round(times["plain bf16"] / us, 3)})
            print(f"qat_linear {m}x{k}x{n}, {name}: {us:.1f} us, {us / times['plain bf16']:.3f} of the plain layer's time",
                  file=sys.stderr)
    return rows, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", default="build/lib/libvernier.so")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", choices=("kernels", "training"), help="one half of the works")
    parser.add_argument("--out", help="write the JSON here instead of to stdout")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("compile_peers.py: no GPU was found")
    torch.ops.load_library(options.library)
    vernier = torch.ops.vernier
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    m, k = options.rows, options.columns
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, math.ceil(2 * cache / (2 * m * k)) + 1)
    new = lambda: torch.randn(m, k, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    xs = [new() for _ in range(count)]
    gradients = [new() for _ in range(count)]
    weight = torch.rand(k, device="cuda", dtype=torch.bfloat16) + 0.5
    bias = torch.randn(k, device="cuda", dtype=torch.bfloat16) * 0.1
    clipping = scales_of_rows(xs[0]) * 0.6
    flat = clipping.flatten()
    alone = [(x,) for x in xs]
    with_gradient = list(zip(gradients, xs))
    largest_step = float(scales_of_rows(xs[0]).max()) * 1.01

    def compiled(function):
        return torch.compile(function, dynamic=False)

    channel = {"granularity": "per_channel", "axis": 0}
    static, backward, norm = map(compiled, (fake_quantize_static, fake_quantize_backward, norm_and_quantize))

    def dynamic_fake_quantize(x):
        return vernier.fake_quantize_dynamic(x, **channel)[0]

    # work, variant, bytes an element, inputs, step allowed, eager, {implementation: function}
    works = [
        ("fake_quantize", "", 4, alone, largest_step, fake_quantize_rows,
         {"vernier": dynamic_fake_quantize, "torch.compile": compiled(fake_quantize_rows)}),
        ("fake_quantize", "static", 4, alone, largest_step, lambda x: fake_quantize_static(x, clipping),
         {"vernier": lambda x: vernier.fake_quantize(x, flat, **channel), "torch.compile": lambda x: static(x, clipping)}),
        # A code on the edge of the range may be inside for one division and outside for the other: such an element is allowed
        # to be any gradient, the others have to agree.
        ("fake_quantize", "backward", 6, with_gradient, None, lambda g, x: fake_quantize_backward(g, x, clipping),
         {"vernier": lambda g, x: vernier.fake_quantize_backward(g, x, flat, **channel),
          "torch.compile": lambda g, x: backward(g, x, clipping)}),
        ("quantize", "", 3, alone, 1, quantize_rows,
         {"vernier": vernier.quantize_per_token, "torch.compile": compiled(quantize_rows)}),
        ("norm_quantize", "", 3, alone, 2, lambda x: norm_and_quantize(x, weight, bias),
         {"vernier": lambda x: vernier.layer_norm_quantize(x, weight, bias)[:1], "torch.compile": lambda x: norm(x, weight, bias)}),
    ]

    rows, failed = [], False
    if options.only == "training":
        works = []
    for work, variant, bytes_an_element, sets, step, eager, implementations in works:
        total = bytes_an_element * m * k
        shape = f"{m}x{k}" + (f" {variant}" if variant else "")
        sources = [torch.randint(256, (total // 2,), device="cuda", dtype=torch.uint8) for _ in sets]
        names, graphs = ["copy"], [graph_of(torch.clone, [(source,) for source in sources])]
        expected = eager(*sets[0])
        for name, function in implementations.items():
            got = function(*sets[0])
            if step is None:
                differing = int((got != expected).sum())
                problem = f"{differing} elements differ" if differing > got.numel() * 1e-6 else ""
            else:
                problem = wrong(got, expected, step)
            if problem:
                failed = True
                print(f"WRONG: {work} {shape}, {name}: {problem}", file=sys.stderr)
                continue
            names.append(name)
            graphs.append(graph_of(function, sets))
        times = measure(graphs, options.rounds)
        for name, us in zip(names, times):
            rows.append({"work": work, "shape": shape, "implementation": name, "us": round(us, 3),
                         "gbs": round(total / us * 1e-3, 3), "speedup": round(times[0] / us, 3)})
            print(f"{work} {shape}, {name}: {us:.1f} us, {times[0] / us:.2f} of a copy", file=sys.stderr)
        del graphs, sources, expected

    if options.only != "kernels":
        more, wrong_steps = training_rows([(8192, 4096, 14336), (8192, 4096, 4096), (2048, 2048, 2048)], options.rounds)
        rows += more
        failed |= wrong_steps

    report = {
        "device": torch.cuda.get_device_name(),
        "versions": {"cuda": torch.version.cuda, "torch": torch.__version__},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "rows": rows,
    }
    text = json.dumps(report, indent=2)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    else:
        print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
