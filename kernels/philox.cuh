// The random stream of a sample (src/rng.rs).
#pragma once
#include "device.cuh"

struct Stream {
  u32 key[2], counter[4];
};

// Philox4x32-10: returns the four words from 4 i on.
DEVICE Pack<u32, 4> random_words(const Stream& stream, u32 i) {
  u32 a = stream.counter[0], b = stream.counter[1], c = stream.counter[2], d = stream.counter[3] + i;
  u32 k = stream.key[0], l = stream.key[1];
  for (int round = 0; round < 10; ++round) {
    const u32 high_a = mul_high(a, 0xD2511F53u), low_a = a * 0xD2511F53u;
    const u32 high_c = mul_high(c, 0xCD9E8D57u), low_c = c * 0xCD9E8D57u;
    a = high_c ^ b ^ k, b = low_c, c = high_a ^ d ^ l, d = low_a;
    k += 0x9E3779B9u, l += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

DEVICE u32 random_word(const Stream& stream, u32 i) {
  const auto words = random_words(stream, i / 4);
  const u32 low = i % 2 ? words.data[1] : words.data[0], high = i % 2 ? words.data[3] : words.data[2];
  return i % 4 / 2 ? high : low;
}

// The stream of a sample for a purpose; sample_keys [3, samples]: ids, epochs, repeats.
DEVICE Stream sample_stream(Global<const i64> sample_keys, int samples, int sample, u64 seed, u32 purpose) {
  const u64 id = u64(sample_keys[sample]);
  const u32 epoch = u32(sample_keys[samples + sample]), repeat = u32(sample_keys[2 * samples + sample]);
  return {{u32(seed), u32(seed >> 32)}, {u32(id), u32(id >> 32), epoch * 256 + purpose, repeat << 20}};
}
