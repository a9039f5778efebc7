// The squared error, and its gradient in the same pass. WIDE neighbours are moved at a time.
#include "device.cuh"

typedef ELEMENT T;

// guess and truth [numel] → gradient [numel] or absent, that of the sum for guess; parts [blocks]: the sums of the
// squares that each block met, all times `share`.
KERNEL(256) void masked_mse(Global<const T> guess, Global<const float> truth, Global<T> gradient, Global<float> parts,
                            i64 numel, float share) {
  const auto room = shared<float>(0, 8);
  float sum = 0;
  for (i64 at = (i64(block()) * 256 + thread()) * WIDE; at < numel; at += i64(blocks()) * 256 * WIDE) {
    const auto ours = guess.load<WIDE>(at);
    const auto wanted = truth.load<WIDE>(at);
    Pack<T, WIDE> out;
    float squares = 0;
    for (int i = 0; i < WIDE; ++i) {
      const float off = wide(ours.at[i]) - wanted.at[i];
      squares += off * off;
      out.at[i] = narrow<T>(2.0f * share * off);
    }
    sum += squares;
    if (gradient.given()) gradient.store<WIDE>(at, out);
  }
  sum = block_sum(sum, room);
  if (thread() == 0) parts.set(block(), sum * share);
}
ENTRY(masked_mse)
