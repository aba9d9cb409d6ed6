// The one file that knows torch: it gives torch our kernels as operations (namespace `minillm`), and our kernels
// torch's tensors as plain pointers. It uses torch's stable ABI only, so it compiles in a few seconds and its source
// serves later versions of torch. What torch must know beyond running them (shapes without data, gradients) is told in
// Python, in native.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "attention_decode.h"
#include "linear.h"
#include "lora.h"
#include "lora_linear.h"
#include "nf4.h"
#include "norm.h"
#include "rope.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

extern "C" {
void minillm_cpu_attention_forward(const Attention*);
void minillm_cpu_attention_backward(const AttentionGrad*);
void minillm_cpu_attention_decode(const Attention*);
void minillm_cpu_rope(const Rope*);
void minillm_cpu_rms_norm(const RmsNorm*);
void minillm_cpu_linear(const Linear*);
void minillm_cpu_lora_gather(const LoraGather*);
void minillm_cpu_lora_gather_backward(const LoraGatherGrad*);
void minillm_cpu_lora_linear(const LoraLinear*);
void minillm_cpu_lora_linear_backward(const LoraLinearGrad*);
void minillm_cpu_nf4_quantize(const Nf4Quantize*);
void minillm_cpu_nf4_dequantize(const Nf4Dequantize*);
void minillm_cpu_nf4_linear(const Nf4Linear*);

#ifdef MINILLM_CUDA
int minillm_attention_forward(const Attention*, int stage, void* stream);
int minillm_attention_backward(const AttentionGrad*, int stage, void* stream);
int minillm_attention_decode(const AttentionDecode*, int stage, void* stream);
int minillm_rope(const Rope*, int stage, void* stream);
int minillm_linear(const Linear*, int stage, void* stream);
int minillm_nf4_quantize(const Nf4Quantize*, int stage, void* stream);
int minillm_nf4_dequantize(const Nf4Dequantize*, int stage, void* stream);
int minillm_nf4_linear(const Nf4Linear*, int stage, void* stream);
int minillm_lora_gather(const LoraGather*, int stage, void* stream);
int minillm_lora_gather_backward(const LoraGatherGrad*, int stage, void* stream);
int minillm_lora_linear(const LoraLinear*, int stage, void* stream);
int minillm_lora_linear_backward(const LoraLinearGrad*, int stage, void* stream);
// Weak: where torch has no CUDA the symbol is absent, and the library must load all the same.
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

// What a kernel's loops run on: torch's threads.
void minillm_parallel(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context) {
  if (count <= 1) {
    if (count == 1) body(0, 1, context);
    return;
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}
}

namespace {

void require(bool holds, const std::string& what) { STD_TORCH_CHECK(holds, "minillm kernels: ", what); }

Dtype dtype_of(const Tensor& x) {
  require(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, "float32 or bfloat16 only");
  return x.scalar_type() == ScalarType::Float ? FLOAT32 : BFLOAT16;
}

// A tensor (B, heads, rows, features) whose features lie side by side.
Heads heads(const Tensor& x) {
  require(x.dim() == 4 && (x.stride(3) == 1 || x.size(3) == 1), "four dimensions, the last side by side in memory");
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// New memory on the device of `like`. One call of torch's C interface: 2 microseconds less than by its dispatcher.
Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     int32_t dtype) {
  int32_t device_type;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device_type,
                                                  like.get_device_index(), &made));
  return Tensor(made);
}

// (B, heads, rows, K) that lies in memory as (B, rows, heads, K): the next layer joins the heads without a copy.
Tensor empty_heads(const Tensor& like) {
  const int64_t B = like.size(0), H = like.size(1), T = like.size(2), K = like.size(3);
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided(like, {B, H, T, K}, {T * H * K, K, H * K, 1}, dtype);
}

// One float for each query of each head of q: (B, H, T).
Tensor empty_sums(const Tensor& q) {
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2);
  return empty_strided(q, {B, H, T}, {H * T, T, 1}, aoti_torch_dtype_float32());
}

