/* Control of kvspan's CUDA driver emulator (libcuda.so.1 without a GPU; see README.md).
 *
 * Plain C, found with dlsym or ctypes: a test never links the emulator. A CUresult is an int, a
 * CUdeviceptr an unsigned long long and a CUstream a void* here, so that cuda.h is not needed.
 * Every function may be called from any thread. None of them is counted, logged or charged time,
 * except that the two kernels cost a launch.
 */
#ifndef KVSPAN_EMULATOR_H_
#define KVSPAN_EMULATOR_H_

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define KVSPAN_EMULATOR_API __attribute__((visibility("default")))
#else
#define KVSPAN_EMULATOR_API
#endif

/* -- Options ----------------------------------------------------------------------------------- */

/* Starts over: options (NULL: those of the environment variable KVSPAN_EMULATOR), no violations, no
 * faults, counts and clocks at zero, streams not held unless options say so, and as if cuInit had
 * never been called. 0: done. 1: refused, the ledger is not empty. 2: refused, an option is unknown
 * or malformed. Why is printed to stderr and given by kvspan_emulator_last_error. */
KVSPAN_EMULATOR_API int kvspan_emulator_reset(const char* options);
KVSPAN_EMULATOR_API const char* kvspan_emulator_last_error(void);

/* -- Violations -------------------------------------------------------------------------------- */

/* What the client did that a driver leaves undefined. One that is neither expected nor cleared
 * makes the process exit with status 86. */
KVSPAN_EMULATOR_API unsigned long long kvspan_emulator_violations(void);          /* unexpected */
KVSPAN_EMULATOR_API unsigned long long kvspan_emulator_expected_violations(void); /* expected */
/* Text of the i-th unexpected violation, or NULL. Valid until the thread's next call of it. */
KVSPAN_EMULATOR_API const char* kvspan_emulator_violation(unsigned long long i);
/* Violations whose text contains `substring` are expected from now on. NULL: none is. */
KVSPAN_EMULATOR_API void kvspan_emulator_expect(const char* substring);
KVSPAN_EMULATOR_API void kvspan_emulator_clear_violations(void);

/* -- Ledger ------------------------------------------------------------------------------------ */

typedef struct kvspan_emulator_ledger_t {
  unsigned long long reservations;      /* cuMemAddressReserve */
  unsigned long long handles;           /* physical allocations, a released but mapped one too */
  unsigned long long handle_references; /* references that cuMemRelease still has to drop */
  unsigned long long mappings;          /* cuMemMap */
  unsigned long long streams;           /* created ones */
  unsigned long long events;
  unsigned long long pinned_allocations; /* cuMemHostAlloc, cuMemAllocHost, cuMemHostRegister */
  unsigned long long device_allocations; /* cuMemAlloc */
  unsigned long long contexts;           /* active primary contexts */
  unsigned long long pending_operations; /* submitted, not finished */
  unsigned long long device_bytes;       /* physical bytes in use, all devices */
} kvspan_emulator_ledger_t;

KVSPAN_EMULATOR_API void kvspan_emulator_ledger(kvspan_emulator_ledger_t* out);

/* -- Faults, counts, call log ------------------------------------------------------------------ */

/* The n-th call from now (1: the next one) of any name in the comma list `names` ("*": of any call
 * that can fail) returns `result` without doing anything, and so do the next times - 1 of them.
 * Names are plain, without _v2 ("cuMemAlloc"). Faults add up; names = NULL forgets them all. */
KVSPAN_EMULATOR_API void kvspan_emulator_fail(const char* names, unsigned long long n, int result,
                                              unsigned long long times);
KVSPAN_EMULATOR_API unsigned long long kvspan_emulator_injected(void); /* faults delivered */
/* Calls that returned an error (CUDA_ERROR_NOT_READY is none), injected ones included. */
KVSPAN_EMULATOR_API unsigned long long kvspan_emulator_failed_calls(void);
/* Calls of one name, and the handles they created, mapped, granted or unmapped. */
KVSPAN_EMULATOR_API unsigned long long kvspan_emulator_calls(const char* name);
KVSPAN_EMULATOR_API unsigned long long kvspan_emulator_handles(const char* name);
KVSPAN_EMULATOR_API unsigned long long kvspan_emulator_total_calls(void);
/* The last calls, oldest first, one a line: thread, lane, virtual time in microseconds, call,
 * result. Writes at most n bytes with the final zero, returns the bytes needed. */
