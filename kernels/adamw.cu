// AdamW (Loshchilov and Hutter, 2019) over flat buffers, in PyTorch's order of operations. Everything that changes from
// step to step is read from device memory, so that a captured CUDA graph stays valid: control = learning rate, weight
// decay, clip scale, and 1 if the update is applied.
#include "device.cuh"

typedef GRADIENT G;
typedef WEIGHT W;

// Increments the step count of each tensor that is updated, and writes scalars [tensors, 4]: whether it is updated, the
// factor 1 - lr · weight decay, the step size lr / (1 - β1^step), and the bias correction of the second moment.
KERNEL(128)
void adamw_scalars(Global<const float> control, Global<const float> decays, Global<const float> used,
                   Global<float> steps, Global<float> scalars, float log_beta1, float log_beta2, int tensors) {
  const int tensor = block() * 128 + thread();
  if (tensor >= tensors) return;
  const bool is_updated = control[3] != 0 && used[tensor] != 0;
  float step = steps[tensor];
  if (is_updated) steps.set(tensor, step += 1);
  // 1 - β^step by expm1, which avoids cancellation.
  const float correction1 = -expm1f(step * log_beta1), correction2 = -expm1f(step * log_beta2);
  const Pack<float, 4> scalar = {{float(is_updated), 1 - control[0] * control[1] * decays[tensor],
                                  is_updated ? control[0] / correction1 : 0, correction2}};
  scalars.store<4>(4 * tensor, scalar);
}
ENTRY(adamw_scalars)

// Updates buffers of n elements. owner [n / 128, rounded up] is the tensor that each run of 128 elements belongs to.
// compute_weight, if present, receives the weights in its own dtype. Four elements per thread.
KERNEL(256)
void adamw(Global<float> weight, Global<float> exp_avg, Global<float> exp_avg_sq, Global<const G> gradient,
           Global<W> compute_weight, Global<const int> owner, Global<const float> scalars, Global<const float> control,
           i64 n, float one_minus_beta1, float beta2, float one_minus_beta2, float eps) {
  const i64 index = (i64(block()) * 256 + thread()) * 4;
  if (index >= n) return;
  const auto scalar = scalars.load<4>(4 * i64(owner[index / 128]));
  if (scalar.data[0] == 0) return;
  const float clip_scale = control[2];
  const bool is_full = index + 4 <= n;
  Pack<float, 4> w = {}, m = {}, v = {}, g = {};
  if (is_full) {
    w = weight.load<4>(index), m = exp_avg.load<4>(index), v = exp_avg_sq.load<4>(index);
    const auto in = gradient.load<4>(index);
    for (int i = 0; i < 4; ++i) g.data[i] = wide(in.data[i]);
  } else {
    for (int i = 0; i < 3; ++i)
      if (index + i < n)
        w.data[i] = weight[index + i], m.data[i] = exp_avg[index + i], v.data[i] = exp_avg_sq[index + i],
        g.data[i] = wide(gradient[index + i]);
  }
  Pack<W, 4> rounded;
  for (int i = 0; i < 4; ++i) {
    const float clipped = g.data[i] * clip_scale;
    m.data[i] += one_minus_beta1 * (clipped - m.data[i]);
    v.data[i] = v.data[i] * beta2 + one_minus_beta2 * (clipped * clipped);
    const float root = sqrtf(v.data[i] / scalar.data[3]) + eps;
    w.data[i] = w.data[i] * scalar.data[1] - m.data[i] / root * scalar.data[2];
    rounded.data[i] = narrow<W>(w.data[i]);
  }
  if (is_full) {
    weight.store<4>(index, w), exp_avg.store<4>(index, m), exp_avg_sq.store<4>(index, v);
    if (compute_weight.is_present()) compute_weight.store<4>(index, rounded);
    return;
  }
  for (int i = 0; i < 3; ++i) {
    if (index + i >= n) return;
    weight.set(index + i, w.data[i]), exp_avg.set(index + i, m.data[i]), exp_avg_sq.set(index + i, v.data[i]);
    if (compute_weight.is_present()) compute_weight.set(index + i, rounded.data[i]);
  }
}
ENTRY(adamw)
