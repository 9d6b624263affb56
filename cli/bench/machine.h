// What the figures were measured on.
#pragma once

#include <vernier/cli/bench/work.h>
#include <nlohmann/json.hpp>

#include <string>

namespace vernier::bench {

/// What the hardware could do at most, from its clocks and units. 0 where that is not known.
struct Roof {
  double int8_tops = 0;  ///< also FP8's
  double bf16_tops = 0;
  double gbs = 0;
  std::string how;  ///< where the figures come from
};

struct Machine {
  std::string name;                 ///< of the GPU, or of the CPU
  nlohmann::ordered_json versions;  ///< {cuda, driver, cublas, torch, vernier}; null where absent
  Roof roof;
};

Machine describe(const Place& place);

/// The place to measure at, with its cache. Throws Error when the GPU does not answer.
Place place_on(torch::Device device);

}  // namespace vernier::bench