Attention attention_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                         const std::optional<Tensor>& keys, bool causal, int64_t window, int64_t prefix, double scale) {
  Attention call{};
  call.q = heads(q), call.k = heads(k), call.v = heads(v), call.o = heads(o);
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  call.dtype = dtype_of(q);
  call.B = q.size(0), call.H = q.size(1), call.T = q.size(2), call.K = q.size(3);
  call.G = k.size(1), call.S = k.size(2);
  call.causal = causal, call.window = window, call.prefix = prefix, call.scale = scale;
  require(dtype_of(k) == call.dtype && dtype_of(v) == call.dtype, "q, k and v of one type");
  require(k.size(0) == call.B && v.size(0) == call.B && v.size(1) == call.G && v.size(2) == call.S &&
              k.size(3) == call.K && v.size(3) == call.K && call.G > 0 && call.H % call.G == 0,
          "q (B, H, T, K), k and v (B, G, S, K) with G a divisor of H");
  require(window == 0 || causal, "a window is of the newest keys: it goes with causal");
  if (keys) {
    require(keys->scalar_type() == ScalarType::Bool && keys->dim() == 2 && keys->size(1) == call.S &&
                (keys->size(0) == call.B || keys->size(0) == 1) && (keys->stride(1) == 1 || call.S == 1),
            "keys (B or 1, S) of bool, side by side in memory");
    call.keys = static_cast<const uint8_t*>(keys->const_data_ptr());
    call.keys_batch = keys->size(0) == 1 ? 0 : keys->stride(0);
  }
  return call;
}

#ifdef MINILLM_CUDA
// Whether the CUDA kernels run a call. Where they are emulated, for tests of this file, its tensors are the processor's.
bool on_gpu([[maybe_unused]] const Tensor& x) {
#ifdef MINILLM_EMULATED
  return true;
#else
  return x.is_cuda();
#endif
}

// Runs a launcher on x's device, in torch's current stream, and turns its cudaError into an exception.
template <class Call>
void launch(const Tensor& x, const char* name, int (*launcher)(const Call*, int, void*), const Call& call, int stage) {
#ifdef MINILLM_EMULATED
  void* stream = nullptr;
#else
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
#endif
  const int error = launcher(&call, stage, stream);
  require(error != 1, std::string(name) + ": stage " + std::to_string(stage) + " does not take these shapes or types");
  require(error == 0, std::string(name) + ": the GPU reports cudaError " + std::to_string(error));
}
#endif

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> keys, bool causal,
                                     int64_t window, int64_t prefix, double scale, [[maybe_unused]] int64_t stage) {
  Tensor o = empty_heads(q), lse = empty_sums(q);
  const Attention call = attention_call(q, k, v, o, lse, keys, causal, window, prefix, scale);
#ifdef MINILLM_CUDA
  if (q.is_cuda()) {
    // One new position: the cache is cut into parts, one for a warp, that are read at once; thousands keep a GPU busy.
    const int64_t splits = std::min<int64_t>(call.S / 64, 2048 / std::max(1, call.B * call.G));
    if (call.T == 1 && stage == 0 && splits > 1) {
      const int64_t part = 2 + call.K, rows = int64_t(call.B) * call.H;
      Tensor room = empty_strided(q, {splits, rows, part}, {rows * part, part, 1}, aoti_torch_dtype_float32());
      const AttentionDecode decode{call, static_cast<float*>(room.mutable_data_ptr()), int32_t(splits)};
      launch(q, "attention, decode", minillm_attention_decode, decode, 0);
    } else {
      launch(q, "attention", minillm_attention_forward, call, stage);
    }
    return {o, lse};
  }
#endif
  const bool few = call.T * (call.H / call.G) <= 8;
  few ? minillm_cpu_attention_decode(&call) : minillm_cpu_attention_forward(&call);
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,
                                                      std::optional<Tensor> keys, bool causal, int64_t window,
                                                      int64_t prefix, double scale) {
  Tensor grad_q = empty_heads(q), grad_k = empty_heads(k), grad_v = empty_heads(v), delta = empty_sums(q);
  const AttentionGrad call{attention_call(q, k, v, o, lse, keys, causal, window, prefix, scale),
                           heads(grad_o), heads(grad_q), heads(grad_k), heads(grad_v),
                           static_cast<float*>(delta.mutable_data_ptr())};
#ifdef MINILLM_CUDA
  if (q.is_cuda()) {
    launch(q, "attention_backward", minillm_attention_backward, call, 0);
    return {grad_q, grad_k, grad_v};
  }
#endif
  minillm_cpu_attention_backward(&call);
  return {grad_q, grad_k, grad_v};
}

