// A training program on LibTorch: which of two spirals is a point on?
#include <torch/torch.h>

#include <cstdio>
#include <memory>

using torch::Tensor;

struct Net : torch::nn::Module {
  torch::nn::Linear first{register_module("first", torch::nn::Linear(2, 64))};
  torch::nn::Linear second{register_module("second", torch::nn::Linear(64, 64))};
  torch::nn::Linear third{register_module("third", torch::nn::Linear(64, 2))};

  Tensor forward(const Tensor& points) {
    return third(torch::relu(second(torch::relu(first(points)))));
  }
};

struct Spirals {
  explicit Spirals(int64_t count) {
    labels = torch::arange(count) % 2;
    const Tensor turns = torch::rand({count}).sqrt();
    const Tensor angle = 9.5 * turns + 3.14159265 * labels;
    points = turns.unsqueeze(1) * torch::stack({angle.cos(), angle.sin()}, 1) +
             0.01 * torch::randn({count, 2});
  }
  Tensor points, labels;
};

int main() {
  torch::manual_seed(0);
  const Spirals train(2000), test(2000);
  auto net = std::make_shared<Net>();
  torch::optim::Adam optimizer(net->parameters(), 3e-3);

  for (int step = 0; step < 1500; ++step) {
    const Tensor batch = torch::randint(train.labels.size(0), {128});
    optimizer.zero_grad();
    const Tensor loss = torch::nn::functional::cross_entropy(
        net->forward(train.points.index({batch})), train.labels.index({batch}));
    loss.backward();
    optimizer.step();
  }

  net->eval();
  const torch::NoGradGuard no_grad;
  const Tensor right = net->forward(test.points).argmax(1).eq(test.labels);
  std::printf("%.1f %% of the test points are on the right spiral\n",
              100 * right.to(torch::kFloat).mean().item<float>());
  torch::save(net, "net.pt");
}
