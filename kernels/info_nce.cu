// What lies between the matrix products of a contrastive loss, one block a row: of the dot products of a query with
// every key, the log-sum-exp in one pass; and, backwards, the slope of each dot product. WIDE neighbours at a time.
#include "device.cuh"

typedef ELEMENT T;

// dots [rows, columns], row r's own key being column first + r → losses, normals [rows]: the row's loss, and the
// log-sum-exp of its logits scale · dots.
KERNEL(256) void info_nce(Global<const float> dots, Global<const float> scale, Global<float> losses,
                          Global<float> normals, int columns, int first) {
  const auto room = shared<float>(0, 8);
  const float s = scale[0];
  const i64 row = i64(block()) * columns;
  // The greatest logit so far, and the sum of exponentials against it.
  float most = -3e38f, sum = 0;
  for (int at = int(thread()) * WIDE; at < columns; at += 256 * WIDE) {
    const auto in = dots.load<WIDE>(row + at);
    float high = most;
    for (int i = 0; i < WIDE; ++i) high = fmaxf(high, s * in.at[i]);
    sum *= expf(most - high), most = high;
    for (int i = 0; i < WIDE; ++i) sum += expf(s * in.at[i] - most);
  }
  const float of_warp = warp_max(most);
  if (lane() == 0) room.set(warp(), of_warp);
  barrier();
  float high = room[0];
  for (u32 w = 1; w < 8; ++w) high = fmaxf(high, room[w]);
  sum = block_sum(sum * expf(most - high), room);
  if (thread() != 0) return;
  const float normal = high + logf(sum);
  normals.set(block(), normal);
  losses.set(block(), normal - s * dots[row + first + block()]);
}
ENTRY(info_nce)

// → slopes [rows, columns]: of the loss times `upstream` by each dot product; parts [rows]: by the scale.
KERNEL(256) void info_nce_backward(Global<const float> dots, Global<const float> scale, Global<const float> normals,
                                   Global<const float> upstream, Global<T> slopes, Global<float> parts, int columns,
                                   int first) {
  const auto room = shared<float>(0, 8);
  const float s = scale[0], normal = normals[block()], up = upstream[0];
  const i64 row = i64(block()) * columns;
  const int own = first + int(block());
  float sum = 0;
  for (int at = int(thread()) * WIDE; at < columns; at += 256 * WIDE) {
    const auto in = dots.load<WIDE>(row + at);
    Pack<T, WIDE> out;
    for (int i = 0; i < WIDE; ++i) {
      const float g = up * (expf(s * in.at[i] - normal) - (at + i == own ? 1.0f : 0.0f));
      sum += g * in.at[i];
      out.at[i] = narrow<T>(s * g);
    }
    slopes.store<WIDE>(row + at, out);
  }
  sum = block_sum(sum, room);
  if (thread() == 0) parts.set(block(), sum);
}
ENTRY(info_nce_backward)
