// What Python asks of the CPU library itself.
#include "common/isa.h"

// The instruction set that every kernel runs on, or what is wrong with SMIS_ISA.
extern "C" __attribute__((visibility("default"))) const char* smis_isa() {
  static const std::string answer = [] {
    try {
      return std::string(smis::kIsaNames[int(smis::chosen_isa())]);
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  }();
  return answer.c_str();
}
