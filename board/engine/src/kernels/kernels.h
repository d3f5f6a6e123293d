// The arithmetic, one table of functions for each instruction set. Rows are tokens, float32, dense.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../onnx.h"

namespace axc {

// How a matrix is multiplied.
enum class Arithmetic {
  Float,       // widened to float32; any type and block
  BFloat16,    // bfloat16 times activations rounded to bfloat16, where there are such products; else as Float
  Int8,        // 8-bit levels, one scale a row, times 16-bit activations
  Int8Blocks,  // 8-bit levels, one scale for each 32, 64 or 128 columns of a row, times 16-bit activations
  Int4,        // 4-bit levels, as Int8Blocks
};

// A weight in the file's layout [rows, columns]; value = scale x (level - zero point) where there are scales.
struct Matrix {
  Arithmetic arithmetic;
  Type type;
  const uint8_t* data;
  size_t rows, columns;
  size_t block = 0, blocks = 0;   // columns that share a scale and a zero point, and how often in a row; 0: none do
  Type scale_type = Type::None;   // Float or Float16
  const void* scales = nullptr;   // [rows, blocks]
  const int8_t* zeros = nullptr;  // [rows, blocks] or null: all are 0

  size_t stride() const { return columns * static_cast<size_t>(bits_of(type)) / 8; }
  size_t scale_bytes() const { return static_cast<size_t>(bits_of(scale_type)) / 8; }
};

constexpr size_t kBlock = 128;         // activations that share a scale
constexpr size_t kLeastGroup = 32;     // columns of a weight that share one, for integer arithmetic
constexpr size_t kLevelBytes = 256;    // of a block: room for 16 bits each
constexpr size_t kTokenChunk = 128;    // tokens that share one packing of a weight
constexpr size_t kTokensByDot = 4;     // up to here a weight is read in place, not packed

// Of activations.
enum class Precision { Bits16, Bits8 };

// The largest level: both bytes of 127 * 256 + 127 are signed 8-bit numbers.
constexpr float top_level(Precision precision) { return precision == Precision::Bits8 ? 127.0f : 32639.0f; }

// Activations rounded to levels, block by block: value = scale x level. Few rows lie one behind the other, as products
// of single rows read them; many lie side by side, block by block, as packed products do.
//
// A block is one group, or as many as a weight has scales for it.
struct Activations {
  Precision precision;
  size_t rows, columns;
  size_t group;     // columns: kBlock, or a divisor of it
  uint8_t* levels;  // kLevelBytes a block, in an order of the kernels' own; zeros behind `columns`; or bfloat16, unscaled
  float* scales;    // [entries, groups()], those of a block all the same
  int32_t* sums;    // [entries, groups()]; of what, is the kernels' own
  float* totals;    // [rows, blocks() * groups()], the sums of values; null where nobody asks for them

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
  float* y;               // [tokens, y_stride], from the weight's row `y_origin` on
  size_t y_stride, y_origin;
  const Matrix* next;     // of what the thread multiplies after this, and from which row on: it is fetched ahead
  size_t next_row;

  float* at(size_t token, size_t row) const { return y + token * y_stride + (row - y_origin); }
};

// Grouped-query attention over `history` cached and `tokens` current rows of `type`. The first token's position is `past`:
// so many cached rows come before it.
struct AttentionJob {
  Type type;
  size_t tokens, history, past, heads, kv_heads, head_dim;
  float scale, softcap;  // softcap 0: none
  const float* q;                                         // [tokens, heads * head_dim]
  const void *k_cache, *v_cache, *k_current, *v_current;  // [.., kv_heads * head_dim]
  const void* mask;                                       // [tokens, history + tokens]
  float* y;                                               // [tokens, heads * head_dim]
};

// A share of an attention: query heads [first_head, last_head) of one key/value head, tokens [first, last).
struct AttentionShare {
  size_t kv_head, first_head, last_head, first, last;
};

// How a gate is bent before it is multiplied with what it lets through.
enum class Activation { Silu, GeluTanh };

constexpr float kMasked = -60000;  // a mask at or below this hides a column

// Rows [first, last) of the weight. `scratch` has kLinearScratch bytes.
using LinearKernel = void (*)(const LinearJob& job, size_t first, size_t last, void* scratch);

struct Kernels {
  const char* name;
  bool (*runs_here)();
  bool rounds_bfloat16;  // whether there are products for Arithmetic::BFloat16
  void (*quantise)(const float* x, Arithmetic order, size_t first, size_t last, const Activations& out);
  LinearKernel linear;
  size_t (*attention_scratch)(const AttentionJob& job, size_t rows);
  void (*attend)(const AttentionJob& job, const AttentionShare& share, void* scratch);
  void (*rms_norm)(const float* x, const float* scale, float epsilon, size_t width, float* y);
  // moments: the mean, and 1 over the standard deviation. `scale` and `bias` may be null.
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

// The fastest that runs here, or the one AXC_ISA names. Throws Failure when that is unknown or does not run here.
const Kernels& kernels();

extern const Kernels kPortable;
#ifdef __x86_64__
extern const Kernels kAvx2, kAvx512, kAvx512Bf16, kAvx512Pairs;
#endif
#ifdef __aarch64__
extern const Kernels kNeon, kNeonDotprod;
#endif

}  // namespace axc
