// Text of error messages, made by appending to a string. No stream anywhere: a compiler that links libstdc++ statically
// gives the extension stream classes of its own, which read the locale objects of the process's libstdc++ by another layout
// and crash at the first number. TORCH_CHECK formats through such a stream, so this code does not use it.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace seal {

inline std::string text(std::string_view part) { return std::string(part); }
inline std::string text(const char* part) { return part; }
inline std::string text(const std::string& part) { return part; }
inline std::string text(bool value) { return value ? "True" : "False"; }
inline std::string text(int64_t value) { return std::to_string(value); }
inline std::string text(at::ScalarType type) { return "torch." + std::string(c10::getDtypeNames(type).first); }
inline std::string text(const c10::Device& device) { return device.str(); }

// As Python's format "g".
inline std::string text(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%g", value);
  return buffer;
}

template <typename Integer>
std::string text(at::ArrayRef<Integer> values) {
  std::string list = "[";
  for (size_t n = 0; n < values.size(); ++n) list += (n == 0 ? "" : ", ") + std::to_string(values[n]);
  return list + "]";
}

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::string all;
  (all.append(text(parts)), ...);
  return all;
}

// One sentence: op, argument, what was expected, what came. Raised as ValueError in Python.
template <typename... Received>
[[noreturn]] void fail(c10::SourceLocation where, std::string_view op, std::string_view argument, const std::string& expected,
                       const Received&... received) {
  throw c10::ValueError(where, join("seal::", op, ": ", argument, " must ", expected, ", got ", received...));
}

}  // namespace seal

#define SEAL_HERE (c10::SourceLocation{__func__, __FILE__, static_cast<uint32_t>(__LINE__)})

// Raises ValueError unless `ok`; the message is formed only then.
#define SEAL_CHECK(ok, op, argument, expected, ...)                                \
  do {                                                                             \
    if (!(ok)) [[unlikely]] ::seal::fail(SEAL_HERE, op, argument, expected, __VA_ARGS__); \
  } while (false)
