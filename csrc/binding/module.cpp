// pydit._C: the only file that knows Python. It includes no torch header; tensors come as Python objects and are read
// through data_ptr() and stride(), so one build serves every torch version. Shapes, dtypes and devices were checked
// by pydit/ops before a call arrives here; outputs were allocated there too.
#include <pybind11/pybind11.h>

#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "pydit/pydit.h"

#ifdef PYDIT_WITH_SIM
#include "sim/control.h"
#include "sim/counters.h"
#endif

namespace py = pybind11;

namespace {

int64_t stride(const py::tuple& strides, int dim) { return strides[dim].cast<int64_t>(); }

void* data(py::handle tensor) { return reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>()); }

void* data_or_null(py::handle tensor) { return tensor.is_none() ? nullptr : data(tensor); }

pydit_tokens tokens(py::handle tensor) {  // [B, S, C]
  const py::tuple strides = tensor.attr("stride")();
  return {data(tensor), stride(strides, 0), stride(strides, 1)};
}

pydit_modulation modulation(py::handle tensor) {  // [B, R, C]
  const py::tuple strides = tensor.attr("stride")();
  return {data(tensor), stride(strides, 0), stride(strides, 1)};
}

pydit_heads heads(py::handle tensor) {  // [B, S, H, D]
  const py::tuple strides = tensor.attr("stride")();
  return {data(tensor), stride(strides, 0), stride(strides, 1), stride(strides, 2)};
}

pydit_heads heads_or_null(py::handle tensor) {
  return tensor.is_none() ? pydit_heads{nullptr, 0, 0, 0} : heads(tensor);
}

template <typename Params>
void set_token_shape(Params& p, py::handle x, int64_t split) {
  const py::tuple shape = x.attr("shape");
  p.batch = stride(shape, 0), p.tokens = stride(shape, 1), p.channels = stride(shape, 2);
  p.split = split < 0 ? INT64_MAX : split;  // -1: one modulation row
}

// The ops of one backend, as functions of a submodule: _C.cuda.ada_layer_norm(...), _C.sim.ada_layer_norm(...).
struct Backend {
  const char* (*last_error)();
  void (*reserve_multiprocessors)(int);
  int (*ada_layer_norm)(const pydit_ada_layer_norm_params*);
  int (*gated_residual)(const pydit_gated_residual_params*);
  int (*gated_residual_ada_layer_norm)(const pydit_gated_residual_ada_layer_norm_params*);
  int (*qk_norm_rope)(const pydit_qk_norm_rope_params*);
  int (*joint_qk_norm_rope)(const pydit_joint_qk_norm_rope_params*);
  int (*joint_attention)(const pydit_joint_attention_params*);
  int (*joint_attention_backward)(const pydit_joint_attention_backward_params*);
  int (*joint_attention_path)(const pydit_joint_attention_params*);
  int (*joint_attention_backward_path)(const pydit_joint_attention_backward_params*);
  int64_t (*joint_attention_backward_workspace)(const pydit_joint_attention_backward_params*);
  int (*second_moments)(const pydit_second_moments_params*);
  int (*second_moments_path)(const pydit_second_moments_params*);
  int64_t (*second_moments_workspace)(const pydit_second_moments_params*);
  int (*hsic_matrix)(const pydit_hsic_matrix_params*);
  int (*hsic_matrix_path)(const pydit_hsic_matrix_params*);
  int64_t (*hsic_matrix_workspace)(const pydit_hsic_matrix_params*);
  int (*grouped_linear)(const pydit_grouped_linear_params*);
  int (*grouped_linear_path)(const pydit_grouped_linear_params*);
  int64_t (*grouped_linear_workspace)(const pydit_grouped_linear_params*);
};

template <typename Params>
void call(const Backend& backend, int (*op)(const Params*), const Params& params) {
  int status;
  {
    py::gil_scoped_release unlocked;
    status = op(&params);
  }
  if (status != 0) throw std::runtime_error(backend.last_error());
}

