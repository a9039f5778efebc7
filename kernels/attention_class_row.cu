// The attention probabilities of the first query, the class token, over all tokens. One block per head of a sample.
#include "device.cuh"

typedef ELEMENT T;

// Elements per 16-byte load.
constexpr int load_width = 16 / sizeof(T);

// qkv [B, S, 3 · heads · head_width] → out fp32 [B, heads, S]. c is the softmax scale times log₂ e.
KERNEL(128, 8)
void attention_class_row(Global<const T> qkv, Global<float> out, int heads, int tokens, int head_width, float c) {
  const auto scores = shared<float>(0, tokens);
  const auto query = shared<float>(4 * tokens, head_width);
  const auto scratch = shared<float>(4 * (tokens + head_width), 4);
  const i64 width = i64(heads) * head_width,
            query_start = block() / heads * tokens * 3 * width + block() % heads * head_width;
  for (int i = thread(); i < head_width; i += 128) query.set(i, wide(qkv[query_start + i]) * c);
  barrier();
  for (int j = thread(); j < tokens; j += 128) {
    const i64 key_start = query_start + j * 3 * width + width;
    float score = 0;
    for (int i = 0; i < head_width; i += load_width) {
      const auto k = qkv.load<load_width>(key_start + i);
      for (int e = 0; e < load_width; ++e) score += query[i + e] * wide(k.data[e]);
    }
    scores.set(j, score);
  }
  barrier();
  float max_score = float_from_bits(0xFF800000);
  for (int j = lane(); j < tokens; j += 32) max_score = fmaxf(max_score, scores[j]);
  max_score = warp_max(max_score);
  float sum = 0;
  for (int j = thread(); j < tokens; j += 128) sum += exp2_approx(scores[j] - max_score);
  sum = block_sum(sum, scratch);
  for (int j = thread(); j < tokens; j += 128) {
    out.set(i64(block()) * tokens + j, exp2_approx(scores[j] - max_score) / sum);
  }
}
ENTRY(attention_class_row)
