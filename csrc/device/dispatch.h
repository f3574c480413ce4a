// From a run-time dtype to a compile-time type: dispatch_dtype(op, dtype, [&](auto tag) { using T = typename
// decltype(tag)::type; ... }). An unknown value is an error that names it.
#pragma once

#include "device/check.h"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename Function>
int dispatch_dtype(const char* op, int32_t dtype, Function&& function) {
  switch (dtype) {
    case PYDIT_FLOAT32:
      return function(TypeTag<float>{});
    case PYDIT_FLOAT16:
      return function(TypeTag<__half>{});
    case PYDIT_BFLOAT16:
      return function(TypeTag<__nv_bfloat16>{});
    default:
      return bad_argument("%s: dtype: expected float32 (0), float16 (1) or bfloat16 (2), got %d", op, dtype);
  }
}

}  // namespace pydit::PYDIT_BACKEND