pydit_qk_norm_rope_params norm_rope(py::handle q, py::handle k, py::handle q_weight, py::handle k_weight,
                                    py::handle cos, py::handle sin, py::handle q_out, py::handle k_out, double eps,
                                    int dtype, uintptr_t cuda_stream) {
  pydit_qk_norm_rope_params p = {};
  p.q = heads(q), p.k = heads(k), p.q_out = heads(q_out), p.k_out = heads(k_out);
  p.q_weight = data_or_null(q_weight), p.k_weight = data_or_null(k_weight);
  p.cos = static_cast<const float*>(data_or_null(cos)), p.sin = static_cast<const float*>(data_or_null(sin));
  const py::tuple shape = q.attr("shape");
  p.batch = stride(shape, 0), p.tokens = stride(shape, 1);
  p.heads = shape[2].cast<int32_t>(), p.head_dim = shape[3].cast<int32_t>();
  p.eps = static_cast<float>(eps), p.dtype = dtype, p.stream = reinterpret_cast<void*>(cuda_stream);
  return p;
}

void define_ops(py::module_ m, const Backend& backend) {
  using Tensor = py::handle;
  m.def("ada_layer_norm", [backend](Tensor x, Tensor scale, Tensor shift, Tensor out, double eps, int64_t split,
                                    int dtype, uintptr_t stream) {
    pydit_ada_layer_norm_params p = {};
    p.x = tokens(x), p.scale = modulation(scale), p.shift = modulation(shift), p.out = tokens(out);
    set_token_shape(p, x, split);
    p.eps = static_cast<float>(eps), p.dtype = dtype, p.stream = reinterpret_cast<void*>(stream);
    call(backend, backend.ada_layer_norm, p);
  });
  m.def("gated_residual",
        [backend](Tensor x, Tensor y, Tensor gate, Tensor out, int64_t split, bool exact, int dtype, uintptr_t stream) {
          pydit_gated_residual_params p = {};
          p.x = tokens(x), p.y = tokens(y), p.gate = modulation(gate), p.out = tokens(out);
          set_token_shape(p, x, split);
          p.exact = exact, p.dtype = dtype, p.stream = reinterpret_cast<void*>(stream);
          call(backend, backend.gated_residual, p);
        });
  m.def("gated_residual_ada_layer_norm",
        [backend](Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, Tensor residual, Tensor out, double eps,
                  int64_t split, int dtype, uintptr_t stream) {
          pydit_gated_residual_ada_layer_norm_params p = {};
          p.x = tokens(x), p.y = tokens(y), p.gate = modulation(gate);
          p.scale = modulation(scale), p.shift = modulation(shift);
          p.residual = tokens(residual), p.out = tokens(out);
          set_token_shape(p, x, split);
          p.eps = static_cast<float>(eps), p.dtype = dtype, p.stream = reinterpret_cast<void*>(stream);
          call(backend, backend.gated_residual_ada_layer_norm, p);
        });
  m.def("qk_norm_rope", [backend](Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,
                                  Tensor q_out, Tensor k_out, double eps, int dtype, uintptr_t stream) {
    const auto p = norm_rope(q, k, q_weight, k_weight, cos, sin, q_out, k_out, eps, dtype, stream);
    call(backend, backend.qk_norm_rope, p);
  });
  m.def("joint_qk_norm_rope", [backend](Tensor q_img, Tensor k_img, Tensor q_txt, Tensor k_txt, py::tuple weights,
                                        Tensor cos_img, Tensor sin_img, Tensor cos_txt, Tensor sin_txt, py::tuple out,
                                        double eps, int dtype, uintptr_t stream) {
    pydit_joint_qk_norm_rope_params p = {};
    p.img = norm_rope(q_img, k_img, weights[0], weights[1], cos_img, sin_img, out[0], out[1], eps, dtype, stream);
    p.txt = norm_rope(q_txt, k_txt, weights[2], weights[3], cos_txt, sin_txt, out[2], out[3], eps, dtype, stream);
    call(backend, backend.joint_qk_norm_rope, p);
  });
  m.def("joint_attention", [backend](Tensor q_img, Tensor k_img, Tensor v_img, Tensor q_txt, Tensor k_txt, Tensor v_txt,
                                     Tensor txt_lens, Tensor out_img, Tensor out_txt, Tensor lse_img, Tensor lse_txt,
                                     double scale, int dtype, uintptr_t stream) {
    pydit_joint_attention_params p = {};
    p.q_img = heads(q_img), p.k_img = heads(k_img), p.v_img = heads(v_img), p.out_img = heads(out_img);
    p.q_txt = heads_or_null(q_txt), p.k_txt = heads(k_txt), p.v_txt = heads(v_txt), p.out_txt = heads_or_null(out_txt);
    p.lse_img = static_cast<float*>(data_or_null(lse_img)), p.lse_txt = static_cast<float*>(data_or_null(lse_txt));
    p.txt_lens = static_cast<const int32_t*>(data_or_null(txt_lens));
    const py::tuple shape = q_img.attr("shape"), text = k_txt.attr("shape");
    p.batch = stride(shape, 0), p.img_tokens = stride(shape, 1), p.txt_tokens = stride(text, 1);
    p.heads = shape[2].cast<int32_t>(), p.head_dim = shape[3].cast<int32_t>();
    p.scale = static_cast<float>(scale), p.dtype = dtype, p.stream = reinterpret_cast<void*>(stream);
    call(backend, backend.joint_attention, p);
    return backend.joint_attention_path(&p);
  });
  // inputs: q_img, k_img, v_img, q_txt, k_txt, v_txt; d_inputs: their gradients. Pairs of image and text: outputs. Asks
  // `allocate` for so many bytes of workspace.
  m.def("joint_attention_backward", [backend](py::tuple inputs, Tensor txt_lens, py::tuple out, py::tuple d_out,
                                              py::tuple lse, py::tuple d_lse, py::tuple d_inputs, double scale,
                                              bool deterministic, py::function allocate, int dtype, uintptr_t stream) {
    pydit_joint_attention_backward_params p = {};
    p.q_img = heads(inputs[0]), p.k_img = heads(inputs[1]), p.v_img = heads(inputs[2]);
    p.q_txt = heads_or_null(inputs[3]), p.k_txt = heads(inputs[4]), p.v_txt = heads(inputs[5]);
    p.out_img = heads(out[0]), p.out_txt = heads_or_null(out[1]);
    p.d_out_img = heads(d_out[0]), p.d_out_txt = heads_or_null(d_out[1]);
    p.d_q_img = heads(d_inputs[0]), p.d_k_img = heads(d_inputs[1]), p.d_v_img = heads(d_inputs[2]);
    p.d_q_txt = heads_or_null(d_inputs[3]), p.d_k_txt = heads(d_inputs[4]), p.d_v_txt = heads(d_inputs[5]);
    const auto rows = [](py::handle tensor) { return static_cast<const float*>(data_or_null(tensor)); };
    p.lse_img = rows(lse[0]), p.lse_txt = rows(lse[1]), p.d_lse_img = rows(d_lse[0]), p.d_lse_txt = rows(d_lse[1]);
    p.txt_lens = static_cast<const int32_t*>(data_or_null(txt_lens));
    const py::tuple shape = inputs[0].attr("shape"), text = inputs[4].attr("shape");
    p.batch = stride(shape, 0), p.img_tokens = stride(shape, 1), p.txt_tokens = stride(text, 1);
    p.heads = shape[2].cast<int32_t>(), p.head_dim = shape[3].cast<int32_t>();
    p.scale = static_cast<float>(scale), p.dtype = dtype, p.deterministic = deterministic;
    p.stream = reinterpret_cast<void*>(stream);
    const py::object workspace = allocate(backend.joint_attention_backward_workspace(&p));
    p.workspace = data(workspace);
    call(backend, backend.joint_attention_backward, p);
    return backend.joint_attention_backward_path(&p);
  });
  // sums: xx, xy, sum_x, sum_y, sum_yy
  m.def("second_moments",
        [backend](Tensor x, Tensor y, py::tuple sums, py::function allocate, int cluster, int dtype, uintptr_t stream) {
          pydit_second_moments_params p = {};
          const py::tuple shape = x.attr("shape"), strides = x.attr("stride")();
          p.x = data(x), p.tokens = stride(shape, 0), p.dim_x = stride(shape, 1), p.stride_x = stride(strides, 0);
          if (!y.is_none()) {
            p.y = data(y), p.dim_y = stride(py::tuple(y.attr("shape")), 1);
            p.stride_y = stride(py::tuple(y.attr("stride")()), 0);
          }
          double** const outputs[5] = {&p.xx, &p.xy, &p.sum_x, &p.sum_y, &p.sum_yy};
          for (int i = 0; i < 5; ++i) *outputs[i] = static_cast<double*>(data(sums[i]));
          p.cluster = cluster, p.dtype = dtype, p.stream = reinterpret_cast<void*>(stream);
          const py::object workspace = allocate(backend.second_moments_workspace(&p));
          p.workspace = data(workspace);
          call(backend, backend.second_moments, p);
          return backend.second_moments_path(&p);
        });
  m.def("reserve_multiprocessors", backend.reserve_multiprocessors);
  m.def("hsic_matrix", [backend](py::list features, Tensor hsic, py::function allocate, int64_t gram_bytes, int dtype,
                                 uintptr_t stream) {
    pydit_hsic_matrix_params p = {};
    p.layers = static_cast<int32_t>(features.size());
    if (p.layers > PYDIT_MAX_LAYERS) throw std::invalid_argument("hsic_matrix: expected at most 128 features");
    for (int i = 0; i < p.layers; ++i) {
      const py::tuple shape = features[i].attr("shape");
      p.features[i] = data(features[i]), p.rows = stride(shape, 0), p.dim[i] = shape[1].cast<int32_t>();
      p.stride[i] = stride(py::tuple(features[i].attr("stride")()), 0);
    }
    p.hsic = static_cast<double*>(data(hsic)), p.gram_bytes = gram_bytes, p.dtype = dtype,
    p.stream = reinterpret_cast<void*>(stream);
    const py::object workspace = allocate(backend.hsic_matrix_workspace(&p));
    p.workspace = data(workspace);
    call(backend, backend.hsic_matrix, p);
    return backend.hsic_matrix_path(&p);
  });
  // linears: (x, weight, bias, residual, gate, split, norm_weight, cos, sin, head_dim, out) each
  m.def("grouped_linear", [backend](py::list linears, int activation, double eps, py::function allocate, int cluster,
                                    int parts, int dtype, uintptr_t stream) {
    pydit_grouped_linear_params p = {};
    p.count = static_cast<int32_t>(linears.size());
    if (p.count > PYDIT_MAX_LINEARS) throw std::invalid_argument("grouped_linear: expected at most 6 layers");
    for (int i = 0; i < p.count; ++i) {
      const py::tuple given = linears[i];
      const Tensor x = given[0], weight = given[1];
      pydit_linear& l = p.linear[i];
      const py::tuple shape = x.attr("shape"), features = weight.attr("shape"), strides = weight.attr("stride")();
      l.x = tokens(x), l.weight = data(weight), l.weight_stride = stride(strides, 0);
      l.bias = data_or_null(given[2]);
      if (!given[3].is_none()) l.residual = tokens(given[3]);
      if (!given[4].is_none()) l.gate = modulation(given[4]);
      const auto split = given[5].cast<int64_t>();
      l.split = split < 0 ? INT64_MAX : split;
      l.norm_weight = data_or_null(given[6]);
      l.cos = static_cast<const float*>(data_or_null(given[7]));
      l.sin = static_cast<const float*>(data_or_null(given[8]));
      l.head_dim = given[9].cast<int32_t>(), l.out = tokens(given[10]);
      p.batch = stride(shape, 0), l.tokens = stride(shape, 1), l.in_features = stride(features, 1);
      l.out_features = stride(features, 0);
    }
    p.activation = activation, p.eps = static_cast<float>(eps), p.cluster = cluster, p.parts = parts;
    p.dtype = dtype, p.stream = reinterpret_cast<void*>(stream);
    py::object workspace = py::none();
    if (const int64_t bytes = backend.grouped_linear_workspace(&p)) workspace = allocate(bytes);
    p.workspace = data_or_null(workspace);
    call(backend, backend.grouped_linear, p);
    return backend.grouped_linear_path(&p);
  });
}

