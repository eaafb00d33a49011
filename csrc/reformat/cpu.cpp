// CPU implementation of a change of memory format: host.h, which other ops take too.
#include "reformat/host.h"

namespace smis {

STABLE_TORCH_LIBRARY_IMPL(smis_kernels, CPU, m) { m.impl("reformat", TORCH_BOX(&reformatted)); }

}  // namespace smis
