#include <unistd.h>
#include <vernier/cli/console.h>

#include <algorithm>
#include <cstdio>
#include <iostream>

namespace vernier::cli {
namespace {

// Characters of UTF-8 text, each of which takes one column.
size_t columns_of(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

}  // namespace

Progress::Progress(std::string what, int64_t total)
    : what_(std::move(what)), total_(total), terminal_(isatty(STDERR_FILENO) != 0) {
  if (terminal_) update(0);
}

Progress::~Progress() {
  if (terminal_) std::fputs("\r\033[K", stderr);
}

void Progress::update(int64_t done) {
  if (!terminal_) return;
  const auto now = std::chrono::steady_clock::now();
  if (done < total_ && now - drawn_ < std::chrono::milliseconds(100)) return;
  drawn_ = now;
  constexpr int kWidth = 30;
  const int filled = static_cast<int>(kWidth * done / std::max<int64_t>(total_, 1));
  const std::string bar = std::string(filled, '=') + std::string(kWidth - filled, ' ');
  const double seconds = std::chrono::duration<double>(now - start_).count();
  std::fprintf(stderr, "\r\033[K%s [%s] %lld/%lld  %.1f s", what_.c_str(), bar.c_str(),
               static_cast<long long>(done), static_cast<long long>(total_), seconds);
}

void note(const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); }

void print_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], columns_of(row[c]));
  }
  for (size_t r = 0; r < rows.size(); ++r) {
    std::string line;
    for (size_t c = 0; c < rows[r].size(); ++c) {
      const std::string gap(widths[c] - columns_of(rows[r][c]), ' ');
      line += c == 0 ? rows[r][c] + gap : "  " + gap + rows[r][c];
    }
    std::cout << line.substr(0, line.find_last_not_of(' ') + 1) << '\n';
    if (r == 0) {
      size_t total = 0;
      for (const size_t width : widths) total += width + 2;
      std::cout << std::string(total - 2, '-') << '\n';
    }
  }
  std::cout << std::flush;
}

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string megabytes(int64_t bytes) { return fixed(static_cast<double>(bytes) / 1e6, 1) + " MB"; }

std::string grouped(int64_t value) {
  std::string digits = std::to_string(value);
  for (auto i = static_cast<int64_t>(digits.size()) - 3; i > (value < 0 ? 1 : 0); i -= 3)
    digits.insert(static_cast<size_t>(i), ",");
  return digits;
}

void print_json(const nlohmann::ordered_json& object) {
  // What is no number in JSON becomes null, and bytes that are no UTF-8 (paths) are replaced.
  std::cout << object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << std::endl;
}

}  // namespace vernier::cli
