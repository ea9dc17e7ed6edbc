// Calls α-entmax attention directly and checks the gradients that autograd gives against finite differences.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <adasplash/adasplash.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <vector>

namespace {

using Inputs = std::vector<at::Tensor>;  // query, key, value

// The relative error of d loss / d inputs[which], along a random direction, against a central difference in float64.
double GradientError(const std::function<at::Tensor(const Inputs&)>& loss, const Inputs& inputs, size_t which) {
  const auto direction = at::randn_like(inputs[which]);
  const auto gradient = torch::autograd::grad({loss(inputs)}, {inputs[which]})[0];
  const double analytic = (gradient * direction).sum().item().toDouble();

  const at::NoGradGuard no_grad;
  const double step = 1e-6;
  auto forward = inputs, backward = inputs;
  forward[which] = inputs[which] + step * direction;
  backward[which] = inputs[which] - step * direction;
  const double numeric = (loss(forward) - loss(backward)).item().toDouble() / (2 * step);
  return std::abs(analytic - numeric) / std::max(std::abs(numeric), 1e-3);
}

}  // namespace

int main() {
  at::manual_seed(0);
  // 2 sequences of 100 tokens, 4 query heads that share 2 key heads, head size 32.
  Inputs inputs{at::randn({2, 4, 100, 32}, at::kDouble), at::randn({2, 2, 100, 32}, at::kDouble),
                at::randn({2, 2, 100, 32}, at::kDouble)};
  for (auto& input : inputs) input.requires_grad_();
  const auto weight = at::randn({2, 4, 100, 32}, at::kDouble);

  bool good = true;
  for (const double alpha : {1.25, 1.5, 2.0}) {
    for (const bool is_causal : {false, true}) {
      const auto attend = [&](const Inputs& x) { return adasplash::entmax_attn(x[0], x[1], x[2], alpha, is_causal); };
      // The weights of every query sum to one, so values that are all one must come back as they are.
      double error = (attend({inputs[0], inputs[1], at::ones_like(inputs[2])}) - 1).abs().max().item().toDouble();
      for (size_t which = 0; which < inputs.size(); ++which) {
        error =
            std::max(error, GradientError([&](const Inputs& x) { return (attend(x) * weight).sum(); }, inputs, which));
      }
      good = good && error < 1e-6;
      std::printf("alpha %.2f, %-10s  largest error %.1e\n", alpha, is_causal ? "causal" : "not causal", error);
    }
  }
  std::puts(good ? "Gradients agree with finite differences." : "GRADIENTS DISAGREE with finite differences.");
  return good ? 0 : 1;
}