// y lies in memory as (B, T, H, K), as a projection does whose heads were split.
Tensor rope(Tensor x, Tensor cos, Tensor sin) {
  Tensor y = empty_heads(x);
  const int64_t T = x.size(2), K = x.size(3);
  require(cos.scalar_type() == ScalarType::Float && sin.scalar_type() == ScalarType::Float && cos.is_contiguous() &&
              sin.is_contiguous() && cos.numel() == sin.numel() && K % 2 == 0 &&
              (cos.numel() == T * K || cos.numel() == x.size(0) * T * K),
          "tables (T, K) or (B, T, K) of float32, side by side in memory, with K even");
  const int64_t table_batch = cos.numel() == T * K ? 0 : T * K;
  const Rope call{heads(x), heads(y), static_cast<const float*>(cos.const_data_ptr()),
                  static_cast<const float*>(sin.const_data_ptr()), table_batch, dtype_of(x),
                  int32_t(x.size(0)), int32_t(x.size(1)), int32_t(T), int32_t(K)};
#ifdef MINILLM_CUDA
  if (x.is_cuda()) {
    launch(x, "rope", minillm_rope, call, 0);
    return y;
  }
#endif
  minillm_cpu_rope(&call);
  return y;
}

// Linear layers: for few rows, with adapters, in NF4.

// New memory, side by side, on the device of `like`.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  const int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_uint8();
  return empty_strided(like, sizes, strides, dtype);
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  const int64_t D = x.size(x.dim() - 1);
  require(x.is_contiguous() && weight.is_contiguous() && weight.dim() == 1 && weight.size(0) == D &&
              weight.scalar_type() == x.scalar_type(),
          "x (.., D) and weight (D) of one type, side by side in memory");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor y = empty(x, sizes, x.scalar_type());
  const RmsNorm call{x.const_data_ptr(), weight.const_data_ptr(), y.mutable_data_ptr(), D ? x.numel() / D : 0,
                     dtype_of(x),        int32_t(D),              float(eps)};
  minillm_cpu_rms_norm(&call);
  return y;
}

void adjacent(const Tensor& x, int64_t dimensions) {
  if (x.dim() != dimensions || (x.stride(dimensions - 1) != 1 && x.size(dimensions - 1) > 1 && x.numel()))
    require(false, std::to_string(dimensions) + " dimensions, the last side by side in memory");
}

// x (..., features) as a matrix: its rows, and the elements from one to the next.
struct Matrix {
  int64_t rows = 1, stride = 0;

  explicit Matrix(const Tensor& x) {
    const int64_t last = x.dim() - 1;
    if (x.numel() == 0) {
      rows = 0;
      return;
    }
    if (last < 0 || (x.stride(last) != 1 && x.size(last) > 1)) require(false, "rows that lie side by side in memory");
    for (int64_t d = last; d-- > 0;) {
      const int64_t size = x.size(d);
      if (size == 1) continue;
      if (rows == 1) stride = x.stride(d);
      if (x.stride(d) != stride * rows) require(false, "rows at one distance from each other: call .contiguous()");
      rows *= size;
    }
  }
};

std::vector<int64_t> sizes_with(const Tensor& x, int64_t features) {
  std::vector<int64_t> sizes(x.dim());
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes[d] = x.size(d);
  sizes.back() = features;
  return sizes;
}

const void* data_of(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

// What a kernel reads beside x; torch looks at one tensor only when it chooses the device.
void beside(const Tensor& x, const Tensor& other) {
  if (other.is_cuda() != x.is_cuda() || other.get_device_index() != x.get_device_index())
    require(false, "all tensors on one device");
}
void beside(const Tensor& x, const std::optional<Tensor>& other) {
  if (other) beside(x, *other);
}

// A vector beside the outputs of a linear layer.
void check_bias(const std::optional<Tensor>& bias, ScalarType type, int64_t count) {
  if (bias && (bias->dim() != 1 || bias->size(0) != count || bias->scalar_type() != type || !bias->is_contiguous()))
    require(false, "a bias (Dout) of the type of x, side by side in memory");
}

Linear linear_call(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y) {
  adjacent(weight, 2), beside(x, weight), beside(x, bias);
  const Matrix rows(x);
  Linear call{};
  call.x = x.const_data_ptr(), call.weight = weight.const_data_ptr(), call.bias = data_of(bias);
  call.y = y.mutable_data_ptr();
  call.dtype = dtype_of(x), call.M = rows.rows, call.Din = weight.size(1), call.Dout = weight.size(0);
  call.x_row = rows.stride, call.weight_row = weight.stride(0), call.y_row = call.Dout;
  check_bias(bias, x.scalar_type(), call.Dout);
  if (dtype_of(weight) != call.dtype || x.size(x.dim() - 1) != call.Din || rows.rows > 4)
    require(false, "at most 4 rows x (..., Din), and weight (Dout, Din) of the same type");
  return call;
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  Tensor y = empty(x, sizes_with(x, weight.size(0)), x.scalar_type());
  const Linear call = linear_call(x, weight, bias, y);
#ifdef MINILLM_CUDA
  if (x.is_cuda()) {
    launch(x, "linear", minillm_linear, call, 0);
    return y;
  }
#endif
  minillm_cpu_linear(&call);
  return y;
}

Tensor lora_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor a, Tensor b, double scale) {
  Tensor y = empty(x, sizes_with(x, weight.size(0)), x.scalar_type());
  Linear call = linear_call(x, weight, bias, y);
  adjacent(a, 2), adjacent(b, 2);
  call.a = a.const_data_ptr(), call.b = b.const_data_ptr(), call.a_row = a.stride(0), call.b_row = b.stride(0);
  call.factor_dtype = dtype_of(a), call.R = a.size(0), call.scale = scale;
  if (dtype_of(b) != call.factor_dtype || (call.dtype == FLOAT32 && call.factor_dtype != FLOAT32) ||
      a.size(1) != call.Din || b.size(0) != call.Dout || b.size(1) != call.R)
    require(false, "A (R, Din) and B (Dout, R) of one type, which is float32 unless x is bfloat16");
  minillm_cpu_linear(&call);
  return y;
}

