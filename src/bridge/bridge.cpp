// The CPU half of the bridge: what tch leaves out, as C functions over tensor handles.

#include "bridge.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/sum.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <dlfcn.h>
#include <malloc.h>
#include <signal.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using occlude::guarded;

// ---- linear: oneDNN's matrix product -----------------------------------------------------------------------------
// libtorch multiplies fp32 matrices with MKL, which leaves half of the speed of non-Intel processors unused; oneDNN
// generates code for the processor that it finds. The operator is registered with the dispatcher, so it is asked there.

using Pointwise = at::Tensor(
    const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
    c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

// y [R, N] = x [R, K] · w [N, K]ᵀ + b [N].
at::Tensor product(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Pointwise>();
  return op.call(x, w, b, "none", c10::List<std::optional<at::Scalar>>(), "");
}

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& w,
                            const at::Tensor& b) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto rows = x.reshape({-1, x.size(-1)});
    context->save_for_backward({rows, w});
    auto shape = x.sizes().vec();
    shape.back() = w.size(0);
    return product(rows, w, b).view(shape);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &w = saved[1];
    auto shape = gradients[0].sizes().vec();
    const auto gy = gradients[0].reshape({-1, shape.back()});  // [R, N]
    shape.back() = w.size(1);
    at::Tensor gx, gw, gb;
    if (context->needs_input_grad(0)) gx = product(gy, w.t(), std::nullopt).view(shape);
    if (context->needs_input_grad(1)) gw = product(gy.t(), x.t(), std::nullopt);
    if (context->needs_input_grad(2)) gb = gy.sum(0);
    return {gx, gw, gb};
  }
};

// ---- hooks ---------------------------------------------------------------------------------------------------------

struct Hook : torch::autograd::PostAccumulateGradHook {
  void (*call)(void*, size_t);
  void* context;
  size_t index;
  Hook(void (*call)(void*, size_t), void* context, size_t index) : call(call), context(context), index(index) {}
  void operator()(const torch::autograd::Variable&) override { call(context, index); }
};

// ---- memory --------------------------------------------------------------------------------------------------------
// A training step asks for the same blocks again and again; the C library gives large ones back to the kernel each
// time, which then clears their pages anew. This allocator keeps blocks of one megabyte and more for the next request
// of the same size, as libtorch does on CUDA, and hands smaller ones on. What it keeps is never more than was once in
// use at a time.

struct Keeper : c10::Allocator {
  static constexpr size_t least = size_t(1) << 20;
  static inline std::mutex lock;
  static inline std::unordered_map<size_t, std::vector<void*>> idle;  // by size
  static inline std::unordered_map<void*, size_t> sizes;              // of blocks in use
  static inline size_t in_use = 0, most_in_use = 0, kept = 0;         // bytes
  static inline std::atomic<size_t> alive = 0;                        // bytes of all blocks in use, small ones too

  static void release(void* block) {
    if (block == nullptr) return;
    alive -= malloc_usable_size(block);
    {
      const std::lock_guard<std::mutex> guard(lock);
      const auto found = sizes.find(block);
      if (found != sizes.end()) {
        const size_t size = found->second;
        sizes.erase(found);
        in_use -= size;
        if (kept + size <= most_in_use) {
          idle[size].push_back(block);
          kept += size;
          return;
        }
      }
    }
    c10::free_cpu(block);
  }

  static void* keep(size_t size) {
    const std::lock_guard<std::mutex> guard(lock);
    auto& same = idle[size];
    void* block = nullptr;
    if (same.empty()) {
      block = c10::alloc_cpu(size);
    } else {
      block = same.back();
      same.pop_back();
      kept -= size;
    }
    sizes[block] = size;
    in_use += size;
    most_in_use = std::max(most_in_use, in_use);
    return block;
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes < least ? c10::alloc_cpu(bytes) : keep((bytes + least - 1) / least * least);
    alive += malloc_usable_size(block);
    return {block, block, &release, at::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Keeper keeper;

std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t n) {
  std::vector<at::Tensor> all;
  all.reserve(n);
  for (size_t i = 0; i < n; ++i) all.push_back(*tensors[i]);
  return all;
}

}  // namespace

extern "C" {

const char* occlude_reason() { return occlude::reason.c_str(); }

// Keeps signals from the calling thread and from the threads that it will start, or lets them through to it.
bool occlude_mask_signals(const int* numbers, size_t n, bool keep) {
  sigset_t set;
  sigemptyset(&set);
  for (size_t i = 0; i < n; ++i) sigaddset(&set, numbers[i]);
  return pthread_sigmask(keep ? SIG_BLOCK : SIG_UNBLOCK, &set, nullptr) == 0;
}

// The linker drops libtorch_cuda, since nothing refers to it; opened here it registers its kernels.
bool occlude_open_cuda() { return dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) != nullptr; }

// Opens the CUDA half of the bridge, whose undefined symbols are those of libtorch_cuda, and asks it for its table.
bool occlude_open_half(const char* path, const void** table) {
  return guarded([&] {
    void* half = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (half == nullptr) throw std::runtime_error(dlerror());
    const auto ask = reinterpret_cast<const void* (*)()>(dlsym(half, "occlude_cuda_table"));
    if (ask == nullptr) throw std::runtime_error(dlerror());
    *table = ask();
  });
}

void occlude_keep_memory() {
  c10::SetCPUAllocator(&keeper, 1);
  // Smaller blocks stay with the C library, which is told not to give them back either.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
}

size_t occlude_memory_in_use() { return Keeper::alive; }

// Queues the copy where the device lets it, instead of waiting for it.
bool occlude_copy(const at::Tensor* to, const at::Tensor* from) {
  return guarded([&] {
    const at::NoGradGuard no_grad;
    to->copy_(*from, /*non_blocking=*/true);
  });
}

// On success the tensor's memory owns `owner`, and hands it to `give_back` when it is freed.
bool occlude_lend(at::Tensor** out, void* bytes, const int64_t* shape, size_t dimensions, void (*give_back)(void*),
                  void* owner) {
  return guarded([&] {
    const at::IntArrayRef sizes(shape, dimensions);
    *out = new at::Tensor(at::from_blob(bytes, sizes, [give_back, owner](void*) { give_back(owner); }, at::kByte));
  });
}

bool occlude_linear(at::Tensor** out, const at::Tensor* x, const at::Tensor* w, const at::Tensor* b) {
  return guarded([&] { *out = new at::Tensor(Linear::apply(*x, *w, *b)); });
}

bool occlude_on_gradient(const at::Tensor* leaf, void (*call)(void*, size_t), void* context, size_t index) {
  return guarded([&] {
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf, std::make_unique<Hook>(call, context, index));
  });
}

