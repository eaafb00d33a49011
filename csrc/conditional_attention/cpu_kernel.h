// Arguments of the conditional attention: dense arrays of one layout, treated as flat.
#pragma once
#include "common/isa.h"

namespace smis {

struct ConditionalAttentionArgs {
  Element element = Element::f32;
  const void *x = nullptr, *logits = nullptr, *grad = nullptr;
  void *y = nullptr, *dx = nullptr, *dlogits = nullptr;
  double slope = 0;
  bool stream = false;  // the output is too large to stay in cache: write past it
};

}  // namespace smis

SMIS_DECLARE_KERNEL(conditional_attention_kernel, const ConditionalAttentionArgs&, int64_t begin, int64_t end)
SMIS_DECLARE_KERNEL(conditional_attention_backward_kernel, const ConditionalAttentionArgs&, int64_t begin, int64_t end)