Rows rows_of(const Tensor& x, int64_t B, int64_t T, int64_t features) {
  adjacent(x, 3);
  if (x.size(0) != B || x.size(1) != T || x.size(2) != features)
    require(false, "x (B, T, Din), y (B, T, Dout), A (N, R, Din) and B (N, Dout, R)");
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1)};
}

LoraGather gather_call(const Tensor& x, const Tensor& a, const Tensor& b, const std::optional<Tensor>& rows,
                       const std::optional<Tensor>& ranks, const std::optional<Tensor>& scale, const Tensor& u) {
  adjacent(a, 3);
  LoraGather call{};
  call.B = u.size(0), call.T = u.size(1), call.R = u.size(2), call.N = a.size(0), call.Din = a.size(2);
  call.Dout = b.size(1);
  call.dtype = dtype_of(x), call.factor_dtype = dtype_of(a);
  call.x = rows_of(x, call.B, call.T, call.Din);
  if (b.dim() != 3 || b.size(0) != call.N || b.size(2) != call.R || (b.stride(1) != 1 && call.Dout > 1 && b.numel()) ||
      dtype_of(b) != call.factor_dtype || (call.dtype == FLOAT32 && call.factor_dtype != FLOAT32))
    require(false, "A (N, R, Din), B (N, Dout, R) with Dout side by side, one type, float32 unless x is bfloat16");
  call.a = {a.const_data_ptr(), a.stride(0), a.stride(1)};
  call.b = {b.const_data_ptr(), b.stride(0), b.stride(2)};
  call.u = static_cast<float*>(u.mutable_data_ptr());
  const auto numbers = [](const std::optional<Tensor>& x, int64_t count) {
    if (x && (x->scalar_type() != ScalarType::Long || x->dim() != 1 || x->size(0) != count || !x->is_contiguous()))
      require(false, "rows (B) and ranks (N) of int64, side by side in memory");
    return static_cast<const int64_t*>(data_of(x));
  };
  call.rows = numbers(rows, call.B), call.ranks = numbers(ranks, call.N);
  if (!rows && call.N != call.B) require(false, "as many adapters as rows, or `rows`");
  const bool readable = !x.is_cuda();  // else the kernel checks them: reading here would wait for the GPU
  for (int64_t i = 0; readable && call.rows && i < call.B; ++i)
    if (call.rows[i] < -1 || call.rows[i] >= call.N) require(false, "rows: -1, or the number of an adapter");
  for (int64_t n = 0; readable && call.ranks && n < call.N; ++n)
    if (call.ranks[n] < 0 || call.ranks[n] > call.R) require(false, "ranks: 0 .. R");
  if (scale && (scale->scalar_type() != ScalarType::Float || scale->dim() != 1 || scale->size(0) != call.N ||
                !scale->is_contiguous()))
    require(false, "scale (N) of float32, side by side in memory");
  call.scale = static_cast<const float*>(data_of(scale));
  return call;
}

std::tuple<Tensor, Tensor> lora_gather(Tensor y, Tensor x, Tensor a, Tensor b, std::optional<Tensor> rows,
                                       std::optional<Tensor> ranks, std::optional<Tensor> scale,
                                       [[maybe_unused]] int64_t stage) {
  const int64_t B = x.size(0), T = x.size(1);
  Tensor out = empty(y, {B, T, b.size(1)}, y.scalar_type()), u = empty(y, {B, T, a.size(1)}, ScalarType::Float);
  LoraGather call = gather_call(x, a, b, rows, ranks, scale, u);
  call.y = rows_of(y, B, T, call.Dout), call.out = rows_of(out, B, T, call.Dout);
  if (dtype_of(y) != call.dtype) require(false, "x and y of one type");
#ifdef MINILLM_CUDA
  if (on_gpu(x)) {
    launch(x, "lora_gather", minillm_lora_gather, call, stage);
    return {out, u};
  }
#endif
  minillm_cpu_lora_gather(&call);
  return {out, u};
}

