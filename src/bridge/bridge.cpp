// The CPU part of the bridge: parts of libtorch that tch does not expose, as C functions over tensor handles.

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
#include <unistd.h>

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
// libtorch multiplies fp32 matrices with MKL, which reaches half of the speed of non-Intel processors; oneDNN generates
// code for the processor at run time. Its operator is only reachable through the dispatcher.

using Pointwise = at::Tensor(
    const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
    c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

// y [R, N] = x [R, K] · w [N, K]ᵀ + b [N].
at::Tensor matmul(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Pointwise>();
  return op.call(x, w, b, "none", c10::List<std::optional<at::Scalar>>(), "");
}

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& w,
                            const at::Tensor& b) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto rows = x.reshape({-1, x.size(-1)});
    context->save_for_backward({rows, w});
    auto shape = x.sizes().vec();
    shape.back() = w.size(0);
    return matmul(rows, w, b).view(shape);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &w = saved[1];
    auto shape = gradients[0].sizes().vec();
    const auto gy = gradients[0].reshape({-1, shape.back()});  // [R, N]
    shape.back() = w.size(1);
    at::Tensor gx, gw, gb;
    if (context->needs_input_grad(0)) gx = matmul(gy, w.t(), std::nullopt).view(shape);
    if (context->needs_input_grad(1)) gw = matmul(gy.t(), x.t(), std::nullopt);
    if (context->needs_input_grad(2)) gb = gy.sum(0);
    return {gx, gw, gb};
  }
};

// ---- hooks ---------------------------------------------------------------------------------------------------------

struct Hook : torch::autograd::PostAccumulateGradHook {
  void (*hook)(void*, size_t);
  void* context;
  size_t index;
  Hook(void (*hook)(void*, size_t), void* context, size_t index) : hook(hook), context(context), index(index) {}
  void operator()(const torch::autograd::Variable&) override { hook(context, index); }
};

// ---- memory --------------------------------------------------------------------------------------------------------
// A training step allocates the same blocks again and again; the C library returns large ones to the kernel each time,
// which then clears their pages anew. This allocator caches blocks of at least one megabyte for the next request of the
// same size, as libtorch does on CUDA, and passes smaller ones on. The cached bytes never exceed the peak of the used
// bytes.

struct CachingAllocator : c10::Allocator {
  static constexpr size_t min_cached = size_t(1) << 20;
  static inline std::mutex lock;
  static inline std::unordered_map<size_t, std::vector<void*>> cached;  // by size
  static inline std::unordered_map<void*, size_t> sizes;                // of large blocks in use
  static inline size_t used_bytes = 0, peak_used_bytes = 0, cached_bytes = 0;
  static inline std::atomic<size_t> allocated_bytes = 0;  // of all blocks in use, small ones too

  static void release(void* block) {
    if (block == nullptr) return;
    allocated_bytes -= malloc_usable_size(block);
    {
      const std::lock_guard<std::mutex> guard(lock);
      const auto found = sizes.find(block);
      if (found != sizes.end()) {
        const size_t size = found->second;
        sizes.erase(found);
        used_bytes -= size;
        if (cached_bytes + size <= peak_used_bytes) {
          cached[size].push_back(block);
          cached_bytes += size;
          return;
        }
      }
    }
    c10::free_cpu(block);
  }