#define PYDIT_BACKEND_TABLE(name)                                                                                   \
  Backend {                                                                                                         \
    pydit_##name##_last_error, pydit_##name##_reserve_multiprocessors, pydit_##name##_ada_layer_norm,               \
        pydit_##name##_gated_residual, pydit_##name##_gated_residual_ada_layer_norm, pydit_##name##_qk_norm_rope,   \
        pydit_##name##_joint_qk_norm_rope, pydit_##name##_joint_attention, pydit_##name##_joint_attention_backward, \
        pydit_##name##_joint_attention_path, pydit_##name##_joint_attention_backward_path,                          \
        pydit_##name##_joint_attention_backward_workspace, pydit_##name##_second_moments,                           \
        pydit_##name##_second_moments_path, pydit_##name##_second_moments_workspace, pydit_##name##_hsic_matrix,    \
        pydit_##name##_hsic_matrix_path, pydit_##name##_hsic_matrix_workspace, pydit_##name##_grouped_linear,       \
        pydit_##name##_grouped_linear_path, pydit_##name##_grouped_linear_workspace                                 \
  }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pydit. Use pydit.ops; nothing here checks its arguments.";
  m.attr("version") = PYDIT_VERSION;
  m.attr("cuda_archs") = PYDIT_CUDA_ARCHS;  // "" when built without nvcc
  m.attr("cuda_version") = PYDIT_CUDA_VERSION;
