// libtorch_app DIR: swaps tensors to a drive and back, and trains a small model
// with AdamW's state on the drive.
//
// libtorch_app --resume DIR: makes ten steps and commits them. The next call
// goes on from there.

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/variable.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/tensor/offloaded_adamw.h"
#include "torch_ext/tensor/tensor_swapper.h"

namespace {

int failures = 0;

void check(bool good, const char* what) {
  std::printf("%-56s %s\n", what, good ? "ok" : "FAILED");
  if (!good) ++failures;
}

void swap_tensors(const std::string& directory) {
  torch_ext::TensorSwapper swapper({.store = {.directory = directory}});
  const at::Tensor base = at::randn({1000, 3000});
  const std::vector<std::pair<std::string, at::Tensor>> tensors = {
      {"contiguous", base},         {"view", base.slice(1, 5, 9)},
      {"transposed", base.t()},     {"bfloat16", base.to(at::kBFloat16)},
      {"empty", at::empty({0, 4})}, {"scalar", at::scalar_tensor(3.5)}};
  for (const auto& [key, tensor] : tensors) swapper.swap_out(key, tensor);
  for (const auto& [key, tensor] : tensors) {
    check(at::equal(swapper.swap_in(key).result(), tensor),
          ("swap: " + key).c_str());
  }
  try {
    swapper.swap_in("nothing");
    check(false, "swap: an unknown key is an error");
  } catch (const torch_ext::KeyError& error) {
    check(true, error.what());
  }
  swapper.close();
}

std::vector<at::Tensor> make_parameters() {
  at::manual_seed(1);
  return {at::randn({64, 300}).div_(8).set_requires_grad(true),
          at::zeros({300}).set_requires_grad(true),
          at::randn({300, 7}).div_(17).set_requires_grad(true)};
}

at::Tensor loss_of(const std::vector<at::Tensor>& p, const at::Tensor& x) {
  const at::Tensor y = at::addmm(p[1], x, p[0]).relu().mm(p[2]);
  return (y - x.slice(1, 0, 7)).square().mean();
}

void train(const std::string& directory) {
  constexpr int kSteps = 30;
  const at::Tensor x = at::randn({32, 64});

  const std::vector<at::Tensor> parameters = make_parameters();
  torch_ext::OffloadedAdamW optimizer(
      parameters, torch_ext::OffloadedAdamWOptions(1e-2).weight_decay(0.1),
      {.nvme_path = directory, .host_memory = 1 << 20});
  double first = 0;
  double last = 0;
  for (int step = 0; step < kSteps; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss = loss_of(parameters, x);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }

  // Does the same by hand, in memory.
  std::vector<at::Tensor> reference = make_parameters();
  std::vector<at::Tensor> averages, squares, steps;
  for (const at::Tensor& p : reference) {
    averages.push_back(at::zeros_like(p.detach()));
    squares.push_back(at::zeros_like(p.detach()));
    steps.push_back(at::scalar_tensor(0.0));
  }
  for (int step = 0; step < kSteps; ++step) {
    loss_of(reference, x).backward();
    const c10::NoGradGuard no_grad;
    std::vector<at::Tensor> gradients;
    for (at::Tensor& p : reference) {
      gradients.push_back(p.grad().clone());
      p.mutable_grad().reset();
    }
    for (at::Tensor& count : steps) count.add_(1);
    at::_fused_adamw_(reference, gradients, averages, squares, {}, steps, 1e-2,
                      0.9, 0.999, 0.1, 1e-8, /*amsgrad=*/false,
                      /*maximize=*/false);
  }

  std::printf("loss %.6f -> %.6f\n", first, last);
  check(last < first, "train: the loss falls");
  bool equal = true;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    equal = equal && at::equal(parameters[i], reference[i]);
  }
  check(equal, "train: equal to the bit to at::_fused_adamw_ in memory");
  optimizer.close();
  const auto stats = optimizer.stats();
  std::printf("state: %llu bytes read, %llu written, %llu of host memory\n",
              static_cast<unsigned long long>(stats.bytes_read),
              static_cast<unsigned long long>(stats.bytes_written),
              static_cast<unsigned long long>(stats.host_bytes_peak));
}

void go_on(const std::string& directory) {
  constexpr std::uint64_t kSteps = 10;
  const std::vector<at::Tensor> parameters = make_parameters();
  const at::Tensor x = at::randn({32, 64});
  const torch_ext::StateOptions offload{.nvme_path = directory,
                                        .host_memory = 1 << 20};
  std::unique_ptr<torch_ext::OffloadedAdamW> optimizer;
  try {
    optimizer = torch_ext::OffloadedAdamW::resume(parameters, offload);
  } catch (const torch_ext::IoError& error) {
    if (error.error() != ENOENT) throw;
    optimizer = std::make_unique<torch_ext::OffloadedAdamW>(
        parameters, torch_ext::OffloadedAdamWOptions(1e-2), offload);
  }
  const std::uint64_t first = optimizer->committed_step().value_or(0);
  double last = 0;
  for (std::uint64_t step = first; step < first + kSteps; ++step) {
    optimizer->zero_grad();
    const at::Tensor loss = loss_of(parameters, x);
    loss.backward();
    optimizer->step();
    last = loss.item<double>();
  }
  optimizer->commit(first + kSteps);
  std::printf("steps %llu to %llu, loss %.6f\n",
              static_cast<unsigned long long>(first + 1),
              static_cast<unsigned long long>(first + kSteps), last);
}

}  // namespace

int main(int argc, char** argv) {
  const bool resumes = argc == 3 && std::string(argv[1]) == "--resume";
  if (argc != 2 && !resumes) {
    std::fprintf(stderr, "usage: libtorch_app [--resume] DIR\n");
    return 2;
  }
  try {
    if (resumes) {
      go_on(argv[2]);
      return 0;
    }
    swap_tensors(argv[1]);
    train(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "libtorch_app: %s\n", error.what());
    return 2;
  }
  return failures == 0 ? 0 : 1;
}