bool occlude_set_gradient(const at::Tensor* leaf, const at::Tensor* gradient) {
  return guarded([&] {
    // A gradient may be kept in another dtype than its weight: fp32 sums under bf16 weights.
    if (leaf->scalar_type() != gradient->scalar_type()) leaf->set_grad_dtype(gradient->scalar_type());
    leaf->mutable_grad() = *gradient;
  });
}

bool occlude_adamw(at::Tensor* const* weights, at::Tensor* const* gradients, at::Tensor* const* first,
                   at::Tensor* const* second, at::Tensor* const* steps, size_t n, double lr, double beta1,
                   double beta2, double weight_decay, double eps) {
  return guarded([&] {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < n; ++i) steps[i]->add_(1);
    at::_fused_adamw_(list(weights, n), list(gradients, n), list(first, n), list(second, n), {}, list(steps, n), lr,
                      beta1, beta2, weight_decay, eps, false, false);
  });
}

// out [3]: gradients of x, scale and shift, null where not wanted.
bool occlude_layer_norm_backward(at::Tensor** out, const at::Tensor* gradient, const at::Tensor* x,
                                 const at::Tensor* mean, const at::Tensor* rstd, const at::Tensor* scale,
                                 const at::Tensor* shift, const bool* wanted) {
  return guarded([&] {
    const at::NoGradGuard no_grad;
    const std::array<bool, 3> mask = {wanted[0], wanted[1], wanted[2]};
    const auto [gx, gscale, gshift] =
        at::native_layer_norm_backward(*gradient, *x, scale->sizes(), *mean, *rstd, *scale, *shift, mask);
    const at::Tensor* all[] = {&gx, &gscale, &gshift};
    for (size_t i = 0; i < 3; ++i) out[i] = mask[i] ? new at::Tensor(*all[i]) : nullptr;
  });
}

// The kernels of attention that may run, in the order in which they are tried.
bool occlude_set_sdp_order(const int64_t* order, size_t n) {
  return guarded([&] {
    auto& context = at::globalContext();
    std::vector<int64_t> all(order, order + n);
    const auto named = [&](at::SDPBackend backend) {
      return std::find(order, order + n, static_cast<int64_t>(backend)) != order + n;
    };
    // libtorch wants a place for each; those that are not named come last, and are turned off.
    for (int64_t other = 0; other < at::num_sdp_backends; ++other) {
      if (!named(static_cast<at::SDPBackend>(other))) all.push_back(other);
    }
    context.setSDPPriorityOrder(all);
    context.setSDPUseMath(named(at::SDPBackend::math));
    context.setSDPUseFlash(named(at::SDPBackend::flash_attention));
    context.setSDPUseMemEfficient(named(at::SDPBackend::efficient_attention));
    context.setSDPUseCuDNN(named(at::SDPBackend::cudnn_attention));
  });
}

// Writes at most n numbers of at::SDPBackend, and returns how many.
size_t occlude_sdp_order(int64_t* order, size_t n) {
  auto& context = at::globalContext();
  const auto allowed = [&](at::SDPBackend backend) {
    switch (backend) {
      case at::SDPBackend::math: return context.userEnabledMathSDP();
      case at::SDPBackend::flash_attention: return context.userEnabledFlashSDP();
      case at::SDPBackend::efficient_attention: return context.userEnabledMemEfficientSDP();
      case at::SDPBackend::cudnn_attention: return context.userEnabledCuDNNSDP();
      default: return false;
    }
  };
  size_t count = 0;
  for (const auto backend : context.sDPPriorityOrder()) {
    if (allowed(backend) && count < n) order[count++] = static_cast<int64_t>(backend);
  }
  return count;
}
}
