// Reading a Hugging Face config.json field by field, with errors that name the field.
#pragma once

#include <vernier/kernels/error.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace vernier {

class ConfigReader {
 public:
  /// Throws Error unless the configuration is a JSON object.
  explicit ConfigReader(const nlohmann::json& json) : json_(json) {
    VERNIER_CHECK(json.is_object(), "the configuration is not a JSON object");
  }

  /// A count of 1 to 2^31. Throws Error when it is missing without a default, no integer or out of
  /// range.
  int64_t size(const char* field, std::optional<int64_t> otherwise = std::nullopt) const {
    const nlohmann::json* value = find(field);
    if (!value && otherwise) return *otherwise;
    VERNIER_CHECK(value, "the configuration has no field '", field, "'");
    VERNIER_CHECK(value->is_number_integer() && *value >= 1 && *value <= (int64_t{1} << 31), field,
                  " must be a positive integer, not ", value->dump());
    return value->get<int64_t>();
  }

  /// A finite positive number.
  double number(const char* field, double otherwise) const {
    const nlohmann::json* value = find(field);
    if (!value) return otherwise;
    VERNIER_CHECK(
        value->is_number() && value->get<double>() > 0 && std::isfinite(value->get<double>()),
        field, " must be a positive number, not ", value->dump());
    return value->get<double>();
  }

  bool flag(const char* field, bool otherwise) const {
    const nlohmann::json* value = find(field);
    if (!value) return otherwise;
    VERNIER_CHECK(value->is_boolean(), field, " must be true or false, not ", value->dump());
    return value->get<bool>();
  }

  /// One of the names that are implemented.
  std::string one_of(const char* field, std::initializer_list<const char*> names,
                     const char* otherwise) const {
    const nlohmann::json* value = find(field);
    if (!value) return otherwise;
    std::string known;
    for (const char* name : names) {
      if (*value == name) return name;
      known += concat(known.empty() ? "" : ", ", name);
    }
    throw Error(concat(field, " ", value->dump(), " is not implemented (", known, ")"));
  }

  /// A list of names; empty where it is missing.
  std::vector<std::string> names(const char* field) const {
    const nlohmann::json* value = find(field);
    if (!value) return {};
    const bool fits = value->is_array() && std::all_of(value->begin(), value->end(),
                                                       [](const auto& v) { return v.is_string(); });
    VERNIER_CHECK(fits, field, " must be a list of names, not ", value->dump());
    return value->get<std::vector<std::string>>();
  }

  bool has(const char* field) const { return find(field) != nullptr; }

  /// The object of a field, empty where it is missing or null.
  nlohmann::json object(const char* field) const {
    const nlohmann::json* value = find(field);
    if (!value) return nlohmann::json::object();
    VERNIER_CHECK(value->is_object(), field, " must be an object, not ", value->dump());
    return *value;
  }

  /// Throws Error when the field is there with another value: one that this program does not
  /// implement.
  template <typename T>
  void require(const char* field, const T& value) const {
    const nlohmann::json* found = find(field);
    VERNIER_CHECK(!found || *found == value, field, " ", found->dump(), " is not implemented");
  }

 private:
  const nlohmann::json* find(const char* field) const {
    const auto found = json_.find(field);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }

  const nlohmann::json& json_;
};

}  // namespace vernier