  static void* allocate_large(size_t size) {
    const std::lock_guard<std::mutex> guard(lock);
    auto& same_size = cached[size];
    void* block = nullptr;
    if (same_size.empty()) {
      block = c10::alloc_cpu(size);
    } else {
      block = same_size.back();
      same_size.pop_back();
      cached_bytes -= size;
    }
    sizes[block] = size;
    used_bytes += size;
    peak_used_bytes = std::max(peak_used_bytes, used_bytes);
    return block;
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes < min_cached ? c10::alloc_cpu(bytes)
                                     : allocate_large((bytes + min_cached - 1) / min_cached * min_cached);
    allocated_bytes += malloc_usable_size(block);
    return {block, block, &release, at::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

CachingAllocator caching_allocator;

// ---- arguments, mirrored in fused.rs -------------------------------------------------------------------------------

struct LayerNormInputs {
  const at::Tensor *gradient, *x, *mean, *rstd, *scale, *shift;
};

// Lists of n tensors each.
struct AdamWTensors {
  at::Tensor *const *weights, *const *gradients, *const *exp_avg, *const *exp_avg_sq, *const *steps;
  size_t n;
};

struct AdamWScalars {
  double lr, beta1, beta2, weight_decay, eps;
};

std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t n) {
  std::vector<at::Tensor> result;
  result.reserve(n);
  for (size_t i = 0; i < n; ++i) result.push_back(*tensors[i]);
  return result;
}

}  // namespace

extern "C" {

const char* occlude_last_error() { return occlude::last_error.c_str(); }

// Blocks signals for the calling thread and the threads that it starts afterwards, or unblocks them for it.
bool occlude_mask_signals(const int* signals, size_t n, bool block) {
  sigset_t set;
  sigemptyset(&set);
  for (size_t i = 0; i < n; ++i) sigaddset(&set, signals[i]);
  return pthread_sigmask(block ? SIG_BLOCK : SIG_UNBLOCK, &set, nullptr) == 0;
}

// Replaces this process by another program; returns only if that fails. Unlike the standard library of Rust, it keeps the
// signal mask.
void occlude_execute(const char* program, char* const* arguments, char* const* environment) {
  execve(program, arguments, environment);
}

// The linker drops libtorch_cuda, since nothing refers to it; loaded here it registers its kernels.
bool occlude_load_cuda() { return dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) != nullptr; }

// Loads the CUDA library of the bridge, whose undefined symbols are those of libtorch_cuda, and gets its functions.
bool occlude_load_cuda_bridge(const char* path, const void** functions) {
  return guarded([&] {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(dlerror());
    const auto get = reinterpret_cast<const void* (*)()>(dlsym(library, "occlude_cuda_functions"));
    if (get == nullptr) throw std::runtime_error(dlerror());
    *functions = get();
  });
}

void occlude_install_caching_allocator() {
  c10::SetCPUAllocator(&caching_allocator, 1);
  // Smaller blocks stay with the C library, which must not return them to the kernel either.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
}

size_t occlude_allocated_bytes() { return CachingAllocator::allocated_bytes; }

bool occlude_copy_non_blocking(const at::Tensor* to, const at::Tensor* from) {
  return guarded([&] {
    const at::NoGradGuard no_grad;
    to->copy_(*from, /*non_blocking=*/true);
  });
}

// On success the tensor's memory owns `owner`, and passes it to `release` when it is freed.
bool occlude_from_blob(at::Tensor** out, void* bytes, const int64_t* shape, size_t dimensions, void (*release)(void*),
                       void* owner) {
  return guarded([&] {
    const at::IntArrayRef sizes(shape, dimensions);
    *out = new at::Tensor(at::from_blob(bytes, sizes, [release, owner](void*) { release(owner); }, at::kByte));
  });
}

bool occlude_linear(at::Tensor** out, const at::Tensor* x, const at::Tensor* w, const at::Tensor* b) {
  return guarded([&] { *out = new at::Tensor(Linear::apply(*x, *w, *b)); });
}

bool occlude_register_grad_hook(const at::Tensor* leaf, void (*hook)(void*, size_t), void* context, size_t index) {
  return guarded([&] {
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf, std::make_unique<Hook>(hook, context, index));
  });
}

bool occlude_set_grad(const at::Tensor* leaf, const at::Tensor* gradient) {
  return guarded([&] {
    // A gradient may have another dtype than its weight: fp32 sums for bf16 weights.
    if (leaf->scalar_type() != gradient->scalar_type()) leaf->set_grad_dtype(gradient->scalar_type());
    leaf->mutable_grad() = *gradient;
  });
}

bool occlude_adamw(const AdamWTensors* tensors, const AdamWScalars* scalars) {
  return guarded([&] {
    const at::NoGradGuard no_grad;
    const size_t n = tensors->n;
    for (size_t i = 0; i < n; ++i) tensors->steps[i]->add_(1);
    at::_fused_adamw_(list(tensors->weights, n), list(tensors->gradients, n), list(tensors->exp_avg, n),
                      list(tensors->exp_avg_sq, n), {}, list(tensors->steps, n), scalars->lr, scalars->beta1,
                      scalars->beta2, scalars->weight_decay, scalars->eps, false, false);
  });
}

// out [3]: gradients of x, scale and shift, null where `needs_grad` [3] is false.
bool occlude_layer_norm_backward(at::Tensor** out, const LayerNormInputs* in, const bool* needs_grad) {
  return guarded([&] {
    const at::NoGradGuard no_grad;
    const std::array<bool, 3> mask = {needs_grad[0], needs_grad[1], needs_grad[2]};
    const auto [gx, gscale, gshift] = at::native_layer_norm_backward(
        *in->gradient, *in->x, in->scale->sizes(), *in->mean, *in->rstd, *in->scale, *in->shift, mask);
    const at::Tensor* gradients[] = {&gx, &gscale, &gshift};
    for (size_t i = 0; i < 3; ++i) out[i] = mask[i] ? new at::Tensor(*gradients[i]) : nullptr;
  });
}

// Restricts attention to these kernels (values of at::SDPBackend), in order of priority.
bool occlude_set_sdp_backends(const int64_t* backends, size_t n) {
  return guarded([&] {
    auto& context = at::globalContext();
    std::vector<int64_t> order(backends, backends + n);
    const auto listed = [&](at::SDPBackend backend) {
      return std::find(backends, backends + n, static_cast<int64_t>(backend)) != backends + n;
    };
    // libtorch wants an order of all kernels; those that are not listed come last and are disabled.
    for (int64_t other = 0; other < at::num_sdp_backends; ++other) {
      if (!listed(static_cast<at::SDPBackend>(other))) order.push_back(other);
    }
    context.setSDPPriorityOrder(order);
    context.setSDPUseMath(listed(at::SDPBackend::math));
    context.setSDPUseFlash(listed(at::SDPBackend::flash_attention));
    context.setSDPUseMemEfficient(listed(at::SDPBackend::efficient_attention));
    context.setSDPUseCuDNN(listed(at::SDPBackend::cudnn_attention));
  });
}

// Writes the allowed kernels (values of at::SDPBackend) in order of priority, at most n, and returns their number.
size_t occlude_sdp_backends(int64_t* backends, size_t n) {
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
    if (allowed(backend) && count < n) backends[count++] = static_cast<int64_t>(backend);
  }
  return count;
}
}
