// Streams, events and host functions.
#include <algorithm>

#include "call.h"

using emulator::Call;
using emulator::enter;
using emulator::Event;
using emulator::number;
using emulator::Operation;
using emulator::OperationPtr;
using emulator::Stream;
using emulator::text;
using emulator::ull;

namespace {

// A default stream is the current context's; a created one works without any.
unsigned needs_of(CUstream handle) {
  const bool named =
      handle != nullptr && handle != CU_STREAM_LEGACY && handle != CU_STREAM_PER_THREAD;
  return named ? Call::kInit : Call::kContext;
}

CUstream per_thread(CUstream stream) { return stream == nullptr ? CU_STREAM_PER_THREAD : stream; }

template <typename Body>
CUresult with_stream(const char* name, CUstream handle, Body&& body) {
  return enter(name, needs_of(handle), {number(handle)}, [&](Call& call) -> CUresult {
    Stream* stream = call.s.streams.find(handle, call.context);
    if (stream != nullptr) return body(call, stream);
    return call.violation(CUDA_ERROR_INVALID_HANDLE,
                          call.s.streams.was_destroyed(handle)
                              ? text("stream 0x%llx was destroyed already", ull(number(handle)))
                              : text("0x%llx is not a stream", ull(number(handle))));
  });
}

// The event, or nullptr after a violation.
Event* find_event(Call& call, CUevent handle) {
  Event* event = call.s.streams.find(handle);
  if (event == nullptr)
    call.violation(CUDA_ERROR_INVALID_HANDLE,
                   call.s.streams.was_destroyed(handle)
                       ? text("event 0x%llx was destroyed already", ull(number(handle)))
                       : text("0x%llx is not an event", ull(number(handle))));
  return event;
}

template <typename Body>
CUresult with_event(const char* name, CUevent handle, Body&& body) {
  return enter(name, Call::kInit, {number(handle)}, [&](Call& call) -> CUresult {
    Event* event = find_event(call, handle);
    return event == nullptr ? CUDA_ERROR_INVALID_HANDLE : body(call, event);
  });
}

CUresult create(const char* name, CUstream* out, unsigned flags, int priority) {
  return enter(name, Call::kContext, {flags}, [&](Call& call) -> CUresult {
    if (out == nullptr || (flags & ~1U) != 0)
      return call.misuse(CUDA_ERROR_INVALID_VALUE, "null, or unknown flags");
    // cuStreamCreateWithPriority: a priority outside the range is clamped.
    *out = call.s.streams.create(call.context, flags, std::clamp(priority, -5, 0));
    return CUDA_SUCCESS;
  });
}

CUresult record(const char* name, CUevent event_handle, CUstream handle) {
  return with_stream(name, handle, [&](Call& call, Stream* stream) -> CUresult {
    Event* event = find_event(call, event_handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (event->context != stream->context)
      return call.violation(CUDA_ERROR_INVALID_HANDLE, "event and stream are of two contexts");
    call.charge(0);
    auto operation = std::make_shared<Operation>();
    operation->name = "cuEventRecord";
    call.s.streams.submit(stream, operation);
    event->recorded = operation;
    return CUDA_SUCCESS;
  });
}

CUresult wait_event(CUstream handle, CUevent event_handle, unsigned flags) {
  return with_stream("cuStreamWaitEvent", handle, [&](Call& call, Stream* stream) -> CUresult {
    Event* event = find_event(call, event_handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (flags != 0) return call.misuse(CUDA_ERROR_INVALID_VALUE, "flags must be 0 here");
    call.charge(0);
    // cuStreamWaitEvent: an event that was never recorded makes nobody wait.
    if (event->recorded == nullptr) return CUDA_SUCCESS;
    auto operation = std::make_shared<Operation>();
    operation->name = "cuStreamWaitEvent";
    operation->after = {event->recorded};
    call.s.streams.submit(stream, operation);
    return CUDA_SUCCESS;
  });
}

CUresult synchronize(CUstream handle) {
  return with_stream("cuStreamSynchronize", handle, [&](Call& call, Stream* stream) -> CUresult {
    call.charge(0);
    return call.s.streams.wait(call.lock, stream);
  });
}

CUresult query(CUstream handle) {
  return with_stream("cuStreamQuery", handle, [&](Call& call, Stream* stream) -> CUresult {
    call.charge(0);
    if (!call.s.streams.finished(stream->last)) {
      call.s.streams.count_query(stream->last);
      return CUDA_ERROR_NOT_READY;
    }
    return std::exchange(stream->error, CUDA_SUCCESS);
  });
}

CUresult host_function(CUstream handle, CUhostFn function, void* data) {
  return with_stream("cuLaunchHostFunc", handle, [&](Call& call, Stream* stream) -> CUresult {
    if (function == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "no function");
    call.charge(0);
    auto operation = std::make_shared<Operation>();
    operation->kind = Operation::Kind::kHost;
    operation->name = "cuLaunchHostFunc";
    operation->host_function = function;
    operation->host_data = data;
    call.s.streams.submit(stream, operation);
    return CUDA_SUCCESS;
  });
}

template <typename Value, typename Get>
CUresult get(const char* name, CUstream handle, Value* out, Get&& value) {
  return with_stream(name, handle, [&](Call& call, Stream* stream) -> CUresult {
    if (out == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    *out = static_cast<Value>(value(stream));
    return CUDA_SUCCESS;
  });
}

CUresult get_context(CUstream handle, CUcontext* context) {
  return with_stream("cuStreamGetCtx", handle, [&](Call& call, Stream* stream) -> CUresult {
    if (context == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    *context = reinterpret_cast<CUcontext>(stream->context);
    return CUDA_SUCCESS;
  });
}

CUresult elapsed(float* milliseconds, CUevent start, CUevent end) {
  return enter(
      "cuEventElapsedTime", Call::kInit, {number(start), number(end)}, [&](Call& call) -> CUresult {
        if (milliseconds == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
        Event* first = find_event(call, start);
        Event* second = first == nullptr ? nullptr : find_event(call, end);
        if (second == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        if (first->context != second->context)
          return call.violation(CUDA_ERROR_INVALID_HANDLE, "events of two contexts");
        if (((first->flags | second->flags) & CU_EVENT_DISABLE_TIMING) != 0)
          return call.misuse(CUDA_ERROR_INVALID_HANDLE, "an event without timing");
        if (first->recorded == nullptr || second->recorded == nullptr)
          return call.misuse(CUDA_ERROR_INVALID_HANDLE, "an event was not recorded");
        if (!call.s.streams.finished(first->recorded) || !call.s.streams.finished(second->recorded))
          return CUDA_ERROR_NOT_READY;
        *milliseconds =
            static_cast<float>((second->recorded->end_us - first->recorded->end_us) / 1000);
        return CUDA_SUCCESS;
      });
}

}  // namespace

CUresult CUDAAPI cuStreamCreate(CUstream* stream, unsigned int flags) {
  return create("cuStreamCreate", stream, flags, 0);
}

CUresult CUDAAPI cuStreamCreateWithPriority(CUstream* stream, unsigned int flags, int priority) {
  return create("cuStreamCreateWithPriority", stream, flags, priority);
}

CUresult CUDAAPI cuStreamDestroy_v2(CUstream handle) {
  return with_stream("cuStreamDestroy", handle, [&](Call& call, Stream*) -> CUresult {
    if (needs_of(handle) == Call::kContext)
      return call.violation(CUDA_ERROR_INVALID_HANDLE, "a default stream cannot be destroyed");
    call.charge(0);
    call.s.streams.destroy(handle);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuStreamSynchronize(CUstream stream) { return synchronize(stream); }
CUresult CUDAAPI cuStreamQuery(CUstream stream) { return query(stream); }
CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
  return wait_event(stream, event, flags);
}
CUresult CUDAAPI cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
  return host_function(stream, function, data);
}
CUresult CUDAAPI cuStreamGetFlags(CUstream stream, unsigned int* flags) {
  return get("cuStreamGetFlags", stream, flags, [](Stream* s) { return s->flags; });
}
CUresult CUDAAPI cuStreamGetPriority(CUstream stream, int* priority) {
  return get("cuStreamGetPriority", stream, priority, [](Stream* s) { return s->priority; });
}
CUresult CUDAAPI cuStreamGetId(CUstream stream, unsigned long long* id) {
  return get("cuStreamGetId", stream, id, [](Stream* s) { return s->id; });
}
CUresult CUDAAPI cuStreamGetDevice(CUstream stream, CUdevice* device) {
  return get("cuStreamGetDevice", stream, device, [](Stream* s) { return s->context->device; });
}
CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return with_stream("cuStreamIsCapturing", stream, [&](Call& call, Stream* s) -> CUresult {
    if (status == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (call.s.capture.is_implied_by(*s)) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    *status = call.s.capture.stream == s ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                         : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
  });
}
CUresult CUDAAPI cuStreamGetCtx(CUstream stream, CUcontext* context) {
  return get_context(stream, context);
}
CUresult CUDAAPI cuStreamGetCtx_v2(CUstream stream, CUcontext* context, CUgreenCtx* green) {
  if (green != nullptr) *green = nullptr;
  return get_context(stream, context);
}

CUresult CUDAAPI cuEventCreate(CUevent* out, unsigned int flags) {
  return enter("cuEventCreate", Call::kContext, {flags}, [&](Call& call) -> CUresult {
    if (out == nullptr || (flags & ~7U) != 0)
      return call.misuse(CUDA_ERROR_INVALID_VALUE, "null, or unknown flags");
    if ((flags & CU_EVENT_INTERPROCESS) != 0) return CUDA_ERROR_NOT_SUPPORTED;
    *out = call.s.streams.create_event(call.context, flags);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
  return record("cuEventRecord", event, stream);
}
CUresult CUDAAPI cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned int flags) {
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  return record("cuEventRecordWithFlags", event, stream);
}

CUresult CUDAAPI cuEventQuery(CUevent handle) {
  return with_event("cuEventQuery", handle, [](Call& call, Event* event) -> CUresult {
    call.charge(0);
    // cuEventQuery: an event that was never recorded is complete.
    const OperationPtr recorded = event->recorded;
    if (call.s.streams.finished(recorded)) return CUDA_SUCCESS;
    call.s.streams.count_query(recorded);
    return CUDA_ERROR_NOT_READY;
  });
}

CUresult CUDAAPI cuEventSynchronize(CUevent handle) {
  return with_event("cuEventSynchronize", handle, [](Call& call, Event* event) -> CUresult {
    call.charge(0);
    const OperationPtr recorded = event->recorded;
    call.s.streams.wait(call.lock, recorded);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuEventDestroy_v2(CUevent handle) {
  return with_event("cuEventDestroy", handle, [&](Call& call, Event*) -> CUresult {
    call.s.streams.destroy(handle);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
  return elapsed(milliseconds, start, end);
}
#undef cuEventElapsedTime
EMULATOR_EXPORT CUresult CUDAAPI cuEventElapsedTime(float* milliseconds, CUevent start,
                                                    CUevent end) {
  return elapsed(milliseconds, start, end);
}

CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return enter("cuThreadExchangeStreamCaptureMode", Call::kInit, {}, [&](Call& call) -> CUresult {
    if (mode == nullptr) return call.misuse(CUDA_ERROR_INVALID_VALUE, "null");
    std::swap(emulator::capture_mode(), *mode);
    return CUDA_SUCCESS;
  });
}

// For clients that were compiled for per-thread default streams.
EMULATOR_EXPORT CUresult CUDAAPI cuStreamSynchronize_ptsz(CUstream stream) {
  return synchronize(per_thread(stream));
}
EMULATOR_EXPORT CUresult CUDAAPI cuStreamQuery_ptsz(CUstream stream) {
  return query(per_thread(stream));
}
EMULATOR_EXPORT CUresult CUDAAPI cuStreamWaitEvent_ptsz(CUstream stream, CUevent event,
                                                        unsigned int flags) {
  return wait_event(per_thread(stream), event, flags);
}
EMULATOR_EXPORT CUresult CUDAAPI cuLaunchHostFunc_ptsz(CUstream stream, CUhostFn function,
                                                       void* data) {
  return host_function(per_thread(stream), function, data);
}
EMULATOR_EXPORT CUresult CUDAAPI cuEventRecord_ptsz(CUevent event, CUstream stream) {
  return record("cuEventRecord", event, per_thread(stream));
}
EMULATOR_EXPORT CUresult CUDAAPI cuEventRecordWithFlags_ptsz(CUevent event, CUstream stream,
                                                             unsigned int flags) {
  return cuEventRecordWithFlags(event, per_thread(stream), flags);
}
EMULATOR_EXPORT CUresult CUDAAPI cuStreamGetFlags_ptsz(CUstream stream, unsigned int* flags) {
  return cuStreamGetFlags(per_thread(stream), flags);
}
EMULATOR_EXPORT CUresult CUDAAPI cuStreamGetPriority_ptsz(CUstream stream, int* priority) {
  return cuStreamGetPriority(per_thread(stream), priority);
}
EMULATOR_EXPORT CUresult CUDAAPI cuStreamGetId_ptsz(CUstream stream, unsigned long long* id) {
  return cuStreamGetId(per_thread(stream), id);
}
EMULATOR_EXPORT CUresult CUDAAPI cuStreamGetDevice_ptsz(CUstream stream, CUdevice* device) {
  return cuStreamGetDevice(per_thread(stream), device);
}
EMULATOR_EXPORT CUresult CUDAAPI cuStreamIsCapturing_ptsz(CUstream stream,
                                                          CUstreamCaptureStatus* status) {
  return cuStreamIsCapturing(per_thread(stream), status);
}
EMULATOR_EXPORT CUresult CUDAAPI cuStreamGetCtx_ptsz(CUstream stream, CUcontext* context) {
  return get_context(per_thread(stream), context);
}
EMULATOR_EXPORT CUresult CUDAAPI cuStreamGetCtx_v2_ptsz(CUstream stream, CUcontext* context,
                                                        CUgreenCtx* green) {
  return cuStreamGetCtx_v2(per_thread(stream), context, green);
}
