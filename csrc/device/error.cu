// The per-thread error text behind pydit_<backend>_last_error().
#include "device/check.h"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

char* error_buffer() {
  static thread_local char buffer[kErrorBytes] = "";
  return buffer;
}

}  // namespace pydit::PYDIT_BACKEND

extern "C" const char* PYDIT_ENTRY(last_error)(void) { return pydit::PYDIT_BACKEND::error_buffer(); }
