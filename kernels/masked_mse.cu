// The squared error and its gradient in one pass. Loads and stores move WIDE neighboring elements at a time.
#include "device.cuh"

typedef ELEMENT T;

// pred and target [numel] → gradient [numel] or absent: the gradient of the sum with respect to pred; parts [blocks]:
// the sum of each block's squared errors. All are multiplied by `weight`.
KERNEL(256)
void masked_mse(Global<const T> pred, Global<const float> target, Global<T> gradient, Global<float> parts, i64 numel,
                float weight) {
  const auto scratch = shared<float>(0, 8);
  float sum = 0;
  for (i64 index = (i64(block()) * 256 + thread()) * WIDE; index < numel; index += i64(blocks()) * 256 * WIDE) {
    const auto p = pred.load<WIDE>(index);
    const auto t = target.load<WIDE>(index);
    Pack<T, WIDE> out;
    float squares = 0;
    for (int i = 0; i < WIDE; ++i) {
      const float error = wide(p.data[i]) - t.data[i];
      squares += error * error;
      out.data[i] = narrow<T>(2.0f * weight * error);
    }
    sum += squares;
    if (gradient.is_present()) gradient.store<WIDE>(index, out);
  }
  sum = block_sum(sum, scratch);
  if (thread() == 0) parts.set(block(), sum * weight);
}
ENTRY(masked_mse)
