// Integer types of labels and ids, for loops that see no torch header.
#pragma once
#include "isa.h"

namespace smis {

enum class Ids : int32_t { u8, i8, i16, u16, i32, i64 };

namespace {  // one copy for each instruction set

// Calls fn(I{}) with the type that `ids` names.
template <class F> inline void with_ids(Ids ids, F&& fn) {
  switch (ids) {
    case Ids::u8: return fn(uint8_t{});
    case Ids::i8: return fn(int8_t{});
    case Ids::i16: return fn(int16_t{});
    case Ids::u16: return fn(uint16_t{});
    case Ids::i32: return fn(int32_t{});
    case Ids::i64: return fn(int64_t{});
  }
}

}  // namespace
}  // namespace smis
