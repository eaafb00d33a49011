// Numbering: distinct per-pixel vectors, and distinct 3x3 windows of an integer map. Keys of windows
// are exact (three 21-bit ids), those of vectors exact or verified, so nothing is assumed of a hash.
#include <cstring>

#include "common/rows.h"
#include "label_windows/cpu_kernel.h"
#include "label_windows/check.h"

namespace smis {
namespace {

// Open addressing over scratch memory; ids count from 1 in order of first appearance.
class Numbering {
 public:
  Numbering(const Tensor& like, int64_t expected) {
    int64_t capacity = 64;
    for (shift_ = 58; capacity < 2 * expected; --shift_) capacity *= 2;
    mask_ = uint64_t(capacity - 1);
    slots_ = empty_of(like, {capacity, 2}, ScalarType::Long);
    data_ = reinterpret_cast<uint64_t*>(slots_.mutable_data_ptr());
    std::memset(data_, 0, size_t(capacity) * 16);
  }
  // The id of a key (never 0); `fresh` tells whether it is new.
  int32_t operator()(uint64_t key, bool& fresh) {
    uint64_t i = (key * kHashFactor) >> shift_;  // the top bits depend on all of the key's
    while (data_[2 * i] != 0 && data_[2 * i] != key) i = (i + 1) & mask_;
    fresh = data_[2 * i] == 0;
    if (fresh) {
      data_[2 * i] = key;
      data_[2 * i + 1] = uint64_t(++count_);
    }
    return int32_t(data_[2 * i + 1]);
  }
  int64_t count() const { return count_; }

