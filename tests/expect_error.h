// Expecting a vernier::Error, and what its message says.
#pragma once

#include <gtest/gtest.h>
#include <vernier/kernels/error.h>

#include <cstring>
#include <exception>
#include <functional>
#include <string>

namespace vernier::testing {

/// The message of the Error that `action` throws, one line of readable length; empty when it throws
/// none. Another exception is a failure.
inline std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    EXPECT_LT(std::strlen(error.what()), 2000u);
    return error.what();
  } catch (const std::exception& error) {
    const std::string text = error.what();
    ADD_FAILURE() << "no vernier::Error but: " << text.substr(0, text.find('\n'));
  }
  return "";
}

inline ::testing::AssertionResult contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "no '" << part << "' in '" << text << "'";
}

}  // namespace vernier::testing

/// As in EXPECT_CONTAINS(message_of([&] { f(); }), "what was wrong").
#define EXPECT_CONTAINS(text, part) EXPECT_TRUE(::vernier::testing::contains(text, part))
