// Runs what `smis export --format aoti` wrote, without Python. To build it, with torch's own folder:
//   T=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 main.cpp -I$T/include -L$T/lib -Wl,-rpath,$T/lib -Wl,--no-as-needed \
//       -ltorch -ltorch_cpu -lc10 -ldl -o paint
//   ./paint spade.pt2 path/to/smis_kernels/_cpu.abi3.so BATCH HEIGHT WIDTH
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>

#include <iostream>
#include <sstream>

int main(int count, char** words) {
  if (count != 6) return std::cerr << "usage: paint FILE.pt2 _cpu.abi3.so BATCH HEIGHT WIDTH\n", 2;
  using Loader = torch::inductor::AOTIModelPackageLoader;
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1);  // another size or type is an error
  // Python defines the operators of smis_kernels; here the file says which it calls.
  auto notes = Loader::load_metadata_from_package(words[1], "model");
  torch::Library operators(torch::Library::FRAGMENT, "smis_kernels", std::nullopt, "", 0);
  std::istringstream schemas(notes["smis_schemas"]);
  for (std::string line; std::getline(schemas, line);) operators.def(line.c_str());
  if (!dlopen(words[2], RTLD_NOW | RTLD_GLOBAL)) return std::cerr << dlerror() << "\n", 1;
  Loader model(words[1]);
  auto labels = at::zeros({std::stol(words[3]), std::stol(words[4]), std::stol(words[5])}, at::kLong);
  labels.slice(1, 0, labels.size(1) / 2).fill_(1);  // class 1 above, class 0 below
  at::Tensor picture = model.run({labels})[0];
  std::cout.precision(9);
  std::cout << picture.sizes() << " " << picture.abs().mean().item<double>() << std::endl;
}
