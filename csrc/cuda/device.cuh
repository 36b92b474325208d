// The caller's device and stream, and what the runtime says of a launch.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fuserl::cuda {

inline void require(const char* function, cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(function) + ": CUDA must accept the launch; got " +
                             cudaGetErrorString(status) + ". An earlier kernel may have failed: rerun with "
                             "CUDA_LAUNCH_BLOCKING=1.");
}

// Makes `device` current, and the caller's again at the end of the scope.
class DeviceGuard {
 public:
  DeviceGuard(const char* function, int device) {
    require(function, cudaGetDevice(&previous_));
    if (previous_ != device) require(function, cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace fuserl::cuda
