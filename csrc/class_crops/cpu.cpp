// class_boxes, class_crops and class_crops_backward on the CPU: allocation and the split of work.
#include <atomic>

#include "class_crops/cpu_kernel.h"
#include "class_crops/operands.h"

namespace smis {
namespace {

// Tasks worth starting a thread for, at most one per thread.
int64_t task_count(int64_t elements, int64_t rows) {
  const int64_t wanted = std::min<int64_t>(elements / 32768, torch::stable::get_num_threads());
  return std::max<int64_t>(std::min(wanted, rows), 1);
}

// One task's rows of scratch, which live in one tensor.
struct Scratch {
  int64_t bytes;
  Tensor memory;
  Scratch(int64_t tasks, const ClassCropsArgs& a, const Tensor& like)
      : bytes(class_crops_scratch(a)),
        memory(empty_of(like, {tasks * bytes}, ScalarType::Byte)) {}
  void* of(int64_t task) const {
    return static_cast<unsigned char*>(memory.mutable_data_ptr()) + task * bytes;
  }
};

Box merged(const Box& a, const Box& b) {
  if (a.y1 <= a.y0) return b;
  if (b.y1 <= b.y0) return a;
  return {std::min(a.y0, b.y0), std::max(a.y1, b.y1), std::min(a.x0, b.x0), std::max(a.x1, b.x1)};
}

Tensor class_boxes(const Tensor& image, const Tensor& semantics, int64_t num_classes) {
  ClassCropsArgs a = arguments(image, semantics, num_classes);
  Tensor out = empty_of(image, {a.N, a.C, 4}, ScalarType::Int);
  auto* boxes = static_cast<Box*>(out.mutable_data_ptr());
  const int64_t parts = task_count(a.H * a.W * a.K, a.H), row = a.C + 1;
  const Tensor partial = torch::stable::full({a.N * parts * row, 4}, 0, ScalarType::Int,
                                             std::nullopt, image.device());
  auto* found = static_cast<Box*>(partial.mutable_data_ptr());
  const Scratch scratch(a.N * parts, a, image);
  std::atomic<int64_t> unknown{0};
  std::atomic<bool> bad{false};
  parallel(a.N * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / parts, part = task % parts;
      int64_t label = 0;
      class_boxes_rows_best()(a, n, a.H * part / parts, a.H * (part + 1) / parts,
                              found + task * row, scratch.of(task), &label);
      if (label < 0 || label >= a.C) {
        unknown = label;
        bad = true;
      }
    }
  });
  if (bad)
    refuse("semantics: expected labels 0..", a.C - 1, ", got ", unknown.load(),
           "; remap unknown pixels (255 in most data sets) to the don't-care class first");
  for (int64_t n = 0; n < a.N; ++n)
    for (int64_t c = 0; c < a.C; ++c) {
      Box box = {0, 0, 0, 0};
      for (int64_t part = 0; part < parts; ++part) {
        const Box* row_boxes = found + (n * parts + part) * row;
        box = merged(box, merged(row_boxes[c], row_boxes[a.C]));
      }
      boxes[n * a.C + c] = box;
    }
  return out;
}

Tensor class_crops(const Tensor& image, const Tensor& semantics, const Tensor& boxes,
                   int64_t height, int64_t width) {
  ClassCropsArgs a = arguments(image, semantics, boxes.size(1));
  const Tensor held = crop_arguments(a, boxes, height, width);
  a.last = channels_last(image);
  Tensor out = empty_nchw(a.N, a.C * a.K, height, width, a.last, image);
  a.crops = strided(out);
  a.stream = out.numel() * int64_t(out.element_size()) >= kStreamBytes;
  const int64_t tasks = task_count(a.C * a.K * height * width, height);
  const Scratch scratch(tasks, a, image);
  parallel(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t n = 0; n < a.N; ++n)
        class_crops_rows_best()(a, n, height * task / tasks, height * (task + 1) / tasks,
                                scratch.of(task));
  });
  return out;
}

Tensor class_crops_backward(const Tensor& grad, const Tensor& semantics, const Tensor& boxes,
                            int64_t height, int64_t width, bool last) {
  const int64_t channels = grad.size(1) / std::max<int64_t>(boxes.size(1), 1);
  Tensor out = empty_nchw(grad.size(0), channels, height, width, last, grad);
  ClassCropsArgs a = arguments(out, semantics, boxes.size(1));
  const Tensor held = crop_arguments(a, boxes, grad.size(2), grad.size(3));
  a.crops = strided(grad);
  const int64_t tasks = task_count(grad.size(1) * a.out_h * a.out_w, a.H);
  const Scratch scratch(tasks, a, grad);
  parallel(tasks, 1, [&](int64_t begin, int64_t end) {
    // Interleaved rows: a small box, which is stretched most, spreads over the threads.
    for (int64_t task = begin; task < end; ++task)
      for (int64_t n = 0; n < a.N; ++n)
        for (int64_t y = task; y < a.H; y += tasks)
          class_crops_backward_row_best()(a, n, y, scratch.of(task));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("class_boxes", TORCH_BOX(&class_boxes));
  m.impl("class_crops", TORCH_BOX(&class_crops));
  m.impl("class_crops_backward", TORCH_BOX(&class_crops_backward));
}

}  // namespace
}  // namespace smis