KVSPAN_EMULATOR_API size_t kvspan_emulator_log(char* out, size_t n);

/* -- Streams and kernels ----------------------------------------------------------------------- */

/* 1: nothing on any stream runs until a synchronising call waits for it. 0: everything runs. */
KVSPAN_EMULATOR_API void kvspan_emulator_hold_streams(int hold);

/* Queues a "kernel" on `stream` (of the current context): it reads every tile of `tile` bytes that
 * [ptr, ptr + size) touches (0: exactly the range) and takes `duration_us` of virtual time. The
 * access is checked when it starts; the range must stay mapped until it ends. `token` (may be NULL)
 * names its result. Returns a CUresult. */
KVSPAN_EMULATOR_API int kvspan_emulator_read_kernel(void* stream, unsigned long long ptr,
                                                    size_t size, size_t tile, double duration_us,
                                                    unsigned long long* token);
/* As above, and it writes `value` to every byte of [ptr, ptr + size). */
KVSPAN_EMULATOR_API int kvspan_emulator_write_kernel(void* stream, unsigned long long ptr,
                                                     size_t size, size_t tile, double duration_us,
                                                     unsigned char value);
/* Checksum of the bytes [ptr, ptr + size) that the read kernel saw: CUDA_SUCCESS (0),
 * CUDA_ERROR_NOT_READY (600), CUDA_ERROR_ILLEGAL_ADDRESS (700: the access was a violation) or
 * CUDA_ERROR_INVALID_VALUE (1: no such token). Once fetched, a token is forgotten. */
KVSPAN_EMULATOR_API int kvspan_emulator_kernel_result(unsigned long long token,
                                                      unsigned long long* checksum);
/* The same checksum (FNV-1a, 64 bits) over host memory, to compare with. */
KVSPAN_EMULATOR_API unsigned long long kvspan_emulator_checksum(const void* data, size_t size);

/* Declares `stream` (of the current context) to be captured by the calling thread, in a mode of
 * CUstreamCaptureMode (0: global, 1: thread-local, 2: relaxed). Nothing is recorded: work that is
 * queued there is a violation, and so is an unsafe call that the modes forbid. One capture at a
 * time. Returns a CUresult. */
KVSPAN_EMULATOR_API int kvspan_emulator_begin_capture(void* stream, int mode);
KVSPAN_EMULATOR_API void kvspan_emulator_end_capture(void);

/* -- Device memory behind the client's back ---------------------------------------------------- */

/* Copies from or to mapped device memory at once, whatever the access rights and the streams.
 * 0: done. 1: not fully mapped, or the emulator has no memory (memory_free). */
KVSPAN_EMULATOR_API int kvspan_emulator_peek(unsigned long long ptr, void* out, size_t n);
KVSPAN_EMULATOR_API int kvspan_emulator_poke(unsigned long long ptr, const void* in, size_t n);

/* -- Virtual time ------------------------------------------------------------------------------ */

/* A lane is a host thread's virtual clock, in microseconds. Each thread has one of its own, begun
 * at the latest clock of all lanes; a single-threaded bench can play several threads by switching
 * between numbered lanes (>= 0; a new one begins at the clock of the lane that was left; -1: back
 * to the thread's own). */
KVSPAN_EMULATOR_API void kvspan_emulator_set_lane(int lane);
KVSPAN_EMULATOR_API double kvspan_emulator_clock(void);
KVSPAN_EMULATOR_API void kvspan_emulator_advance(double us);   /* the host computes */
KVSPAN_EMULATOR_API void kvspan_emulator_set_clock(double us); /* also backwards */
KVSPAN_EMULATOR_API double kvspan_emulator_lock_wait(void);    /* waited for a context's lock */
KVSPAN_EMULATOR_API double kvspan_emulator_call_time(void);    /* spent in calls, that included */
KVSPAN_EMULATOR_API double kvspan_emulator_sync_wait(void);    /* waited for streams and events */
/* Virtual time at which all that was submitted to `stream` (of the current context) has ended. */
KVSPAN_EMULATOR_API double kvspan_emulator_stream_end(void* stream);

#ifdef __cplusplus
}
#endif

#endif /* KVSPAN_EMULATOR_H_ */
