// The steps between the matrix products of the InfoNCE loss, one block per row: forward, the log-sum-exp of a query's
// logits in one pass; backward, the gradient of each dot product. Loads move WIDE neighboring elements at a time.
#include "device.cuh"

typedef ELEMENT T;

// dots [rows, columns]; the positive key of row r is column first + r → losses [rows] and normalizers [rows], the
// log-sum-exp of the logits scale · dots.
KERNEL(256)
void info_nce(Global<const float> dots, Global<const float> scale, Global<float> losses, Global<float> normalizers,
              int columns, int first) {
  const auto scratch = shared<float>(0, 8);
  const float s = scale[0];
  const i64 row = i64(block()) * columns;
  // The running maximum of the logits and the sum of exponentials relative to it.
  float running_max = -3e38f, sum = 0;
  for (int column = int(thread()) * WIDE; column < columns; column += 256 * WIDE) {
    const auto in = dots.load<WIDE>(row + column);
    float new_max = running_max;
    for (int i = 0; i < WIDE; ++i) new_max = fmaxf(new_max, s * in.data[i]);
    sum *= expf(running_max - new_max), running_max = new_max;
    for (int i = 0; i < WIDE; ++i) sum += expf(s * in.data[i] - running_max);
  }
  const float warp_maximum = warp_max(running_max);
  if (lane() == 0) scratch.set(warp(), warp_maximum);
  barrier();
  float new_max = scratch[0];
  for (u32 w = 1; w < 8; ++w) new_max = fmaxf(new_max, scratch[w]);
  sum = block_sum(sum * expf(running_max - new_max), scratch);
  if (thread() != 0) return;
  const float normalizer = new_max + logf(sum);
  normalizers.set(block(), normalizer);
  losses.set(block(), normalizer - s * dots[row + first + block()]);
}
ENTRY(info_nce)

// → g_dots [rows, columns]: the gradient of the loss times `upstream` with respect to each dot product; parts [rows]:
// its gradient with respect to the scale.
KERNEL(256)
void info_nce_backward(Global<const float> dots, Global<const float> scale, Global<const float> normalizers,
                       Global<const float> upstream, Global<T> g_dots, Global<float> parts, int columns, int first) {
  const auto scratch = shared<float>(0, 8);
  const float s = scale[0], normalizer = normalizers[block()], g_loss = upstream[0];
  const i64 row = i64(block()) * columns;
  const int positive = first + int(block());
  float sum = 0;
  for (int column = int(thread()) * WIDE; column < columns; column += 256 * WIDE) {
    const auto in = dots.load<WIDE>(row + column);
    Pack<T, WIDE> out;
    for (int i = 0; i < WIDE; ++i) {
      const float g = g_loss * (expf(s * in.data[i] - normalizer) - (column + i == positive ? 1.0f : 0.0f));
      sum += g * in.data[i];
      out.data[i] = narrow<T>(s * g);
    }
    g_dots.store<WIDE>(row + column, out);
  }
  sum = block_sum(sum, scratch);
  if (thread() == 0) parts.set(block(), sum);
}
ENTRY(info_nce_backward)