 private:
  Tensor slots_;
  uint64_t* data_;
  uint64_t mask_;
  int shift_;
  int64_t count_ = 0;
};

// (N, H, W) int32 ids from 1, 0 outside -> window ids (N, H, W) from 1, and windows (V + 1, 9) whose row 0
// is the outside. More than `limit` windows, or an id that does not fit a key: zeros and an empty
// (0, 9).
std::tuple<Tensor, Tensor> number_windows(const Tensor& map, int64_t limit) {
  const int64_t N = map.size(0), H = map.size(1), W = map.size(2), P = H * W;
  const Tensor dense = torch::stable::contiguous(map);
  const int32_t* in = dense.const_data_ptr<int32_t>();
  limit = std::max<int64_t>(std::min(limit, std::min(kMaxIds, N * P)), 0);
  int32_t least = 1, most = 0;
  for (int64_t i = 0; i < N * P; ++i) {
    least = std::min(least, in[i]);
    most = std::max(most, in[i]);
  }
  check_window_id(least);
  Tensor index = empty_of(map, {N, H, W}, ScalarType::Int);
  Tensor rows = empty_of(map, {N, H, W}, ScalarType::Int);
  Tensor first = empty_of(map, {limit + 1}, ScalarType::Long);  // where a window was first seen
  const auto none = [&] {
    torch::stable::zero_(index);
    return std::make_tuple(index, empty_of(map, {0, 9}, ScalarType::Int));
  };
  if (most > kMaxIds) return none();
  int32_t *out = index.mutable_data_ptr<int32_t>(), *row = rows.mutable_data_ptr<int32_t>();
  int64_t* seen = first.mutable_data_ptr<int64_t>();

  Numbering horizontal(map, std::min(N * P, kMaxIds));
  bool fresh = false;
  for (int64_t line = 0; line < N * H; ++line) {
    const int32_t* s = in + line * W;
    uint64_t last = 0;
    for (int64_t x = 0; x < W; ++x) {
      const uint64_t key = triple(x > 0 ? s[x - 1] : 0, s[x], x + 1 < W ? s[x + 1] : 0);
      row[line * W + x] = key == last ? row[line * W + x - 1] : horizontal(key, fresh);
      last = key;
    }
    if (horizontal.count() >= kMaxIds) return none();
  }
  Numbering windows(map, limit + W);
  for (int64_t line = 0; line < N * H; ++line) {
    const int64_t y = line % H;
    const int32_t* r = row + line * W;
    uint64_t last = 0;
    for (int64_t x = 0; x < W; ++x) {
      const uint64_t key = triple(y > 0 ? r[x - W] : 0, r[x], y + 1 < H ? r[x + W] : 0);
      if (key == last) {
        out[line * W + x] = out[line * W + x - 1];
        continue;
      }
      const int32_t id = windows(key, fresh);
      if (id > limit) return none();
      if (fresh) seen[id] = line * W + x;
      out[line * W + x] = id;
      last = key;
    }
  }
  const int64_t V = windows.count();
  Tensor table = empty_of(map, {V + 1, 9}, ScalarType::Int);
  int32_t* t = table.mutable_data_ptr<int32_t>();
  std::fill(t, t + 9, 0);
  for (int64_t v = 1; v <= V; ++v) {
    const int64_t at = seen[v], line = at / W, y = line % H, x = at % W;
    for (int64_t k = 0; k < 9; ++k) {
      const int64_t dy = k / 3 - 1, dx = k % 3 - 1;
      const bool inside = y + dy >= 0 && y + dy < H && x + dx >= 0 && x + dx < W;
      t[v * 9 + k] = inside ? in[at + dy * W + dx] : 0;
    }
  }
  return {index, table};
}

int64_t chunks_of(const VectorKeysArgs& a) { return a.N * ((a.P + kKeyChunk - 1) / kKeyChunk); }

// The vectors at the given pixels, as (count + 1, K) doubles with a zero row 0.
Tensor collect(const Tensor& input, const std::vector<int64_t>& first) {
  const int64_t K = input.size(1), P = input.size(2) * input.size(3), W = input.size(3);
  Tensor wide = empty_of(input, {int64_t(first.size()), K}, ScalarType::Double);
  torch::stable::zero_(wide);
  for (size_t s = 1; s < first.size(); ++s) {
    const int64_t n = first[s] / P, p = first[s] % P;
    Tensor pixel = torch::stable::select(
        torch::stable::select(torch::stable::select(input, 0, n), 1, p / W), 1, p % W);
    Tensor row = torch::stable::select(wide, 0, int64_t(s));
    torch::stable::copy_(row, pixel);
  }
  return wide;
}

// Distinct per-pixel vectors of (N, K, H, W): symbols (N, H, W) int32 from 1 in order of first
// appearance, and the vectors (S + 1, K) in the input's dtype with a zero row 0 for the outside.
// Zeros and empty vectors (0, K): more than `limit` of them, or NaN.
std::tuple<Tensor, Tensor> number_vectors(const Tensor& input, int64_t limit) {
  VectorKeysArgs a;
  a.element = element_of(input, "number_vectors");
  const int64_t H = input.size(2), W = input.size(3);
  const Tensor x = H > 1 && W > 1 && input.stride(2) != W * input.stride(3)
                       ? torch::stable::contiguous(input) : input;
  a.data = x.const_data_ptr();
  a.N = x.size(0), a.K = x.size(1), a.P = H * W;
  a.stride_n = x.stride(0), a.stride_k = x.stride(1), a.stride_p = x.stride(W > 1 ? 3 : 2);
  const int64_t total = a.N * a.P, chunks = chunks_of(a);
  Tensor symbols = empty_of(x, {a.N, H, W}, ScalarType::Int);
  Tensor keys = empty_of(x, {total}, ScalarType::Long);
  Tensor flags = empty_of(x, {chunks}, ScalarType::Byte);
  a.keys = reinterpret_cast<uint64_t*>(keys.mutable_data_ptr());
  a.flags = flags.mutable_data_ptr<uint8_t>();
  int32_t* out = symbols.mutable_data_ptr<int32_t>();
  const auto none = [&] {
    torch::stable::zero_(symbols);
    return std::make_tuple(symbols, empty_of(x, {0, a.K}, x.scalar_type()));
  };
  const auto any_flag = [&](uint8_t bit) {
    return std::any_of(a.flags, a.flags + chunks, [=](uint8_t f) { return (f & bit) != 0; });
  };
  const auto run = [&](auto kernel) {
    parallel(chunks, 1, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  };

  a.exact = a.K < 256;  // squares of channel numbers stay exact in the kernel's fp32 sums
  if (a.exact) {
    run(vector_keys_kernel_best());
    if (any_flag(2)) return none();
    a.exact = !any_flag(1);
  }
  if (!a.exact) run(vector_keys_kernel_best());
  Numbering number(x, std::min(total, limit) + 1);
  std::vector<int64_t> first{0};
  bool fresh = false;
  for (int64_t i = 0; i < total; ++i) {
    if (i > 0 && a.keys[i] == a.keys[i - 1]) {
      out[i] = out[i - 1];
      continue;
    }
    out[i] = number(a.keys[i], fresh);
    if (fresh) first.push_back(i);
    if (number.count() > limit) return none();
  }
  Tensor wide = collect(x, first);
  if (!a.exact) {
    a.symbols = out;
    a.vectors = wide.const_data_ptr<double>();
    run(verify_vectors_kernel_best());
    if (any_flag(1)) return none();  // NaN, or two vectors with one hash
  }
  return {symbols, torch::stable::to(wide, x.scalar_type())};
}

// Rows that differ, found by hash and comparison: open addressing over their numbers.
class Distinct {
 public:
  Distinct(const Tensor& like, int64_t most) {
    int64_t capacity = 16;
    for (shift_ = 60; capacity < 2 * most; --shift_) capacity *= 2;
    mask_ = uint64_t(capacity - 1);
    slots_ = empty_of(like, {capacity}, ScalarType::Int);
    data_ = slots_.mutable_data_ptr<int32_t>();
    std::fill(data_, data_ + capacity, -1);
  }
  // The number of the row that `same` finds equal, or `next`, which is then the row's own.
  template <class F> int32_t operator()(uint64_t hash, int32_t next, const F& same) {
    uint64_t i = (hash * kHashFactor) >> shift_;
    while (data_[i] >= 0 && !same(data_[i])) i = (i + 1) & mask_;
    if (data_[i] < 0) data_[i] = next;
    return data_[i];
  }

 private:
  Tensor slots_;
  int32_t* data_;
  uint64_t mask_;
  int shift_;
};

// Vectors (S + 1, K), 3x3 windows (V + 1, 9) of their rows, and the channels [begin, end) that each of G
// groups reads (G, 2) -> the numbering that each group takes (G), of which there are as many as groups
// that tell other symbols apart; and of each numbering the number of every window (V + 1), its own
// windows (R + 1, 9), by the first of equal symbols, zero beyond its count, and that count.
std::tuple<Tensor, Tensor, Tensor, Tensor> group_windows(const Tensor& vectors, const Tensor& windows,
                                                         const Tensor& ranges) {
  const Tensor wide = torch::stable::contiguous(torch::stable::to(vectors, ScalarType::Double)),
               w = torch::stable::contiguous(windows), r = torch::stable::contiguous(ranges);
  const int64_t S = wide.size(0), K = wide.size(1), V = w.size(0), G = r.size(0);
  check_rows("windows", w, S);
  const double* value = wide.const_data_ptr<double>();
  const int32_t* in = w.const_data_ptr<int32_t>();
  const int64_t* range = r.const_data_ptr<int64_t>();
  Tensor first = empty_of(w, {G, S}, ScalarType::Int);  // of the symbols that a group finds equal
  int32_t* found = first.mutable_data_ptr<int32_t>();
  parallel(G, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t from = range[2 * g], to = range[2 * g + 1];
      Distinct symbols(w, S);
      for (int64_t s = 0; s < S; ++s) {
        const double* x = value + s * K;
        uint64_t hash = kHashSeed;
        for (int64_t k = from; k < to; ++k) {
          if (x[k] == 0) continue;  // of either sign
          uint64_t bits;
          std::memcpy(&bits, x + k, sizeof(bits));
          hash = mix(mix(hash, uint64_t(k)), bits);
        }
        found[g * S + s] = symbols(hash, int32_t(s), [&](int32_t other) {
          return std::equal(x + from, x + to, value + other * K + from);
        });
      }
    }
  });
  Tensor kinds = empty_of(w, {G}, ScalarType::Int);
  int32_t* kind = kinds.mutable_data_ptr<int32_t>();
  std::vector<int64_t> group_of;  // of each numbering its first group
  Distinct partitions(w, G);
  for (int64_t g = 0; g < G; ++g) {
    const int32_t* names = found + g * S;
    uint64_t hash = kHashSeed;
    for (int64_t s = 0; s < S; ++s) hash = mix(hash, uint64_t(names[s]));
    const int32_t next = int32_t(group_of.size());
    kind[g] = partitions(hash, next, [&](int32_t other) {
      return std::equal(names, names + S, found + group_of[size_t(other)] * S);
    });
    if (kind[g] == next) group_of.push_back(g);
  }
  const int64_t numberings = int64_t(group_of.size());
  Tensor ids = empty_of(w, {numberings, V}, ScalarType::Int);
  Tensor counts = empty_of(w, {numberings}, ScalarType::Int);
  Tensor rows = empty_of(w, {numberings, V, 9}, ScalarType::Int);
  int32_t *id = ids.mutable_data_ptr<int32_t>(), *count = counts.mutable_data_ptr<int32_t>(),
          *row = rows.mutable_data_ptr<int32_t>();
  parallel(numberings, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int32_t* names = found + group_of[size_t(n)] * S;
      int32_t* own = row + n * V * 9;
      Distinct numbers(w, V);
      int32_t next = 0;
      for (int64_t v = 0; v < V; ++v) {
        int32_t* to = own + int64_t(next) * 9;  // kept if it is new
        uint64_t hash = kHashSeed;
        for (int64_t k = 0; k < 9; ++k) {
          to[k] = names[in[v * 9 + k]];
          hash = mix(hash, uint64_t(to[k]));
        }
        // Row 0 is the outside of the image, which no window equals.
        const int32_t number = v == 0 ? 0 : numbers(hash, next, [&](int32_t other) {
          return std::equal(to, to + 9, own + int64_t(other) * 9);
        });
        id[n * V + v] = number;
        if (number == next) ++next;
      }
      count[n] = next - 1;
    }
  });
  const int64_t most = numberings == 0 ? 1 : 1 + *std::max_element(count, count + numberings);
  Tensor own = empty_of(w, {numberings, most, 9}, ScalarType::Int);
  int32_t* out = own.mutable_data_ptr<int32_t>();
  for (int64_t n = 0; n < numberings; ++n) {
    int32_t* end = std::copy_n(row + n * V * 9, (count[n] + 1) * 9, out + n * most * 9);
    std::fill(end, out + (n + 1) * most * 9, 0);
  }
  return {kinds, ids, own, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) {
  m.impl("number_vectors", TORCH_BOX(&number_vectors));
  m.impl("number_windows", TORCH_BOX(&number_windows));
  m.impl("group_windows", TORCH_BOX(&group_windows));
}

}  // namespace smis
