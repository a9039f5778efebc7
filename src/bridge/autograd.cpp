// Custom autograd functions whose backward is a closure of the Rust side.

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

// The structures below are mirrored in autograd.rs.

// Borrowed handles of n tensors.
struct HandleList {
  const at::Tensor* const* handles;
  size_t n;
};

// Handles of n tensors that the receiver owns.
struct OwnedHandleList {
  at::Tensor* const* handles;
  size_t n;
};

// The arguments of a backward call. `needs_grad` and `out` have one element per input. The receiver sets each element
// of `out` to a new handle, or leaves it null where there is no gradient.
struct BackwardArgs {
  OwnedHandleList saved;
  OwnedHandleList gradients;
  const bool* needs_grad;
  at::Tensor** out;
  size_t n_inputs;
};

struct BackwardCallback {
  bool (*call)(const void* context, const BackwardArgs* args);  // after an error: occlude_set_last_error, then false
  void (*drop)(void* context);
  void* context;
};

OwnedHandleList list(const std::vector<at::Tensor*>& handles) { return {handles.data(), handles.size()}; }

std::vector<at::Tensor*> new_handles(const variable_list& tensors) {
  std::vector<at::Tensor*> handles;
  handles.reserve(tensors.size());
  for (const auto& tensor : tensors) handles.push_back(new at::Tensor(tensor));
  return handles;
}

// Owns the closure; drops it once, on any thread.
class Closure {
 public:
  explicit Closure(const BackwardCallback& callback) : callback_(callback) {}
  Closure(const Closure&) = delete;
  Closure& operator=(const Closure&) = delete;
  ~Closure() { release(); }

  void release() {
    if (callback_.context != nullptr) callback_.drop(std::exchange(callback_.context, nullptr));
  }
  bool released() const { return callback_.context == nullptr; }

  variable_list operator()(const variable_list& saved, const variable_list& gradients,
                           const std::vector<char>& needs_grad) const {
    const auto saved_handles = new_handles(saved), gradient_handles = new_handles(gradients);
    std::vector<at::Tensor*> out(needs_grad.size(), nullptr);
    static_assert(sizeof(bool) == sizeof(char));
    const BackwardArgs args = {list(saved_handles), list(gradient_handles),
                               reinterpret_cast<const bool*>(needs_grad.data()), out.data(), out.size()};
    const bool success = callback_.call(callback_.context, &args);
    variable_list results(out.size());
    for (size_t i = 0; i < out.size(); ++i) {
      if (out[i] == nullptr) continue;
      if (needs_grad[i]) results[i] = *out[i];
      delete out[i];
    }
    // A plain exception, because the text of a c10::Error ends with the backtrace of this function's callers.
    if (!success) throw std::runtime_error(occlude::last_error);
    return results;
  }

 private:
  BackwardCallback callback_;
};

struct Node : torch::autograd::Node {
  Closure closure;
  std::vector<torch::autograd::SavedVariable> saved;

  explicit Node(const BackwardCallback& callback) : closure(callback) {}

  std::string name() const override { return "occlude::bridge::node"; }

  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (c10::GradMode::is_enabled()) {
      throw std::runtime_error(
          "a node's backward is not recorded, so that no second derivative can be had through it: "
          "call backward without create_graph");
    }
    if (closure.released()) {
      throw std::runtime_error(
          "backward has run through this node before, and what it had saved is freed: "
          "retain the graph in the first pass if a second one follows");
    }
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (!gradients[i].defined()) gradients[i] = input_metadata(i).zeros_like();
    }
    variable_list unpacked;
    unpacked.reserve(saved.size());
    for (const auto& variable : saved) unpacked.push_back(variable.unpack());
    std::vector<char> needs_grad(num_outputs());
    for (size_t i = 0; i < needs_grad.size(); ++i) needs_grad[i] = task_should_compute_output(i);
    return closure(unpacked, gradients, needs_grad);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> guard(mutex_);
    saved.clear();
    closure.release();
  }
};

}  // namespace

extern "C" {

// Sets the error of this thread; a callback calls it before it returns false.
void occlude_set_last_error(const char* text, size_t length) { occlude::last_error.assign(text, length); }

// Returns whether autograd records an operation on these inputs.
bool occlude_needs_recording(HandleList inputs) {
  if (!c10::GradMode::is_enabled()) return false;
  for (size_t i = 0; i < inputs.n; ++i) {
    if (inputs.handles[i]->requires_grad()) return true;
  }
  return false;
}

// Runs backward from `outputs` with their gradients into every leaf.
bool occlude_backward(HandleList outputs, HandleList gradients) {
  return occlude::guarded([&] {
    variable_list roots, root_gradients;
    for (size_t i = 0; i < outputs.n; ++i) {
      roots.push_back(*outputs.handles[i]);
      root_gradients.push_back(*gradients.handles[i]);
    }
    torch::autograd::backward(roots, root_gradients, /*retain_graph=*/false, /*create_graph=*/false);
  });
}

// Writes `results`, new handles of the outputs that depend on the inputs through the callback. The node owns the
// callback's context from here on, also after an error.
bool occlude_record_node(HandleList inputs, HandleList outputs, HandleList saved, at::Tensor** results,
                         const BackwardCallback* callback) {
  const auto node = std::shared_ptr<Node>(new Node(*callback), torch::autograd::deleteNode);
  return occlude::guarded([&] {
    torch::autograd::edge_list edges;
    edges.reserve(inputs.n);
    for (size_t i = 0; i < inputs.n; ++i) {
      const at::Tensor& input = *inputs.handles[i];
      edges.push_back(input.requires_grad() ? torch::autograd::impl::gradient_edge(input) : torch::autograd::Edge());
    }
    node->set_next_edges(std::move(edges));
    // A detached tensor shares its version counter, so that a modification in place is detected, and does not refer to
    // the node: a saved output makes no reference cycle.
    node->saved.reserve(saved.n);
    for (size_t i = 0; i < saved.n; ++i) node->saved.emplace_back(saved.handles[i]->detach(), false);
    // Detached too, because an output may be an input or a view of one.
    variable_list detached;
    detached.reserve(outputs.n);
    for (size_t i = 0; i < outputs.n; ++i) {
      detached.push_back(outputs.handles[i]->detach());
      if (torch::autograd::isDifferentiableType(detached.back().scalar_type())) {
        torch::autograd::set_history(detached.back(), node);
      } else {
        node->add_input_metadata(detached.back());  // reserves its index among the gradients
      }
    }
    for (size_t i = 0; i < outputs.n; ++i) results[i] = new at::Tensor(std::move(detached[i]));
  });
}
}