// What is not wanted is an empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_gather_backward(Tensor grad, Tensor x, Tensor a, Tensor b,
                                                                std::optional<Tensor> rows, std::optional<Tensor> ranks,
                                                                std::optional<Tensor> scale, Tensor u, bool need_x,
                                                                bool need_factors, [[maybe_unused]] int64_t stage) {
  LoraGatherGrad call{};
  call.forward = gather_call(x, a, b, rows, ranks, scale, u);
  const int64_t B = call.forward.B, T = call.forward.T, N = call.forward.N, R = call.forward.R;
  const int64_t Din = call.forward.Din, Dout = call.forward.Dout, some = need_factors ? N : 0;
  Tensor grad_x = empty(x, {need_x ? B : 0, T, Din}, x.scalar_type()), v = empty(x, {B, T, R}, ScalarType::Float);
  Tensor grad_a = empty(a, {some, R, Din}, a.scalar_type()), grad_scale = empty(a, {some}, ScalarType::Float);
  Tensor grad_b = empty_strided(a, {some, Dout, R}, {R * Dout, 1, std::max<int64_t>(Dout, 1)},
                                call.forward.factor_dtype == FLOAT32 ? aoti_torch_dtype_float32()
                                                                     : aoti_torch_dtype_bfloat16());
  call.grad = rows_of(grad, B, T, Dout);
  if (dtype_of(grad) != call.forward.dtype) require(false, "x and grad of one type");
  if (need_x) call.grad_x = rows_of(grad_x, B, T, Din);
  if (need_factors) {
    call.grad_a = grad_a.mutable_data_ptr(), call.grad_b = grad_b.mutable_data_ptr();
    call.grad_scale = static_cast<float*>(grad_scale.mutable_data_ptr());
  }
  call.v = static_cast<float*>(v.mutable_data_ptr());
#ifdef MINILLM_CUDA
  if (on_gpu(x)) {
    launch(x, "lora_gather_backward", minillm_lora_gather_backward, call, stage);
    return {grad_x, grad_a, grad_b, grad_scale};
  }
#endif
  minillm_cpu_lora_gather_backward(&call);
  return {grad_x, grad_a, grad_b, grad_scale};
}

LoraLinear lora_call(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& u, double scale, double dropout,
                     const std::optional<Tensor>& seed) {
  for (const Tensor* matrix : {&x, &a, &b, &u}) adjacent(*matrix, 2);
  LoraLinear call{};
  call.x = x.const_data_ptr(), call.u = static_cast<float*>(u.mutable_data_ptr());
  call.a = a.const_data_ptr(), call.b = b.const_data_ptr();
  call.x_row = x.stride(0), call.a_row = a.stride(0), call.b_row = b.stride(0);
  call.dtype = dtype_of(x), call.factor_dtype = dtype_of(a), call.scale = scale;
  call.M = x.size(0), call.Din = x.size(1), call.Dout = b.size(0), call.R = a.size(0);
  if (dtype_of(b) != call.factor_dtype || (call.dtype == FLOAT32 && call.factor_dtype != FLOAT32) ||
      a.size(1) != call.Din || b.size(1) != call.R || u.size(0) != call.M || u.size(1) != call.R)
    require(false, "x (M, Din), A (R, Din) and B (Dout, R) of one type, which is float32 unless x is bfloat16");
  require(dropout >= 0 && dropout < 1 && (dropout == 0 || seed), "a dropout of 0 to 1, and above 0 its seed");
  call.dropout = std::nearbyint(dropout * 16777216) / 16777216;  // as ops/dropout.py rounds it
  if (seed) {
    require(seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && !seed->is_cuda(),
            "a seed of int64 on the CPU");
    const uint64_t bits = *static_cast<const int64_t*>(seed->const_data_ptr());
    call.seed[0] = uint32_t(bits), call.seed[1] = uint32_t(bits >> 32);
  }
  return call;
}

