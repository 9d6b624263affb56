// A step of GPU work that is recorded once and then launched as a whole (CUDA graphs).
#pragma once

#include <torch/types.h>

#include <functional>
#include <memory>
#include <string>

namespace vernier {

/// Runs a step of work again and again: the first times as it is, which lets libraries set
/// themselves up, then, on a GPU, as a recording, whose many kernels cost the host one launch. The
/// step must do the same work on the same memory every time, read what changes from tensors on the
/// device, and never make the host wait. Where a step cannot be recorded, or on a CPU, it goes on
/// running as it is.
///
/// While it lives, work of this thread is enqueued on a stream of its own: recordings cannot be
/// made on the default one. One thread.
class CapturedStep {
 public:
  /// `capture`: whether to record at all.
  CapturedStep(torch::Device device, bool capture);
  ~CapturedStep();
  CapturedStep(const CapturedStep&) = delete;
  CapturedStep& operator=(const CapturedStep&) = delete;

  void run(const std::function<void()>& step);

  /// Whether the steps are launched from a recording by now.
  bool captured() const;
  /// Why the step could not be recorded; "" where it could, or was not to be.
  const std::string& refusal() const { return refusal_; }
  /// Makes the host wait until all of it is done.
  void synchronize() const;

 private:
  struct Recording;
  std::unique_ptr<Recording> recording_;  // null on a CPU
  bool wanted_;
  int64_t runs_ = 0;
  std::string refusal_;
};

}  // namespace vernier
