// Loads the spectral layers that export_layer.py has written, gives them one fine-tune after the other, and two at once.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <svdiff/ops.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "safetensors.h"

namespace {

using safetensors::Tensors;

constexpr double TOLERANCE = 1e-5;  // of fp32, summed in another order

at::Tensor get(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) {
    throw std::runtime_error("there is no tensor '" + name + "' in the file");
  }
  return found->second;
}

std::optional<at::Tensor> get_if(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? std::nullopt : std::optional(found->second);
}

// A linear layer or a convolution, by the dimensions of Vh. Only `gain` depends on the fine-tune.
struct Layer {
  at::Tensor U, sigma, Vh, gain;
  std::optional<at::Tensor> bias, weight;
  std::vector<int64_t> stride, padding, dilation;

  Layer(const Tensors& file, const std::string& name)
      : U(get(file, name + ".U")),
        sigma(get(file, name + ".sigma")),
        Vh(get(file, name + ".Vh")),
        bias(get_if(file, name + ".bias")),
        weight(get_if(file, name + ".weight")) {
    if (Vh.dim() == 4) {
      const auto pair = [geometry = get(file, name + ".geometry")](int64_t row) {
        return std::vector<int64_t>{geometry[row][0].item<int64_t>(), geometry[row][1].item<int64_t>()};
      };
      stride = pair(0), padding = pair(1), dilation = pair(2);
    }
    gain = gain_of(at::zeros_like(sigma));
  }

  // What multiplies Vh x under a delta [r], or one for each sample [S, r]. In the residual form, which has the weight
  // itself, it is what changes.
  at::Tensor gain_of(const at::Tensor& delta) const {
    if (delta.size(-1) != sigma.size(0)) {
      throw std::runtime_error("the delta is for a layer of another rank");
    }
    return weight ? at::maximum(delta, -sigma) : at::relu(sigma + delta);
  }

  at::Tensor operator()(const at::Tensor& x) const {
    const auto inner = weight ? std::nullopt : bias;
    const auto y = Vh.dim() == 4 ? svdiff::scaled_conv2d(x, U, gain, Vh, inner, stride, padding, dilation)
                                 : svdiff::scaled_linear(x, U, gain, Vh, inner);
    return weight ? y + plain(x, *weight) : y;
  }

  // The same with a weight of its own.
  at::Tensor plain(const at::Tensor& x, const at::Tensor& dense) const {
    return Vh.dim() == 4 ? at::conv2d(x, dense, bias, stride, padding, dilation) : at::linear(x, dense, bias);
  }

  at::Tensor recomposed() const {
    const auto shift = at::mm(U * gain, Vh.flatten(1)).view(concatenated(U.size(0), Vh.sizes().slice(1)));
    return weight ? *weight + shift : shift;
  }

 private:
  static std::vector<int64_t> concatenated(int64_t first, at::IntArrayRef others) {
    std::vector<int64_t> all{first};
    all.insert(all.end(), others.begin(), others.end());
    return all;
  }
};

// The median of so many calls, in microseconds.
double microseconds(int calls, const std::function<void()>& work) {
  work();  // the first call sets things up
  std::vector<double> times;
  for (int i = 0; i < calls; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + calls / 2, times.end());
  return times[calls / 2];
}

bool agrees(const at::Tensor& y, const at::Tensor& expected, const std::string& name, const std::string& adapter) {
  const double error = (y - expected).norm().item<double>() / expected.norm().item<double>();
  std::printf("%-8s %-8s relative error %.1e\n", name.c_str(), adapter.c_str(), error);
  return error <= TOLERANCE;
}

int run(const std::string& folder, int calls) {
  const c10::InferenceMode inference;
  const auto file = safetensors::load(folder + "/layers.safetensors");
  const auto expected = safetensors::load(folder + "/expected.safetensors");
  std::map<std::string, Layer> layers;
  for (const auto& [key, tensor] : file) {
    if (const auto end = key.rfind(".sigma"); end != std::string::npos) {
      layers.emplace(key.substr(0, end), Layer(file, key.substr(0, end)));
    }
  }

  bool right = true;
  const std::vector<std::string> adapters = {"first", "second"};
  std::map<std::string, Tensors> deltas;
  for (const auto& adapter : adapters) {
    deltas[adapter] = safetensors::load(folder + "/" + adapter + "/spectral_shifts.safetensors");
    for (auto& [name, layer] : layers) {
      layer.gain = layer.gain_of(get(deltas[adapter], name + ".delta"));
      right &= agrees(layer(get(expected, name + ".x")), get(expected, name + "." + adapter), name, adapter);
    }
  }
  for (auto& [name, layer] : layers) {  // the first half of the batch by one, the other half by the other
    const auto one = get(deltas["first"], name + ".delta"), other = get(deltas["second"], name + ".delta");
    layer.gain = layer.gain_of(at::stack({one, other}));
    const auto half = get(expected, name + ".x").size(0) / 2;
    const auto both = at::cat(
        {get(expected, name + ".first").narrow(0, 0, half), get(expected, name + ".second").narrow(0, half, half)});
    right &= agrees(layer(get(expected, name + ".x")), both, name, "both");
  }

  std::printf("\nmicroseconds, median of %d calls\n", calls);
  std::printf("%-8s %10s %10s %14s %12s\n", "", "spectral", "plain", "new delta", "new weight");
  for (auto& [name, layer] : layers) {
    const auto x = get(expected, name + ".x"), delta = get(deltas["first"], name + ".delta");
    layer.gain = layer.gain_of(delta);
    const auto dense = layer.recomposed();
    std::printf(
        "%-8s %10.1f %10.1f %14.1f %12.1f\n",
        name.c_str(),
        microseconds(calls, [&, &layer = layer] { layer(x); }),
        microseconds(calls, [&, &layer = layer] { layer.plain(x, dense); }),
        microseconds(calls, [&, &layer = layer] { layer.gain = layer.gain_of(delta); }),
        microseconds(calls, [&, &layer = layer] { layer.recomposed(); }));
  }
  if (!right) {
    std::fprintf(stderr, "not what Python computed\n");
  }
  return right ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: %s FOLDER [CALLS]    FOLDER was written by export_layer.py\n", argv[0]);
    return 2;
  }
  try {
    const int calls = argc == 3 ? std::stoi(argv[2]) : 200;
    if (calls < 1) {
      throw std::runtime_error("CALLS must be at least 1");
    }
    return run(argv[1], calls);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
