// torch.Tensor or NumPy array -> TensorView through attributes only: no libtorch, so one build serves every torch.
#pragma once
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include "tensor_view.h"

namespace fuserl {

// Looked up once and never freed: a static destructor could run after the interpreter is gone.
struct TorchNames {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
  PyObject* dtypes[static_cast<int>(DType::other)] = {};  // in the order of DType

  TorchNames() {
    const auto torch = pybind11::module_::import("torch");
    const char* const names[] = {"float32", "float64", "bfloat16", "float16", "int64", "int32", "bool"};
    for (int i = 0; i < static_cast<int>(DType::other); ++i)
      dtypes[i] = pybind11::object(torch.attr(names[i])).release().ptr();
  }

  static const TorchNames& instance() {
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<TorchNames> names;
    return names.call_once_and_store_result([] { return TorchNames(); }).get_stored();
  }
};

inline pybind11::object owned(PyObject* result) {
  if (!result) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline void fill_sizes(std::int64_t* out, pybind11::handle tuple, int ndim) {
  for (int i = 0; i < ndim; ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple.ptr(), i));
    if (out[i] == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  }
}

inline void check_ndim(pybind11::ssize_t ndim) {
  if (ndim > TensorView::max_ndim)
    throw pybind11::value_error("fuserl: a tensor must have at most 8 dimensions; got " + std::to_string(ndim) +
                                ". Flatten it first.");
}

inline TensorView view_of_tensor(pybind11::handle tensor) {
  const TorchNames& names = TorchNames::instance();
  PyObject* const self = tensor.ptr();
  TensorView view;
  const auto shape = owned(PyObject_GetAttr(self, names.shape));
  const auto stride = owned(PyObject_CallMethodNoArgs(self, names.stride));
  check_ndim(PyTuple_Size(shape.ptr()));
  view.ndim = static_cast<int>(PyTuple_Size(shape.ptr()));
  fill_sizes(view.shape, shape, view.ndim);
  fill_sizes(view.stride, stride, view.ndim);
  const auto dtype = owned(PyObject_GetAttr(self, names.dtype));
  for (int i = 0; i < static_cast<int>(DType::other); ++i)
    if (dtype.ptr() == names.dtypes[i]) view.dtype = static_cast<DType>(i);
  if (owned(PyObject_GetAttr(self, names.is_cpu)).ptr() != Py_True) {
    const bool cuda = owned(PyObject_GetAttr(self, names.is_cuda)).ptr() == Py_True;
    view.device = cuda ? Device::cuda : Device::other;
    if (!cuda) return view;
    view.device_index = owned(PyObject_CallMethodNoArgs(self, names.get_device)).cast<int>();
  }
  view.data = PyLong_AsVoidPtr(owned(PyObject_CallMethodNoArgs(self, names.data_ptr)).ptr());
  return view;
}

inline TensorView view_of_buffer(const pybind11::buffer_info& buffer) {
  TensorView view;
  check_ndim(buffer.ndim);
  view.data = buffer.ptr;
  view.ndim = static_cast<int>(buffer.ndim);
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[i] = buffer.shape[i];
    view.stride[i] = buffer.strides[i] / buffer.itemsize;
    if (buffer.strides[i] % buffer.itemsize) throw pybind11::value_error("fuserl: strides must be whole elements");
  }
  const bool integer = buffer.format == "l" || buffer.format == "q" || buffer.format == "i";
  if (buffer.format == "f") view.dtype = DType::f32;
  if (buffer.format == "d") view.dtype = DType::f64;
  if (buffer.format == "e") view.dtype = DType::f16;
  if (buffer.format == "?") view.dtype = DType::boolean;
  if (integer) view.dtype = buffer.itemsize == 8 ? DType::i64 : DType::i32;
  return view;
}

}  // namespace fuserl

namespace pybind11::detail {

template <>
struct type_caster<fuserl::TensorView> {
  PYBIND11_TYPE_CASTER(fuserl::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (PyObject_HasAttr(source.ptr(), fuserl::TorchNames::instance().data_ptr)) {
      value = fuserl::view_of_tensor(source);
      return true;
    }
    if (!PyObject_CheckBuffer(source.ptr())) return false;
    buffer_ = reinterpret_borrow<pybind11::buffer>(source).request();
    value = fuserl::view_of_buffer(buffer_);
    return true;
  }

 private:
  buffer_info buffer_;  // keeps a NumPy array's memory in place during the call
};

}  // namespace pybind11::detail
