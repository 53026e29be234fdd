// Rank the catalog of an artifact for histories, with libtorch alone: one history a line on standard input, vocabulary
// indices separated by blanks, oldest first; one line of "index:score" a history on standard output.
//
//   cmake -S docs/consumers -B build -DCMAKE_PREFIX_PATH="$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
//   cmake --build build && echo "3 14 15" | build/top_k ARTIFACT_DIR 10
#include <torch/script.h>

#include <iostream>
#include <sstream>

int main(int argc, char** argv) try {
  if (argc != 3) throw std::runtime_error("usage: top_k ARTIFACT_DIR K < histories");
  const std::string folder = argv[1];
  torch::jit::Module model = torch::jit::load(folder + "/model.pt");
  model.get_method("open_items")({folder});

  std::vector<int64_t> item_ids, lengths;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream history(line);
    const size_t before = item_ids.size();
    for (int64_t item; history >> item;) item_ids.push_back(item);
    lengths.push_back(item_ids.size() - before);
  }
  torch::NoGradGuard no_grad;
  const auto best = model.get_method("top_k")({torch::tensor(item_ids), torch::tensor(lengths), int64_t{std::stol(argv[2])}, true}).toTuple();
  const auto ids = best->elements()[0].toTensor(), scores = best->elements()[1].toTensor();
  for (int64_t user = 0; user < ids.size(0); ++user, std::cout << '\n')
    for (int64_t place = 0; place < ids.size(1) && ids[user][place].item<int64_t>() >= 0; ++place)
      std::cout << (place ? " " : "") << ids[user][place].item<int64_t>() << ':' << scores[user][place].item<float>();
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return 1;
}