// Rows (M, features) of the type of the call's x.
const void* lora_rows(const LoraLinear& call, const Tensor& x, int64_t features, int64_t& row) {
  adjacent(x, 2);
  if (x.size(0) != call.M || x.size(1) != features || dtype_of(x) != call.dtype)
    require(false, "x (M, Din), y and its gradient (M, Dout), of one type");
  row = x.stride(0);
  return x.const_data_ptr();
}

std::tuple<Tensor, Tensor> lora(Tensor y, Tensor x, Tensor a, Tensor b, double scale, double dropout,
                                std::optional<Tensor> seed, [[maybe_unused]] int64_t stage) {
  adjacent(x, 2), adjacent(y, 2);
  Tensor out = empty(y, {y.size(0), y.size(1)}, y.scalar_type()), u = empty(y, {x.size(0), a.size(0)}, ScalarType::Float);
  LoraLinear call = lora_call(x, a, b, u, scale, dropout, seed);
  call.y = lora_rows(call, y, call.Dout, call.y_row);
  call.out = out.mutable_data_ptr(), call.out_row = call.Dout;
#ifdef MINILLM_CUDA
  if (on_gpu(x)) {
    launch(x, "lora", minillm_lora_linear, call, stage);
    return {out, u};
  }
#endif
  minillm_cpu_lora_linear(&call);
  return {out, u};
}

// What is not wanted is an empty tensor. `base`: the gradient of x by the base layer, to which that of the update is
// added.
std::tuple<Tensor, Tensor, Tensor> lora_backward(Tensor grad, std::optional<Tensor> base, Tensor x, Tensor a, Tensor b,
                                                 Tensor u, double scale, double dropout, std::optional<Tensor> seed,
                                                 bool need_x, bool need_a, bool need_b,
                                                 [[maybe_unused]] int64_t stage) {
  LoraLinearGrad call{};
  LoraLinear& forward = call.forward = lora_call(x, a, b, u, scale, dropout, seed);
  const int64_t M = forward.M, R = forward.R, Din = forward.Din, Dout = forward.Dout;
  Tensor grad_x = empty(x, {need_x ? M : 0, Din}, x.scalar_type()), v = empty(x, {M, R}, ScalarType::Float);
  Tensor grad_a = empty(a, {need_a ? R : 0, Din}, a.scalar_type());
  Tensor grad_b = empty(b, {need_b ? Dout : 0, R}, b.scalar_type());
  call.grad = lora_rows(forward, grad, Dout, call.grad_row);
  if (base) call.base = lora_rows(forward, *base, Din, call.base_row);
  if (need_x) call.grad_x = grad_x.mutable_data_ptr(), call.grad_x_row = Din;
  if (need_a) call.grad_a = grad_a.mutable_data_ptr();
  if (need_b) call.grad_b = grad_b.mutable_data_ptr();
  call.v = static_cast<float*>(v.mutable_data_ptr()), call.parts = 1;
#ifdef MINILLM_CUDA
  if (on_gpu(x)) {
    // The sums over the rows are cut into parts, as many as give a GPU some 500 blocks of 64 features, 64 rows or more.
    const int64_t narrow = std::max<int64_t>(std::min(Din, Dout), 1), wide = std::max(Din, Dout);
    call.parts = std::clamp<int64_t>(std::min(32768 / narrow, M / 64), 1, 1024);
    Tensor room = empty(x, {call.parts > 1 ? call.parts : 0, R, wide}, ScalarType::Float);
    call.room = static_cast<float*>(room.mutable_data_ptr());
    launch(x, "lora_backward", minillm_lora_linear_backward, call, stage);
    return {grad_x, grad_a, grad_b};
  }
#endif
  minillm_cpu_lora_linear_backward(&call);
  return {grad_x, grad_a, grad_b};
}

// Numbers beside the codes: scales, zeros, code books.
const float* floats(const Tensor& codes, const Tensor& x, int64_t least) {
  beside(codes, x);
  if (x.scalar_type() != ScalarType::Float || !x.is_contiguous() || x.numel() < least)
    require(false, "scales, zeros and code books of float32, side by side in memory");
  return static_cast<const float*>(x.const_data_ptr());
}

