// Moves a flat buffer toward another by a weight, which is a constant or, if present, a value in device memory.
#include "device.cuh"

// The formula of libtorch: starts at the nearer end, so that weights of 0 and 1 are exact.
DEVICE float lerp(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

// average, current [n]. Four elements per thread.
KERNEL(256)
void lerp_flat(Global<float> average, Global<const float> current, Global<const float> device_weight,
               float constant_weight, i64 n) {
  const i64 index = (i64(block()) * 256 + thread()) * 4;
  if (index >= n) return;
  const float weight = device_weight.is_present() ? device_weight[0] : constant_weight;
  if (weight == 0) return;
  if (index + 4 <= n) {
    auto a = average.load<4>(index);
    const auto b = current.load<4>(index);
    for (int i = 0; i < 4; ++i) a.data[i] = lerp(a.data[i], b.data[i], weight);
    average.store<4>(index, a);
    return;
  }
  for (i64 i = index; i < n; ++i) average.set(i, lerp(average[i], current[i], weight));
}
ENTRY(lerp_flat)
