"""The list of __global__ and __device__ functions that coverage and the gates start from."""

from build_tools.device_functions import Function, device_functions

SOURCE = """\
__device__ int counter;  // no function
__device__ float declared(float x);
template <typename T>
__global__ void __launch_bounds__(kWide ? (32 * kWarps) : 64, 2)
    scale_kernel(T* x, float by) {
  if (by > 0) { x[0] *= by; }  // }
}
#ifdef PYDIT_SIM
__device__ inline int twin() { return 1; }
#else
__device__ inline int machine() { return 2; }
#endif
struct Pack {
  __device__ __forceinline__ float operator[](int i) const { return value[i]; }
};
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
#define MANY(n) \\
  __device__ void in_a_macro_##n() {}
/* __device__ void commented() {} */
"""


def test_functions_and_their_lines():
    assert device_functions(SOURCE) == [Function("scale_kernel", 4, 7, True), Function("twin", 9, 9, False),
                                        Function("operator[]", 14, 14, False), Function("from_float", 17, 19, False)]