Nf4 nf4_weight(const Tensor& codes, const Tensor& absmax, const std::optional<Tensor>& absmax2,
               const std::optional<Tensor>& offset, const Tensor& book, const std::optional<Tensor>& book8,
               int64_t count) {
  if (codes.scalar_type() != ScalarType::Byte || codes.dim() != 2 || !codes.is_contiguous() || !absmax.is_contiguous())
    require(false, "codes (blocks, block / 2) and scales, side by side in memory");
  beside(codes, absmax);
  const int64_t blocks = codes.size(0), block = 2 * codes.size(1);
  if (count > blocks * block || absmax.numel() != blocks) require(false, "codes and scales for all weights");
  Nf4 w{};
  w.codes = static_cast<const uint8_t*>(codes.const_data_ptr()), w.absmax = absmax.const_data_ptr();
  w.book = floats(codes, book, 512), w.count = count, w.block = block;
  if (absmax2) {
    if (absmax.scalar_type() != ScalarType::Byte || !offset || !book8)
      require(false, "double quantization has scales of 8 bits, an offset and a code book");
    w.absmax2 = floats(codes, *absmax2, (blocks + 255) / 256);
    w.offset = floats(codes, *offset, 1), w.book8 = floats(codes, *book8, 256);
  } else {
    floats(codes, absmax, blocks);
  }
  return w;
}

// Codes of a matrix with a scale and a zero (Dout, groups) for each of their rows.
Nf4 int4_weight(const Tensor& codes, const Tensor& scale, const Tensor& zero, const Tensor& book, int64_t Din) {
  if (scale.dim() != 2 || codes.dim() != 2 || scale.size(1) * 2 * codes.size(1) != Din)
    require(false, "scales (Dout, groups) and codes (Dout * groups, group / 2), where the groups fill Din");
  Nf4 w = nf4_weight(codes, scale, {}, {}, book, {}, scale.size(0) * Din);
  w.zero = floats(codes, zero, codes.size(0));
  return w;
}

std::tuple<Tensor, Tensor> nf4_quantize(Tensor weight, Tensor book, int64_t block) {
  const int64_t count = weight.numel(), blocks = (count + block - 1) / block;
  if (!weight.is_contiguous() || block < 2 || block % 2 || book.scalar_type() != ScalarType::Float ||
      book.numel() != 512 || !book.is_contiguous())
    require(false, "a weight that lies side by side in memory, an even block, and the book (256, 2)");
  beside(weight, book);
  Tensor codes = empty(weight, {blocks, block / 2}, ScalarType::Byte);
  Tensor absmax = empty(weight, {blocks}, ScalarType::Float);
  const Nf4Quantize call{weight.const_data_ptr(),
                         static_cast<uint8_t*>(codes.mutable_data_ptr()),
                         static_cast<float*>(absmax.mutable_data_ptr()),
                         static_cast<const float*>(book.const_data_ptr()),
                         count,
                         dtype_of(weight),
                         int32_t(block)};
#ifdef MINILLM_CUDA
  if (weight.is_cuda()) {
    launch(weight, "nf4_quantize", minillm_nf4_quantize, call, 0);
    return {codes, absmax};
  }
#endif
  minillm_cpu_nf4_quantize(&call);
  return {codes, absmax};
}

// The numbers (Dout, Din) of a weight in codes, of which `codes` is a part.
Tensor numbers_of(const Tensor& codes, const Nf4& weight, int64_t Dout, int64_t Din, ScalarType dtype) {
  Tensor out = empty(codes, {Dout, Din}, dtype);
  const Nf4Dequantize call{weight, out.mutable_data_ptr(), dtype_of(out)};
#ifdef MINILLM_CUDA
  if (codes.is_cuda()) {
    launch(codes, "nf4_dequantize", minillm_nf4_dequantize, call, 0);
    return out;
  }
#endif
  minillm_cpu_nf4_dequantize(&call);
  return out;
}

Tensor nf4_dequantize(Tensor codes, Tensor absmax, std::optional<Tensor> absmax2, std::optional<Tensor> offset,
                      Tensor book, std::optional<Tensor> book8, int64_t Dout, int64_t Din, ScalarType dtype) {
  return numbers_of(codes, nf4_weight(codes, absmax, absmax2, offset, book, book8, Dout * Din), Dout, Din, dtype);
}

Tensor int4_dequantize(Tensor codes, Tensor scale, Tensor zero, Tensor book, int64_t Din, ScalarType dtype) {
  return numbers_of(codes, int4_weight(codes, scale, zero, book, Din), scale.size(0), Din, dtype);
}

// y = x W^T + bias for a weight in codes, of which `codes` is a part.
Tensor product_of(const Tensor& x, const Tensor& codes, const Nf4& weight, const std::optional<Tensor>& bias,
                  int64_t Dout) {
  Tensor y = empty(x, sizes_with(x, Dout), x.scalar_type());
  const Matrix rows(x);
  const int64_t Din = x.size(x.dim() - 1);
  check_bias(bias, x.scalar_type(), Dout);
  beside(x, codes), beside(x, bias);
  Nf4Linear call{};
  call.weight = weight;
  call.x = x.const_data_ptr(), call.bias = data_of(bias), call.y = y.mutable_data_ptr();
  call.x_row = rows.stride, call.y_row = Dout, call.dtype = dtype_of(x);
  call.M = rows.rows, call.Din = Din, call.Dout = Dout;
#ifdef MINILLM_CUDA
  if (x.is_cuda()) {
    launch(x, "nf4_linear", minillm_nf4_linear, call, 0);
    return y;
  }
#endif
  if (call.M) minillm_cpu_nf4_linear(&call);
  return y;
}

