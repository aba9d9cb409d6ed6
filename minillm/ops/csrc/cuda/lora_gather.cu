// The doors to all stages of multi-adapter LoRA: forward is shrink and expand, backward the same two with the matrices
// in each other's place, and the sums over each adapter's rows.
#include "lora_gather.cuh"

namespace {

constexpr int FEW = 16;  // positions of a row up to which stage 2 reads its matrices again for each

template <class Product>
int run(int (*const (&stages)[4])(const Product&, void*), const Product& product, int stage, void* stream) {
  if (stage < 0 || stage > 4) return INVALID;
  if (stage) return stages[stage - 1](product, stream);
  for (int best : {product.thin.T <= FEW ? 2 : 4, 4, 3}) {
    if (int error = stages[best - 1](product, stream); error != INVALID) return error;
  }
  return INVALID;
}

Thin thin_of(const LoraGather& g) {
  return {g.rows, g.ranks, g.scale, 1, g.dtype, g.factor_dtype, g.B, g.T, g.N, g.R};
}
Factor factor_of(const Factors& a) { return {a.data, a.adapter, a.rank, 1}; }
Factor gradient_of(void* data, const LoraGather& g, int width) { return {data, int64_t{g.R} * width, width, 1}; }

// grad_scale[n]: the sum of u v over the positions and ranks of all rows that have adapter n. A warp for each adapter.
__global__ void sum_products(LoraGatherGrad grad, Thin thin) {
  int n = blockIdx.x;
  int64_t size = int64_t{thin.T} * thin.R;
  double sum = 0;
  for (int b = 0; b < thin.B; ++b) {
    if (adapter_of(thin, b).number != n || adapter_of(thin, b).rank == 0) continue;  // the same for all lanes
    for (int64_t i = b * size + lane_number(); i < (b + 1) * size; i += 32) {
      sum += double{load(grad.forward.u + i)} * load(grad.v + i);
    }
  }
  float total = warp_sum(static_cast<float>(sum));
  if (lane_number() == 0) store(grad.grad_scale + n, total);
}

}  // namespace

int lora_shrink(const Shrink& s, int stage, void* stream) {
  return run({lora_shrink_v1, lora_shrink_v2, lora_shrink_v3, lora_shrink_v4}, s, stage, stream);
}

int lora_expand(const Expand& x, int stage, void* stream) {
  return run({lora_expand_v1, lora_expand_v2, lora_expand_v3, lora_expand_v4}, x, stage, stream);
}

int lora_sum(const Sum& s, int stage, void* stream) {
  int error = stage == 0 || stage == 4 ? lora_sum_v2(s, stream) : INVALID;
  return error == INVALID && stage != 4 ? lora_sum_v1(s, stream) : error;
}

// Stages 1 to 4, or 0 for the one that is fastest for this shape. 1 (cudaErrorInvalidValue): the stage does not take
// it.
extern "C" int minillm_lora_gather(const LoraGather* g, int stage, void* stream) {
  Thin thin = thin_of(*g);
  int error = lora_shrink({thin, g->x, factor_of(g->a), g->u, g->Din, {}}, stage, stream);
  return error ? error : lora_expand({thin, g->y, g->out, factor_of(g->b), g->u, g->Dout, {}}, stage, stream);
}

extern "C" int minillm_lora_gather_backward(const LoraGatherGrad* grad, int stage, void* stream) {
  const LoraGather& g = grad->forward;
  Thin thin = thin_of(g);
  int error = lora_shrink({thin, grad->grad, factor_of(g.b), grad->v, g.Dout, {}}, stage, stream);
  if (!error && grad->grad_x.data) {
    error = lora_expand({thin, {}, grad->grad_x, factor_of(g.a), grad->v, g.Din, {}}, stage, stream);
  }
  if (!error && grad->grad_a) {
    Factor out = gradient_of(grad->grad_a, g, g.Din);
    error = lora_sum({thin, grad->v, g.x, out, nullptr, g.Din, 1, {}}, stage, stream);
  }
  if (!error && grad->grad_b) {
    Factor out = gradient_of(grad->grad_b, g, g.Dout);
    error = lora_sum({thin, g.u, grad->grad, out, nullptr, g.Dout, 1, {}}, stage, stream);
  }
  if (error || !grad->grad_scale) return error;
  return launch(sum_products, dim3(g.N), 32, 0, stream, *grad, thin);
}
