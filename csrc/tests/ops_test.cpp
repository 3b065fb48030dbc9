// The ops from C++, against the same in plain ATen and against ATen's own gradients.

#include <torch/torch.h>

#include <cstdlib>
#include <iostream>

#include "../ops.h"

namespace {

void require(const torch::Tensor& actual, const torch::Tensor& expected, double tolerance, const char* what) {
  const double error = (actual.to(torch::kDouble) - expected.to(torch::kDouble)).norm().item<double>();
  const double size = expected.to(torch::kDouble).norm().item<double>();
  if (!(error <= tolerance * size)) {
    std::cerr << what << ": relative error " << error / size << " > " << tolerance << "\n";
    std::exit(1);
  }
}

void check(torch::Dtype dtype, bool columns_dense, int64_t S, double tolerance) {
  const int64_t B = 4, P = 13, M = 29, R = 17;
  const auto lay_out = [&](torch::Tensor t) {
    t = t.to(dtype);
    return columns_dense ? t.transpose(1, 2).contiguous().transpose(1, 2) : t;
  };
  const auto z = lay_out(torch::randn({B, P, R})), dy = lay_out(torch::randn({B, P, M}));
  const auto U = torch::randn({M, R}).to(dtype), bias = torch::randn({M}).to(dtype);
  const auto scale = torch::rand({S, R}, dtype == torch::kDouble ? torch::kDouble : torch::kFloat);

  const auto z64 = z.to(torch::kDouble).detach().clone().requires_grad_();
  const auto scale64 = scale.to(torch::kDouble).detach().clone().requires_grad_();
  const auto scaled = z64 * scale64.repeat_interleave(B / S, 0).unsqueeze(1);
  const auto y64 = torch::matmul(scaled, U.to(torch::kDouble).t()) + bias.to(torch::kDouble);
  const auto grads = torch::autograd::grad({y64}, {z64, scale64}, {dy.to(torch::kDouble)});

  require(svdiff::expand(z, U, scale, bias), y64.detach(), tolerance, "y");
  const auto [dz, dscale] = svdiff::expand_backward(dy, z, U, scale, true);
  require(dz, grads[0], tolerance, "dz");
  require(dscale, grads[1], tolerance, "dscale");
}

void check_layers() {
  const auto options = torch::kDouble;
  const int64_t B = 2, C = 3, M = 7, R = 5, side = 6;
  const auto U = torch::randn({M, R}, options), Vh = torch::randn({R, C, 3, 3}, options), bias = torch::randn({M}, options);
  const auto x = torch::randn({B, C, side, side}, options).requires_grad_();
  const auto scale = torch::rand({R}, options).requires_grad_();
  const auto weight = torch::einsum("mr,r,rcij->mcij", {U, scale, Vh});
  const auto expected = torch::conv2d(x, weight, bias, 1, 1);
  const auto actual = svdiff::scaled_conv2d(x, U, scale, Vh, bias, {1, 1}, {1, 1}, {1, 1});
  require(actual.detach(), expected.detach(), 1e-12, "scaled_conv2d");
  const auto dy = torch::randn_like(expected);
  const auto wanted = torch::autograd::grad({expected}, {x, scale}, {dy});
  const auto got = torch::autograd::grad({actual}, {x, scale}, {dy});
  require(got[0], wanted[0], 1e-12, "dx of scaled_conv2d");
  require(got[1], wanted[1], 1e-12, "dscale of scaled_conv2d");

  const auto rows = torch::randn({B, side, C * 9}, options).requires_grad_();
  const auto y = svdiff::scaled_linear(rows, U, scale, Vh.flatten(1), bias);
  const auto y_plain = torch::linear(rows, torch::einsum("mr,r,rcij->mcij", {U, scale, Vh}).flatten(1), bias);
  require(y.detach(), y_plain.detach(), 1e-12, "scaled_linear");
  const auto dy_rows = torch::randn_like(y);
  const auto plain = torch::autograd::grad({y_plain}, {rows, scale}, {dy_rows});
  const auto ours = torch::autograd::grad({y}, {rows, scale}, {dy_rows});
  require(ours[0], plain[0], 1e-12, "dx of scaled_linear");
  require(ours[1], plain[1], 1e-12, "dscale of scaled_linear");
}

}  // namespace

int main() {
  torch::manual_seed(0);
  for (const bool columns_dense : {false, true}) {
    for (const int64_t S : {1, 2}) {
      check(torch::kDouble, columns_dense, S, 1e-12);
      check(torch::kFloat, columns_dense, S, 1e-5);
      check(torch::kBFloat16, columns_dense, S, 0.02);
      check(torch::kHalf, columns_dense, S, 0.004);
    }
  }
  check_layers();
  std::cout << "ok\n";
  return 0;
}
