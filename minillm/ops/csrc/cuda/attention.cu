// The one door to all stages of attention.
#include "attention.cuh"

extern "C" {
int minillm_attention_v1(const Attention*, void*);
int minillm_attention_v2(const Attention*, void*);
int minillm_attention_v3(const Attention*, void*);
int minillm_attention_v4(const Attention*, void*);
int minillm_attention_v5(const Attention*, void*);
int minillm_attention_backward_v1(const AttentionGrad*, void*);
int minillm_attention_backward_v2(const AttentionGrad*, void*);

// Runs stage 1 to 5, or for 0 the latest that takes this shape, but not the fifth: it runs when it is asked for, until a
// Hopper GPU has run it and told its time. 1 (cudaErrorInvalidValue): the stage does not take this shape or this GPU.
int minillm_attention_forward(const Attention* a, int stage, void* stream) {
  switch (stage) {
    case 0: {
      int error = minillm_attention_v4(a, stream);
      return error == INVALID ? minillm_attention_v2(a, stream) : error;
    }
    case 1: return minillm_attention_v1(a, stream);
    case 2: return minillm_attention_v2(a, stream);
    case 3: return minillm_attention_v3(a, stream);
    case 4: return minillm_attention_v4(a, stream);
    case 5: return minillm_attention_v5(a, stream);
    default: return INVALID;
  }
}

// The same with stages 1 and 2.
int minillm_attention_backward(const AttentionGrad* grad, int stage, void* stream) {
  switch (stage) {
    case 0: {
      int error = minillm_attention_backward_v2(grad, stream);
      return error == INVALID ? minillm_attention_backward_v1(grad, stream) : error;
    }
    case 1: return minillm_attention_backward_v1(grad, stream);
    case 2: return minillm_attention_backward_v2(grad, stream);
    default: return INVALID;
  }
}
}
