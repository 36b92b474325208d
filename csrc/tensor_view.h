// A tensor as kernels see it: a pointer, sizes and strides. It owns nothing.
#pragma once
#include <cstdint>

namespace fuserl {

enum class DType : int { f32, f64, bf16, f16, i64, i32, boolean, other };
enum class Device : int { cpu, cuda, other };

struct TensorView {
  static constexpr int max_ndim = 8;

  void* data = nullptr;
  DType dtype = DType::other;
  int ndim = 0;
  std::int64_t shape[max_ndim] = {};
  std::int64_t stride[max_ndim] = {};  // in elements
  Device device = Device::cpu;
  int device_index = 0;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  std::int64_t size() const {
    std::int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

  bool contiguous() const {
    std::int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return size() == 0;
      expected *= shape[i];
    }
    return true;
  }
};

inline const char* name(DType dtype) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16",
                                   "int64",   "int32",   "bool",     "another dtype"};
  return names[static_cast<int>(dtype)];
}

inline const char* name(Device device) {
  constexpr const char* names[] = {"cpu", "cuda", "another device"};
  return names[static_cast<int>(device)];
}

}  // namespace fuserl
