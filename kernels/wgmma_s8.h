// Hopper's int8 tensor core instruction, wgmma.mma_async (PTX ISA, "Asynchronous Warpgroup Level
// Matrix Multiply-Accumulate"): one warpgroup multiplies 64 rows of A by N rows of B, 32 codes
// deep, both from shared memory; internal, for sm_90a only. Enqueued between wgmma_fence and
// wgmma_commit of hopper.h.
#pragma once

#include <cstdint>

#define VERNIER_OUT4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define VERNIER_OUT16(i) \
  VERNIER_OUT4(i), VERNIER_OUT4(i + 4), VERNIER_OUT4(i + 8), VERNIER_OUT4(i + 12)

namespace vernier::cuda::hopper {

/// d [64, 32] (+)= a [64, 32] * b [32, 32]^T; `accumulate` false starts from zero.
__device__ inline void wgmma_s8(int32_t (&d)[16], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, %16, %17, p;\n"
      "}\n"
      : VERNIER_OUT16(0)
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));
}

/// d [64, 64] (+)= a [64, 32] * b [64, 32]^T; `accumulate` false starts from zero.
__device__ inline void wgmma_s8(int32_t (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, p;\n"
      "}\n"
      : VERNIER_OUT16(0), VERNIER_OUT16(16)
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));
}

/// d [64, 128] (+)= a [64, 32] * b [128, 32]^T; `accumulate` false starts from zero.
__device__ inline void wgmma_s8(int32_t (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p;\n"
      "}\n"
      : VERNIER_OUT16(0), VERNIER_OUT16(16), VERNIER_OUT16(32), VERNIER_OUT16(48)
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));
}

/// d [64, 256] (+)= a [64, 32] * b [256, 32]^T; `accumulate` false starts from zero.
__device__ inline void wgmma_s8(int32_t (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127"
      "}, %128, %129, p;\n"
      "}\n"
      : VERNIER_OUT16(0), VERNIER_OUT16(16), VERNIER_OUT16(32), VERNIER_OUT16(48),
        VERNIER_OUT16(64), VERNIER_OUT16(80), VERNIER_OUT16(96), VERNIER_OUT16(112)
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));
}

}  // namespace vernier::cuda::hopper

#undef VERNIER_OUT16
#undef VERNIER_OUT4
