// Tensors as the loops see them; shared by the CPU and the CUDA launchers.
#pragma once
#include "class_crops/args.h"
#include "common/tensor.h"

namespace smis {
namespace {

Strided strided(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2),
          t.stride(3)};
}

// image (N, K, H, W); semantics: labels (N, H, W) or planes (N, C, H, W) of the image's dtype.
ClassCropsArgs arguments(const Tensor& image, const Tensor& semantics, int64_t classes) {
  ClassCropsArgs a;
  a.element = element_of(image, "class_crops");
  a.planes = semantics.scalar_type() == image.scalar_type();
  if (!a.planes) a.labels = ids_of(semantics, "semantics");
  a.N = image.size(0), a.K = image.size(1), a.H = image.size(2), a.W = image.size(3);
  a.C = classes;
  a.image = strided(image);
  const int64_t spatial = a.planes ? 2 : 1;
  if (semantics.dim() != spatial + 2 || semantics.size(0) != a.N ||
      semantics.size(spatial) != a.H || semantics.size(spatial + 1) != a.W ||
      (a.planes && semantics.size(1) != classes))
    refuse("semantics: expected labels (", a.N, ", ", a.H, ", ", a.W, ") or, in the image's dtype, "
           "planes (", a.N, ", ", classes, ", ", a.H, ", ", a.W, "), got another shape; resize them");
  a.semantics = a.planes ? strided(semantics)
                       : Strided{const_cast<void*>(semantics.const_data_ptr()),
                                 semantics.stride(0), 0, semantics.stride(1), semantics.stride(2)};
  return a;
}

// Adds the boxes and the size of the crops; the tensor returned keeps the boxes alive.
Tensor crop_arguments(ClassCropsArgs& a, const Tensor& boxes, int64_t height, int64_t width) {
  if (boxes.scalar_type() != ScalarType::Int || boxes.dim() != 3 || boxes.size(0) != a.N ||
      boxes.size(2) != 4)
    refuse("boxes: expected int32 (", a.N, ", C, 4), got another shape or dtype; take them from "
           "class_boxes");
  const Tensor held = torch::stable::contiguous(boxes);
  a.boxes = static_cast<const Box*>(held.const_data_ptr());
  a.out_h = height;
  a.out_w = width;
  return held;
}

}  // namespace
}  // namespace smis