Tensor nf4_linear(Tensor x, Tensor codes, Tensor absmax, std::optional<Tensor> absmax2, std::optional<Tensor> offset,
                  Tensor book, std::optional<Tensor> book8, std::optional<Tensor> bias, int64_t Dout) {
  const int64_t count = Dout * x.size(x.dim() - 1);
  return product_of(x, codes, nf4_weight(codes, absmax, absmax2, offset, book, book8, count), bias, Dout);
}

Tensor int4_linear(Tensor x, Tensor codes, Tensor scale, Tensor zero, Tensor book, std::optional<Tensor> bias) {
  return product_of(x, codes, int4_weight(codes, scale, zero, book, x.size(x.dim() - 1)), bias, scale.size(0));
}

}  // namespace

STABLE_TORCH_LIBRARY(minillm, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? keys, bool causal, int window, int prefix, float scale,"
        " int stage=0) -> (Tensor o, Tensor lse)");
  m.def("attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? keys,"
        " bool causal, int window, int prefix, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale) -> Tensor");
  m.def("lora(Tensor y, Tensor x, Tensor a, Tensor b, float scale, float dropout, Tensor? seed, int stage=0)"
        " -> (Tensor out, Tensor u)");
  m.def("lora_backward(Tensor grad, Tensor? base, Tensor x, Tensor a, Tensor b, Tensor u, float scale, float dropout,"
        " Tensor? seed, bool need_x, bool need_a, bool need_b, int stage=0)"
        " -> (Tensor grad_x, Tensor grad_a, Tensor grad_b)");
  m.def("lora_gather(Tensor y, Tensor x, Tensor a, Tensor b, Tensor? rows, Tensor? ranks, Tensor? scale, int stage=0)"
        " -> (Tensor out, Tensor u)");
  m.def("lora_gather_backward(Tensor grad, Tensor x, Tensor a, Tensor b, Tensor? rows, Tensor? ranks, Tensor? scale,"
        " Tensor u, bool need_x, bool need_factors, int stage=0)"
        " -> (Tensor grad_x, Tensor grad_a, Tensor grad_b, Tensor grad_scale)");
  m.def("nf4_quantize(Tensor weight, Tensor book, int block) -> (Tensor codes, Tensor absmax)");
  m.def("nf4_dequantize(Tensor codes, Tensor absmax, Tensor? absmax2, Tensor? offset, Tensor book, Tensor? book8,"
        " int Dout, int Din, ScalarType dtype) -> Tensor");
  m.def("nf4_linear(Tensor x, Tensor codes, Tensor absmax, Tensor? absmax2, Tensor? offset, Tensor book, Tensor? book8,"
        " Tensor? bias, int Dout) -> Tensor");
  m.def("int4_dequantize(Tensor codes, Tensor scale, Tensor zero, Tensor book, int Din, ScalarType dtype) -> Tensor");
  m.def("int4_linear(Tensor x, Tensor codes, Tensor scale, Tensor zero, Tensor book, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minillm, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora", TORCH_BOX(&lora));
  m.impl("lora_backward", TORCH_BOX(&lora_backward));
  m.impl("lora_gather", TORCH_BOX(&lora_gather));
  m.impl("lora_gather_backward", TORCH_BOX(&lora_gather_backward));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  m.impl("nf4_linear", TORCH_BOX(&nf4_linear));
  m.impl("int4_dequantize", TORCH_BOX(&int4_dequantize));
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
}

#ifdef MINILLM_CUDA
STABLE_TORCH_LIBRARY_IMPL(minillm, CUDA, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  m.impl("nf4_linear", TORCH_BOX(&nf4_linear));
  m.impl("lora", TORCH_BOX(&lora));
  m.impl("lora_backward", TORCH_BOX(&lora_backward));
  m.impl("lora_gather", TORCH_BOX(&lora_gather));
  m.impl("lora_gather_backward", TORCH_BOX(&lora_gather_backward));
  m.impl("int4_dequantize", TORCH_BOX(&int4_dequantize));
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
}
#endif
