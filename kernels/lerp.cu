// A flat buffer moves towards another by a share, which is a number or, where given, a value in memory.
#include "device.cuh"

// As libtorch has it: from the nearer end, so that shares of 0 and 1 are exact.
DEVICE float moved(float from, float to, float share) {
  return share < 0.5f ? from + share * (to - from) : to - (to - from) * (1 - share);
}

// average, current [n]. Four elements a thread.
KERNEL(256) void lerp_flat(Global<float> average, Global<const float> current, Global<const float> value, float number,
                           i64 n) {
  const i64 at = (i64(block()) * 256 + thread()) * 4;
  if (at >= n) return;
  const float share = value.given() ? value[0] : number;
  if (share == 0) return;
  if (at + 4 <= n) {
    auto a = average.load<4>(at);
    const auto b = current.load<4>(at);
    for (int i = 0; i < 4; ++i) a.at[i] = moved(a.at[i], b.at[i], share);
    average.store<4>(at, a);
    return;
  }
  for (i64 i = at; i < n; ++i) average.set(i, moved(average[i], current[i], share));
}
ENTRY(lerp_flat)
