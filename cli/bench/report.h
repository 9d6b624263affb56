// What a run found: rows, as a table, as JSON, as pictures.
#pragma once

#include <vernier/cli/bench/machine.h>
#include <vernier/cli/bench/timing.h>

#include <filesystem>
#include <optional>
#include <utility>

namespace vernier::bench {

/// One implementation of one work at one shape.
struct Row {
  std::string work;
  std::string shape;  ///< "MxKxN" or "MxK", then the variant where it is not the main one
  std::string implementation;
  double us = 0;
  std::optional<double> tops, gbs;
  std::optional<double> tokens_a_second;
  std::optional<double> peak_mib;  ///< of a step of a model: the most memory it needs at a time
  std::optional<double> speedup;   ///< over the baseline of the same run
  std::vector<std::pair<std::string, double>> steps;  ///< microseconds of its parts, each alone
};

struct Report {
  Machine machine;
  std::string date;  ///< UTC, ISO 8601
  std::vector<Row> rows;
  std::vector<std::string> failures;  ///< outputs that were wrong, which are not timed
};

/// Now, as Report::date.
std::string utc_now();

/// Checks and times all implementations of a case and adds their rows. Says on stderr which peers
/// were left out, and why.
void run_case(const Place& place, const Work& work, Shape shape, const Effort& effort,
              Report& report);

nlohmann::ordered_json to_json(const Report& report);
void print(const Report& report);

/// Writes the pictures into an existing folder and returns their names: the speed-up by shape of
/// every work, the time breakdown of quantize_gemm, what was reached of the hardware's roof, the
/// memory of steps of a model.
std::vector<std::string> write_pictures(const Report& report, const std::filesystem::path& folder);

}  // namespace vernier::bench
