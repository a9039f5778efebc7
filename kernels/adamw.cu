// AdamW over flat buffers, in PyTorch's order of operations. All that changes from step to step is read from memory, so
// that a recorded graph of launches goes on being right: control = learning rate, weight decay, clip scale, and whether
// to move at all.
#include "device.cuh"

typedef GRADIENT G;
typedef WEIGHT W;

// Per tensor of the table: counts its updates, and → numbers [tensors, 4]: whether it moves, what decay leaves of a
// weight, the length of a step, the second moment's correction.
KERNEL(128) void adamw_numbers(Global<const float> control, Global<const float> decays, Global<const float> used,
                               Global<float> steps, Global<float> numbers, float log_beta1, float log_beta2,
                               int tensors) {
  const int tensor = block() * 128 + thread();
  if (tensor >= tensors) return;
  const bool moves = control[3] != 0 && used[tensor] != 0;
  float step = steps[tensor];
  if (moves) steps.set(tensor, step += 1);
  // 1 - β^step without the loss of digits that the difference would bring.
  const float first = -expm1f(step * log_beta1), second = -expm1f(step * log_beta2);
  const Pack<float, 4> number = {
      {float(moves), 1 - control[0] * control[1] * decays[tensor], moves ? control[0] / first : 0, second}};
  numbers.store<4>(4 * tensor, number);
}
ENTRY(adamw_numbers)

// Buffers [n]; owner [n / 128, rounded up]: which tensor a run of 128 elements belongs to. `narrowed`, where given,
// gets the weights once more in its own dtype. Four elements a thread.
KERNEL(256) void adamw(Global<float> weight, Global<float> first, Global<float> second, Global<const G> gradient,
                       Global<W> narrowed, Global<const int> owner, Global<const float> numbers,
                       Global<const float> control, i64 n, float rest1, float beta2, float rest2, float eps) {
  const i64 at = (i64(block()) * 256 + thread()) * 4;
  if (at >= n) return;
  const auto number = numbers.load<4>(4 * i64(owner[at / 128]));
  if (number.at[0] == 0) return;
  const float clip = control[2];
  const bool whole = at + 4 <= n;
  Pack<float, 4> w = {}, m = {}, v = {}, g = {};
  if (whole) {
    w = weight.load<4>(at), m = first.load<4>(at), v = second.load<4>(at);
    const auto in = gradient.load<4>(at);
    for (int i = 0; i < 4; ++i) g.at[i] = wide(in.at[i]);
  } else {
    for (int i = 0; i < 3; ++i)
      if (at + i < n) w.at[i] = weight[at + i], m.at[i] = first[at + i], v.at[i] = second[at + i], g.at[i] = wide(gradient[at + i]);
  }
  Pack<W, 4> low;
  for (int i = 0; i < 4; ++i) {
    const float up = g.at[i] * clip;
    m.at[i] += rest1 * (up - m.at[i]);
    v.at[i] = v.at[i] * beta2 + rest2 * (up * up);
    const float root = sqrtf(v.at[i] / number.at[3]) + eps;
    w.at[i] = w.at[i] * number.at[1] - m.at[i] / root * number.at[2];
    low.at[i] = narrow<W>(w.at[i]);
  }
  if (whole) {
    weight.store<4>(at, w), first.store<4>(at, m), second.store<4>(at, v);
    if (narrowed.given()) narrowed.store<4>(at, low);
    return;
  }
  for (int i = 0; i < 3; ++i) {
    if (at + i >= n) return;
    weight.set(at + i, w.at[i]), first.set(at + i, m.at[i]), second.set(at + i, v.at[i]);
    if (narrowed.given()) narrowed.set(at + i, low.at[i]);
  }
}
ENTRY(adamw)
