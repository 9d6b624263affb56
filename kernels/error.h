// The one exception type of Vernier and the checks that throw it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace vernier {

/// Thrown for everything a user can cause: bad files, shapes, options. what() is one line that says
/// what was wrong, where (file, tensor, layer) and what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Everything streamed into one string.
template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

}  // namespace vernier

/// Throws vernier::Error with the streamed arguments unless the condition holds.
#define VERNIER_CHECK(condition, ...)                         \
  do {                                                        \
    if (!(condition)) [[unlikely]]                            \
      throw ::vernier::Error(::vernier::concat(__VA_ARGS__)); \
  } while (false)
