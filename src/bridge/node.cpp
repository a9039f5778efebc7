// An autograd node whose backward is a closure on the other side of the boundary.

#include "bridge.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using torch::autograd::variable_list;

// The tensors are handed over: what `saved`, `gradients` and `out` point to belongs to the receiver. `out` has one
// place for each input, null where there is no gradient. False: it failed and has called occlude_refuse.
using Call = bool (*)(const void* context, at::Tensor* const* saved, size_t n_saved, at::Tensor* const* gradients,
                      size_t n_gradients, const bool* wanted, at::Tensor** out, size_t n_inputs);
using Drop = void (*)(void* context);

// The closure, dropped once, on whatever thread lets go of it.
class Closure {
 public:
  Closure(Call call, Drop drop, void* context) : call_(call), drop_(drop), context_(context) {}
  Closure(const Closure&) = delete;
  Closure& operator=(const Closure&) = delete;
  ~Closure() { let_go(); }

  void let_go() {
    if (context_ != nullptr) drop_(std::exchange(context_, nullptr));
  }
  bool gone() const { return context_ == nullptr; }

  variable_list operator()(const variable_list& saved, const variable_list& gradients,
                           const std::vector<char>& wanted) const {
    const auto handed = [](const variable_list& all) {
      std::vector<at::Tensor*> handles;
      handles.reserve(all.size());
      for (const auto& one : all) handles.push_back(new at::Tensor(one));
      return handles;
    };
    const auto given = handed(saved), incoming = handed(gradients);
    std::vector<at::Tensor*> out(wanted.size(), nullptr);
    static_assert(sizeof(bool) == sizeof(char));
    const bool good = call_(context_, given.data(), given.size(), incoming.data(), incoming.size(),
                            reinterpret_cast<const bool*>(wanted.data()), out.data(), out.size());
    variable_list outgoing(out.size());
    for (size_t i = 0; i < out.size(); ++i) {
      if (out[i] == nullptr) continue;
      if (wanted[i]) outgoing[i] = *out[i];
      delete out[i];
    }
    // A plain exception, since the text of libtorch's own ends in the addresses of this function's callers.
    if (!good) throw std::runtime_error(occlude::reason);
    return outgoing;
  }

 private:
  Call call_;
  Drop drop_;
  void* context_;
};

struct Node : torch::autograd::Node {
  Closure closure;
  std::vector<torch::autograd::SavedVariable> saved;

  Node(Call call, Drop drop, void* context) : closure(call, drop, context) {}

  std::string name() const override { return "occlude::bridge::node"; }

  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (c10::GradMode::is_enabled()) {
      throw std::runtime_error(
          "a node's backward is not recorded, so that no second derivative can be had through it: "
          "call backward without create_graph");
    }
    if (closure.gone()) {
      throw std::runtime_error(
          "backward has run through this node before, and what it had saved is freed: "
          "keep the graph in the first pass where a second one follows");
    }
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (!gradients[i].defined()) gradients[i] = input_metadata(i).zeros_like();
    }
    variable_list seen;
    seen.reserve(saved.size());
    for (const auto& one : saved) seen.push_back(one.unpack());
    std::vector<char> wanted(num_outputs());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    return closure(seen, gradients, wanted);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> guard(mutex_);
    saved.clear();
    closure.let_go();
  }
};

}  // namespace

extern "C" {

// Leaves the text of a failure for the one who called; a closure does so before it returns false.
void occlude_refuse(const char* text, size_t length) { occlude::reason.assign(text, length); }

// Whether an operation on these inputs is to be recorded.
bool occlude_is_recorded(const at::Tensor* const* inputs, size_t n) {
  if (!c10::GradMode::is_enabled()) return false;
  for (size_t i = 0; i < n; ++i) {
    if (inputs[i]->requires_grad()) return true;
  }
  return false;
}

// Backward from `outputs` with their gradients [n] into every leaf behind them.
bool occlude_backward(const at::Tensor* const* outputs, const at::Tensor* const* gradients, size_t n) {
  return occlude::guarded([&] {
    variable_list from, with;
    for (size_t i = 0; i < n; ++i) from.push_back(*outputs[i]), with.push_back(*gradients[i]);
    torch::autograd::backward(from, with, /*retain_graph=*/false, /*create_graph=*/false);
  });
}

// Makes `results` [n_outputs], new handles of the outputs that depend on the inputs through the closure. The context is
// the node's from here on, also where this fails.
bool occlude_node(const at::Tensor* const* inputs, size_t n_inputs, const at::Tensor* const* outputs,
                  at::Tensor** results, size_t n_outputs, const at::Tensor* const* saved, size_t n_saved, Call call,
                  Drop drop, void* context) {
  const auto node = std::shared_ptr<Node>(new Node(call, drop, context), torch::autograd::deleteNode);
  return occlude::guarded([&] {
    torch::autograd::edge_list edges;
    edges.reserve(n_inputs);
    for (size_t i = 0; i < n_inputs; ++i) {
      const bool wants = inputs[i]->requires_grad();
      edges.push_back(wants ? torch::autograd::impl::gradient_edge(*inputs[i]) : torch::autograd::Edge());
    }
    node->set_next_edges(std::move(edges));
    // A detached tensor shares its version counter, so that a change in place is found out, and does not know the
    // node: an output that is saved keeps nothing alive that keeps it alive.
    node->saved.reserve(n_saved);
    for (size_t i = 0; i < n_saved; ++i) node->saved.emplace_back(saved[i]->detach(), false);
    // Detached too, since an output may be an input, or a view of one.
    variable_list made;
    made.reserve(n_outputs);
    for (size_t i = 0; i < n_outputs; ++i) {
      made.push_back(outputs[i]->detach());
      if (torch::autograd::isDifferentiableType(made.back().scalar_type())) {
        torch::autograd::set_history(made.back(), node);
      } else {
        node->add_input_metadata(made.back());  // its place among the gradients
      }
    }
    for (size_t i = 0; i < n_outputs; ++i) results[i] = new at::Tensor(std::move(made[i]));
  });
}
}
