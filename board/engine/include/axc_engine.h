// What this engine offers beyond the vendor's interface.
#pragma once

#include "ax_engine_api.h"
#include "axc_errors.h"

#ifdef __cplusplus
extern "C" {
#endif

// Version of these extensions; a client refuses one it does not know.
#define AXC_EXTENSIONS 4
AX_U32 axc_extensions(void);

// The kernels in use: portable, avx2, avx512, avx512_bf16, avx512_pairs, neon or neon_dotprod. AXC_ISA in the environment
// forces one.
const char* axc_isa(void);

// What the last failed call of this thread saw, in one line; empty when it had nothing to say.
const char* axc_last_error(void);

// Loads a file by shared memory map: nothing is copied, and processes share the pages. The file must not shrink.
AX_S32 axc_open(AX_ENGINE_HANDLE* handle, const char* path);

// Threads of the process-wide pool, 1..1024, from the next run on; 0: one for each CPU this process may use.
AX_S32 axc_set_threads(AX_U32 threads);
AX_U32 axc_threads(void);

// Bits that activations are rounded to where they meet integer weights, from the next run on: 16, as every model begins,
// or 8, which is faster and less exact.
AX_S32 axc_set_activation_bits(AX_ENGINE_HANDLE handle, AX_U32 bits);

// Runs with any numbers of tokens and history, not only a group's. A null output is not delivered. Returns
// AXC_ENGINE_NOT_FINITE, with all outputs delivered, when one of them holds an infinity or a NaN.
AX_S32 axc_run(AX_ENGINE_HANDLE handle, AX_U32 tokens, AX_U32 history, AX_ENGINE_IO_T* io);

// Rows of one sequence in a run over several: `tokens` rows after `history` cached ones.
typedef struct {
  AX_U32 tokens;
  AX_U32 history;
  const AX_VOID* mask;  // [tokens, history + tokens]
  AX_VOID* k_cache;     // [at least history + tokens, D]; the new rows are written behind the first `history`
  AX_VOID* v_cache;     // the same
} axc_segment;

// Whether a model can run the rows of several sequences at once, with the same bits for each as alone.
AX_U32 axc_takes_segments(AX_ENGINE_HANDLE handle);

// Runs rows of several sequences, which lie stacked in `indices`, `input` and the outputs, in the order of the segments.
// Buffers of K_cache, V_cache and mask are not read. Outputs and AXC_ENGINE_NOT_FINITE as for axc_run: the rows of the
// other sequences are complete then. A model that keeps nothing between tokens reads of a segment its `tokens` only.
AX_S32 axc_run_segments(AX_ENGINE_HANDLE handle, const axc_segment* segments, AX_U32 count, AX_ENGINE_IO_T* io);

// After such a run, in the same thread: the first row that is not finite, and the index of the output that has it.
void axc_not_finite(AX_U32* output, AX_U32* row);

// Wall time of the steps of one kind in this process since the last reset.
typedef struct {
  const char* kind;
  AX_U64 calls;
  AX_U64 nanoseconds;
} axc_counter;

// Fills at most `capacity` counters and returns how many there are.
AX_U32 axc_counters(axc_counter* out, AX_U32 capacity);
void axc_reset_counters(void);

#ifdef __cplusplus
}
#endif
