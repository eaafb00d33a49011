// Arguments of the content digest: 32-bit words, and where the sum goes.
#pragma once
#include "common/isa.h"

SMIS_DECLARE_KERNEL(content_digest_kernel, const uint32_t* words, int64_t begin, int64_t end,
                    uint64_t* sum)
