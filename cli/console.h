// What the program says: results and JSON on stdout, progress and notes on stderr.
#pragma once

#include <nlohmann/json.hpp>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace vernier::cli {

/// A bar on stderr while it lives: "calibrating [=====>    ] 128/256  12.3 s". On a terminal only.
class Progress {
 public:
  Progress(std::string what, int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void update(int64_t done);

 private:
  std::string what_;
  int64_t total_;
  bool terminal_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point drawn_{};
};

/// One line on stderr.
void note(const std::string& line);

/// Rows of cells as aligned columns on stdout; the first row is the heading, the first column
/// left-aligned.
void print_table(const std::vector<std::vector<std::string>>& rows);

/// `value` with so many digits behind the point.
std::string fixed(double value, int digits);
/// "12.3 MB".
std::string megabytes(int64_t bytes);
/// 1234567 as "1,234,567".
std::string grouped(int64_t value);

/// The object, on stdout.
void print_json(const nlohmann::ordered_json& object);

}  // namespace vernier::cli