#ifdef PYDIT_WITH_CUDA
  define_ops(m.def_submodule("cuda", "Kernels on the GPU."), PYDIT_BACKEND_TABLE(cuda));
#endif
#ifdef PYDIT_WITH_SIM
  py::module_ sim = m.def_submodule("sim", "The same kernels in the SIMT simulator, on host memory.");
  define_ops(sim, PYDIT_BACKEND_TABLE(sim));
  sim.def("set_seed", &pydit_sim_set_seed);
  sim.def("set_threads", &pydit_sim_set_threads);
  sim.def("set_async", [](bool eager) { pydit_sim_set_async(eager); });
  sim.def("set_arch", &pydit_sim_set_arch);
  sim.def("set_device", &pydit_sim_set_device);
  sim.def("streams", [] {
    uint64_t handles[16];
    const int used = pydit_sim_streams(handles, 16);
    py::list result;
    for (int i = 0; i < used && i < 16; ++i) result.append(handles[i]);
    return result;
  });
  sim.def("run_ahead", &pydit_sim_run_ahead);
  sim.def("synchronize", [](uint64_t seed) {
    const py::gil_scoped_release release;
    return pydit_sim_synchronize(seed);
  });
  sim.def("launch_count", &pydit_sim_launch_count);
  sim.def("last_report", &pydit_sim_last_report);
  sim.def("set_race", [](bool on) { pydit_sim_set_race(on); });
  sim.attr("race_build") = pydit_sim_race_build() != 0;
  const auto by_name = [](const uint64_t (&counts)[PYDIT_SIM_COUNTERS]) {
    const char* const names[PYDIT_SIM_COUNTERS] = {"global_loaded",  "global_stored", "shared_loaded",
                                                   "shared_stored",  "tensor_ops",    "shared_requests",
                                                   "bank_conflicts", "warpgroups"};
    py::dict result;
    for (int i = 0; i < PYDIT_SIM_COUNTERS; ++i) result[names[i]] = counts[i];
    return result;
  };
  const auto counters = [by_name](const std::string& kernel) {
    uint64_t counts[PYDIT_SIM_COUNTERS];
    if (kernel.empty())
      pydit_sim_counters(counts);
    else
      pydit_sim_counters_of(kernel.c_str(), counts);
    return by_name(counts);
  };
  sim.def("counters", counters, py::arg("kernel") = "");
  sim.def("total_counters", [by_name] {
    uint64_t counts[PYDIT_SIM_COUNTERS];
    pydit_sim_counters_total(counts);
    return by_name(counts);
  });
#endif
}
