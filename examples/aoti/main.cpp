// Runs a package that `smis export --format aoti` wrote, without Python:
//   ./paint spade.pt2 path/to/smis_kernels/_cpu.abi3.so BATCH HEIGHT WIDTH
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <iostream>
#include <sstream>

int main(int count, char** words) {
  if (count != 6) {
    std::cerr << "usage: paint PACKAGE.pt2 _cpu.abi3.so BATCH HEIGHT WIDTH\n";
    return 2;
  }
  using Loader = torch::inductor::AOTIModelPackageLoader;
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);  // other sizes and types are errors
  torch::NoGradGuard no_grad;
  // In Python smis_kernels defines its operators; here the package says which it calls.
  auto notes = Loader::load_metadata_from_package(words[1], "model");
  torch::Library operators(torch::Library::FRAGMENT, "smis_kernels", std::nullopt, __FILE__,
                           __LINE__);
  std::istringstream schemas(notes["smis_schemas"]);
  for (std::string line; std::getline(schemas, line);) operators.def(line);
  if (!dlopen(words[2], RTLD_NOW | RTLD_GLOBAL)) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  Loader model(words[1]);
  auto labels = torch::zeros({std::stol(words[3]), std::stol(words[4]), std::stol(words[5])}, torch::kLong);
  labels.slice(1, 0, labels.size(1) / 2).fill_(1);  // class 1 above, class 0 below
  auto picture = model.run({labels})[0];
  std::cout << picture.sizes() << " " << picture.sum({1, 2, 3}) << std::endl;
}
