"""The report on the kernels' coverage, on made-up counters. test_sanitizers.py measures the real ones."""

from build_tools import cmake, coverage

KERNEL = "__global__ void k(int* x) {\n  if (*x > 0)\n    *x = 1;\n}\n"
DEVICE = "__device__ int f() { return 1; }\n"


def _report(kernel, device):
    return coverage.report({"csrc/kernels/a/k.cu": kernel, "csrc/device/f.cuh": device},
                           {"csrc/kernels/a/k.cu": KERNEL, "csrc/device/f.cuh": DEVICE})


def test_everything_executed():
    text, good = _report({1: 2, 2: 2, 3: 1}, {1: 5})
    assert good and "100.0 %" in text and "never" not in text


def test_a_line_not_executed_is_named_and_fails():
    text, good = _report({1: 2, 2: 2, 3: 0}, {1: 5})
    assert not good and "  66.7 %  3\n" in text and "csrc/kernels                                      3    66.7 %  below 95 %" in text


def test_a_function_that_nothing_instantiates_fails():
    text, good = _report({1: 2, 2: 2, 3: 1}, {})
    assert not good and "never executed: csrc/device/f.cuh:1: f" in text
    text, good = coverage.report({}, {"csrc/kernels/a/k.cu": KERNEL})
    assert not good and "never executed: csrc/kernels/a/k.cu:1: k" in text


def test_counts_of_instances_and_objects_add_up():
    def of(count):
        return {"current_working_directory": str(cmake.ROOT), "files": [
            {"file": "csrc/kernels/a/k.cu", "lines": [{"line_number": 3, "count": count}, {"line_number": 3, "count": 1}]},
            {"file": "csrc/sim/launch.h", "lines": [{"line_number": 1, "count": 9}]},
            {"file": "/usr/include/stdio.h", "lines": [{"line_number": 1, "count": 9}]}]}

    assert coverage.merge([of(0), of(4)]) == {"csrc/kernels/a/k.cu": {3: 6}}


def test_ranges():
    assert coverage.ranges([7, 1, 2, 3]) == "1-3, 7" and coverage.ranges([]) == ""
