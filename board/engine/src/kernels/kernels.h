// The kernels: one table of functions per instruction set. Rows are tokens, dense float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../onnx.h"

namespace axc {

// How a matrix is multiplied.
enum class Arithmetic {
  Float,       // widened to float32; any type and block
  BFloat16,    // bfloat16 times activations rounded to bfloat16, if the CPU has such products; else like Float
  Int8,        // 8-bit levels, one scale a row, times 16-bit activations
  Int8Blocks,  // 8-bit levels, one scale for each 32, 64 or 128 columns of a row, times 16-bit activations
  Int4,        // 4-bit levels, scaled like Int8Blocks
};

// A weight in the file's layout [rows, columns]; value = scale x (level - zero point) if it has scales.
struct Matrix {
  Arithmetic arithmetic;
  Type type;
  const uint8_t* data;
  size_t rows, columns;
  size_t block = 0, blocks = 0;   // columns that share a scale and a zero point; blocks of a row; 0: no scales
  Type scale_type = Type::None;   // Float or Float16
  const void* scales = nullptr;   // [rows, blocks]
  const int8_t* zeros = nullptr;  // [rows, blocks] or null: all are 0

  size_t stride() const { return columns * static_cast<size_t>(bits_of(type)) / 8; }
  size_t scale_bytes() const { return static_cast<size_t>(bits_of(scale_type)) / 8; }
};

constexpr size_t kBlock = 128;         // activations that share a scale
constexpr size_t kLeastGroup = 32;     // fewest columns of a weight that share a scale in integer arithmetic
constexpr size_t kLevelBytes = 256;    // bytes of a block: 16 bits for each level
constexpr size_t kTokenChunk = 128;    // tokens that share one packing of a weight
constexpr size_t kTokensByDot = 4;     // with at most so many tokens a weight is read in place, not packed

// Rounding of activations.
enum class Precision { Bits16, Bits8 };

// The largest level: both bytes of 127 * 256 + 127 are signed 8-bit numbers.
constexpr float top_level(Precision precision) { return precision == Precision::Bits8 ? 127.0f : 32639.0f; }

// Activations rounded to levels by blocks: value = scale x level. A few rows are stored one after the other, for products
// of single rows; many are interleaved by block, for packed products.
//
// A block has one group, or as many as the weight has scales for it.
struct Activations {
  Precision precision;
  size_t rows, columns;
  size_t group;     // columns: kBlock, or a divisor of it
  uint8_t* levels;  // kLevelBytes a block, in an order that the kernel chooses, zero padded; or bfloat16, unscaled
  float* scales;    // [entries, groups()], equal within a block
  int32_t* sums;    // [entries, groups()]; the kernel decides of what
  float* totals;    // [rows, blocks() * groups()], sums of values; null if not needed

  size_t blocks() const { return (columns + kBlock - 1) / kBlock; }
  size_t groups() const { return kBlock / group; }
  size_t entry(size_t block, size_t row) const {
    return rows <= kTokensByDot ? row * blocks() + block : block * rows + row;
  }
};

// y = x w^T + bias + residual; x is `levels` for integer arithmetic, `x` for float.
struct LinearJob {
  const Matrix* weight;
  size_t tokens;
  const float* x;
  const Activations* levels;
  const float* bias;      // [rows] or null
  const float* residual;  // [tokens, rows] or null
  float* y;               // [tokens, y_stride]; its column 0 is the weight's row `y_origin`
  size_t y_stride, y_origin;
  const Matrix* next;     // the thread's next weight and its first row, for prefetching
  size_t next_row;

  float* at(size_t token, size_t row) const { return y + token * y_stride + (row - y_origin); }
};

// Grouped-query attention over `history` cached and `tokens` current rows of `type`. `past` cached rows precede the first
// token; it is that token's position.
struct AttentionJob {
  Type type;
  size_t tokens, history, past, heads, kv_heads, head_dim;
  float scale, softcap;  // softcap 0: none
  const float* q;                                         // [tokens, heads * head_dim]
  const void *k_cache, *v_cache, *k_current, *v_current;  // [.., kv_heads * head_dim]
  const void* mask;                                       // [tokens, history + tokens]
  float* y;                                               // [tokens, heads * head_dim]
};

// A part of an attention: query heads [first_head, last_head) of one key/value head, tokens [first, last).
struct AttentionShare {
  size_t kv_head, first_head, last_head, first, last;
};

// The activation of a gated MLP.
enum class Activation { Silu, GeluTanh };

constexpr float kMasked = -60000;  // columns with a mask value at or below this are masked

// Rows [first, last) of the weight. `scratch` has kLinearScratch bytes.
using LinearKernel = void (*)(const LinearJob& job, size_t first, size_t last, void* scratch);

struct Kernels {
  const char* name;
  bool (*runs_here)();
  bool rounds_bfloat16;  // whether Arithmetic::BFloat16 has products of its own
  void (*quantise)(const float* x, Arithmetic order, size_t first, size_t last, const Activations& out);
  LinearKernel linear;
  size_t (*attention_scratch)(const AttentionJob& job, size_t rows);
  void (*attend)(const AttentionJob& job, const AttentionShare& share, void* scratch);
  void (*rms_norm)(const float* x, const float* scale, float epsilon, size_t width, float* y);
  // moments: mean and inverse standard deviation. `scale` and `bias` may be null.
  void (*layer_norm)(const float* x, const float* scale, const float* bias, float epsilon, size_t width, float* y,
                     float* moments);
  void (*gated)(Activation activation, const float* gate, const float* up, size_t count, float* y);
  void (*sigmoid)(const float* x, size_t count, float* y);
  void (*tanh)(const float* x, size_t count, float* y);
  void (*gelu_tanh)(const float* x, size_t count, float* y);
  void (*softmax)(const float* x, size_t width, float* y);
  void (*rotate)(const float* x, const float* cos, const float* sin, size_t heads, size_t half, float* y);
  void (*widen)(Type type, const void* x, size_t count, float* y);
  void (*narrow)(Type type, const float* x, size_t count, void* y);
};

constexpr size_t kLinearScratch = 128 << 10;

// The fastest kernels for this CPU, or those named by AXC_ISA. Throws Failure if they are unknown or cannot run here.
const Kernels& kernels();

extern const Kernels kPortable;
#ifdef __x86_64__
extern const Kernels kAvx2, kAvx512, kAvx512Bf16, kAvx512Pairs;
#endif
#ifdef __aarch64__
extern const Kernels kNeon, kNeonDotprod;
#endif

}  // namespace axc
