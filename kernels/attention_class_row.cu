// The probabilities with which the first query, the class token's, looks at each token. One block a head of a sample.
#include "device.cuh"

typedef ELEMENT T;

// Elements that are moved at a time.
constexpr int wide_load = 16 / sizeof(T);

// qkv [B, S, 3 · heads · head] → out fp32 [B, heads, S]; c is the scale times log₂ e.
KERNEL(128, 8) void attention_class_row(Global<const T> qkv, Global<float> out, int heads, int tokens, int head, float c) {
  const auto scores = shared<float>(0, tokens);
  const auto query = shared<float>(4 * tokens, head);
  const auto room = shared<float>(4 * (tokens + head), 4);
  const i64 width = i64(heads) * head, first = block() / heads * tokens * 3 * width + block() % heads * head;
  for (int i = thread(); i < head; i += 128) query.set(i, wide(qkv[first + i]) * c);
  barrier();
  for (int j = thread(); j < tokens; j += 128) {
    const i64 row = first + j * 3 * width + width;
    float score = 0;
    for (int i = 0; i < head; i += wide_load) {
      const auto k = qkv.load<wide_load>(row + i);
      for (int e = 0; e < wide_load; ++e) score += query[i + e] * wide(k.at[e]);
    }
    scores.set(j, score);
  }
  barrier();
  float top = of_bits(0xFF800000);
  for (int j = lane(); j < tokens; j += 32) top = fmaxf(top, scores[j]);
  top = warp_max(top);
  float sum = 0;
  for (int j = thread(); j < tokens; j += 128) sum += power_of_two(scores[j] - top);
  sum = block_sum(sum, room);
  for (int j = thread(); j < tokens; j += 128) {
    out.set(i64(block()) * tokens + j, power_of_two(scores[j] - top) / sum);
  }
}
ENTRY(attention_class_row)
