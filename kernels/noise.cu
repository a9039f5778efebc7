// Uniform random numbers of each sample from the sample's own stream, as `noise` in src/op/noise.rs.
#include "philox.cuh"

// sample_keys [3, samples] → out [samples, count] in [0, 1), 24 bits each. A thread makes the four numbers of one block.
KERNEL(256)
void uniform_noise(Global<const i64> sample_keys, Global<float> out, u64 seed, int samples, int count, int purpose) {
  const int blocks = (count + 3) / 4;
  const i64 index = i64(block()) * 256 + thread();
  if (index >= i64(samples) * blocks) return;
  const int sample = int(index / blocks), first = int(index % blocks) * 4;
  const auto words = random_words(sample_stream(sample_keys, samples, sample, seed, u32(purpose)), u32(first / 4));
  for (int i = 0; i < 4 && first + i < count; ++i)
    out.set(i64(sample) * count + first + i, float(words.data[i] >> 8) * 5.9604644775390625e-8f);
}
ENTRY(uniform_noise)
