// llama.cpp's products of 8 rows with some tokens, between two marks in the trace of its instructions.
// Arguments: type of the weight (q8_0, q4_0), which kernels (dot: a row with a token; repacked), columns, tokens.
#include "freestanding.h"

extern "C" {
using Dot = void(int n, float* s, size_t bs, const void* x, size_t bx, const void* y, size_t by, int nrc);
using Repacked = void(int n, float* s, size_t bs, const void* x, const void* y, int nr, int nc);
Dot ggml_vec_dot_q8_0_q8_0, ggml_vec_dot_q4_0_q8_0;
#ifdef REPACKED
Repacked ggml_gemv_q8_0_4x4_q8_0, ggml_gemv_q4_0_4x4_q8_0, ggml_gemm_q8_0_4x4_q8_0, ggml_gemm_q4_0_4x4_q8_0;
#endif
}

int traced(char** arguments) {
  const bool four = arguments[1][1] == '4', repacked = arguments[2][0] == 'r';
  const int columns = static_cast<int>(number(arguments[3])), tokens = static_cast<int>(number(arguments[4])), rows = 8;
  const size_t stride = columns / 32 * (four ? 18 : 34), token_stride = columns / 32 * 34;  // with a float16 each 32
  const uint8_t *x = zeros<uint8_t>(rows * stride), *y = zeros<uint8_t>(tokens * token_stride);
  float* out = zeros<float>(rows * tokens);
  const auto dot = four ? ggml_vec_dot_q4_0_q8_0 : ggml_vec_dot_q8_0_q8_0;
  trace_begin();
  if (!repacked) {
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < rows; ++r) {
        dot(columns, &out[t * rows + r], 0, &x[r * stride], 0, &y[t * token_stride], 0, 1);
      }
    }
  }
#ifdef REPACKED
  if (repacked && tokens == 1) {
    (four ? ggml_gemv_q4_0_4x4_q8_0 : ggml_gemv_q8_0_4x4_q8_0)(columns, out, rows, x, y, 1, rows);
  } else if (repacked) {
    (four ? ggml_gemm_q4_0_4x4_q8_0 : ggml_gemm_q8_0_4x4_q8_0)(columns, out, rows, x, y, tokens, rows);
  }
#endif
  trace_end();
  return 0;
}
