// Argument checks. Every message reads `<function>: <argument> must <contract>; got <value>. <what to do>`.
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "tensor_view.h"

namespace fuserl {

[[noreturn]] inline void refuse(const char* function, const std::string& contract, const std::string& got,
                                const char* advice) {
  throw std::invalid_argument(std::string(function) + ": " + contract + "; got " + got + ". " + advice);
}

inline std::string shape_text(const TensorView& view) {
  std::string text = "(";
  for (int i = 0; i < view.ndim; ++i) text += (i ? ", " : "") + std::to_string(view.shape[i]);
  return text + (view.ndim == 1 ? ",)" : ")");
}

inline std::string shape_text(std::initializer_list<std::int64_t> shape) {
  TensorView view;
  for (std::int64_t n : shape) view.shape[view.ndim++] = n;
  return shape_text(view);
}

inline void check_device(const char* function, const char* argument, const TensorView& view, Device device) {
  if (view.device != device)
    refuse(function, std::string(argument) + " must be on " + name(device), name(view.device),
           "Move it with .to(), or let the package choose the backend.");
}

inline void check_dtype(const char* function, const char* argument, const TensorView& view, DType dtype) {
  if (view.dtype != dtype)
    refuse(function, std::string(argument) + " must be " + name(dtype), name(view.dtype), "Convert it with .to().");
}

// A dense tensor of exactly this dtype, device and shape.
inline void check_dense(const char* function, const char* argument, const TensorView& view, DType dtype, Device device,
                        std::initializer_list<std::int64_t> shape) {
  check_device(function, argument, view, device);
  check_dtype(function, argument, view, dtype);
  bool same = view.ndim == static_cast<int>(shape.size());
  int i = 0;
  for (std::int64_t n : shape) same = same && view.shape[i++] == n;
  if (!same)
    refuse(function, std::string(argument) + " must have shape " + shape_text(shape), shape_text(view),
           "Reshape it, or check which tensor was passed.");
  if (!view.contiguous())
    refuse(function, std::string(argument) + " must be contiguous", "a strided view", "Call .contiguous() first.");
}

// Names arrive as numbers from Python: those of an advantage's rule,
inline void check_codes(const char* function, int baseline, int scale, int keep) {
  if (baseline < 0 || baseline > 3)
    refuse(function, "baseline must be 0 (given), 1 (mean), 2 (leave one out) or 3 (batch mean)",
           std::to_string(baseline), "Pass one of them.");
  if (scale < 0 || scale > 3)
    refuse(function, "scale must be 0 (given), 1 (group std), 2 (batch std) or 3 (sign)", std::to_string(scale),
           "Pass one of them.");
  if (keep < 0 || keep > 2)
    refuse(function, "keep must be 0 (all), 1 (positive) or 2 (negative)", std::to_string(keep), "Pass one of them.");
}

inline void check_best_of_codes(const char* function, int baseline, int scale) {
  if (baseline < 0 || baseline > 3)
    refuse(function, "baseline must be 0 to 3, a BestOfBaseline", std::to_string(baseline), "Pass one of them.");
  if (scale < 0 || scale > 2)
    refuse(function, "scale must be 0 to 2, a BestOfScale", std::to_string(scale), "Pass one of them.");
}

// the estimator of a divergence,
inline void check_kl_code(const char* function, int kl) {
  if (kl < 0 || kl > 3)
    refuse(function, "kl must be 0 (none), 1 (k1), 2 (k2) or 3 (k3)", std::to_string(kl), "Pass one of them.");
}

// the family of a policy's surrogate,
inline void check_surrogate_code(const char* function, int surrogate) {
  if (surrogate < 0 || surrogate > 2)
    refuse(function, "surrogate must be 0 (clip), 1 (weight) or 2 (gate)", std::to_string(surrogate),
           "Pass one of them.");
}

// and which divergence.
inline void check_divergence_code(const char* function, int kind) {
  if (kind < 0 || kind > 4)
    refuse(function, "kind must be 0 to 4, a DivergenceKind", std::to_string(kind), "Pass one of them.");
}

inline void check_preference_code(const char* function, int link) {
  if (link < 0 || link > 4)
    refuse(function, "link must be 0 to 4, a PreferenceLink", std::to_string(link), "Pass one of them.");
}

}  // namespace fuserl
