// The CUDA library of the bridge: streams, events, graphs, memory. It is a shared object that the program loads after
// libtorch_cuda, so that the program needs no CUDA library; it exports one function, which returns a table of the
// others. `CudaFns` and its structures are mirrored, member by member, in cuda/functions.rs.

#include "bridge.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace {

using at::cuda::CUDAGraph;
using c10::cuda::CUDAEvent;
using c10::cuda::CUDAStream;

struct Stream {
  int64_t id;  // libtorch's stream id, which encodes the pool
  int64_t device;
  void* raw;  // cudaStream_t
};

struct DeviceProperties {
  char name[256];
  int64_t multiprocessors, total_memory, major, minor;
};

struct MemoryStats {
  int64_t allocated, peak_allocated, reserved, peak_reserved;  // bytes
};

struct GraphPool {
  uint64_t id[2];
};

namespace functions {

// Runs the body of a function if there is a device; libtorch's own messages for a missing one vary from call to call.
template <class Body>
bool on_device(Body body) {
  return occlude::guarded([&] {
    if (c10::cuda::device_count() == 0) throw std::runtime_error("no CUDA here: libtorch finds no usable device");
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    body();
  });
}

c10::DeviceIndex index(int64_t device) {
  const int64_t count = c10::cuda::device_count();
  if (device < 0 || device >= count) {
    throw std::runtime_error("device " + std::to_string(device) + " is asked for, and there are " +
                             std::to_string(count));
  }
  return static_cast<c10::DeviceIndex>(device);
}

Stream to_raw(const CUDAStream& stream) { return {stream.id(), stream.device_index(), stream.stream()}; }

CUDAStream from_raw(const Stream* stream) {
  return CUDAStream::unpack3(stream->id, static_cast<c10::DeviceIndex>(stream->device), c10::DeviceType::CUDA);
}

// ---- streams -------------------------------------------------------------------------------------------------------

bool current_device(int64_t* out) {
  return on_device([&] { *out = c10::cuda::current_device(); });
}

bool set_device(int64_t device) {
  return on_device([&] { c10::cuda::set_device(index(device)); });
}

bool stream_current(int64_t device, Stream* out) {
  return on_device([&] { *out = to_raw(c10::cuda::getCurrentCUDAStream(index(device))); });
}

bool stream_set_current(const Stream* stream) {
  return on_device([&] { c10::cuda::setCurrentCUDAStream(from_raw(stream)); });
}

bool stream_from_pool(int64_t device, bool high_priority, Stream* out) {
  return on_device([&] { *out = to_raw(c10::cuda::getStreamFromPool(high_priority, index(device))); });
}

bool stream_external(void* raw, int64_t device, Stream* out) {
  return on_device([&] {
    *out = to_raw(c10::cuda::getStreamFromExternal(static_cast<cudaStream_t>(raw), index(device)));
  });
}

bool stream_synchronize(const Stream* stream) {
  return on_device([&] { from_raw(stream).synchronize(); });
}

bool stream_is_capturing(const Stream* stream, bool* capturing) {
  return on_device([&] {
    cudaStreamCaptureStatus status;
    C10_CUDA_CHECK(cudaStreamIsCapturing(from_raw(stream).stream(), &status));
    *capturing = status != cudaStreamCaptureStatusNone;
  });
}

bool record_stream(const at::Tensor* tensor, const Stream* stream) {
  return on_device([&] { tensor->record_stream(from_raw(stream).unwrap()); });
}

bool synchronize(int64_t device) {
  return on_device([&] {
    const c10::cuda::CUDAGuard guard(index(device));
    c10::cuda::device_synchronize();
  });
}

// ---- events --------------------------------------------------------------------------------------------------------

bool event_create(bool timed, CUDAEvent** out) {
  return on_device([&] { *out = new CUDAEvent(timed ? cudaEventDefault : cudaEventDisableTiming); });
}

bool event_record(CUDAEvent* event, const Stream* stream) {
  return on_device([&] { event->record(from_raw(stream)); });
}

bool event_block(CUDAEvent* event, const Stream* stream) {
  return on_device([&] { event->block(from_raw(stream)); });
}

bool event_query(const CUDAEvent* event, bool* done) {
  return on_device([&] { *done = event->query(); });
}

bool event_synchronize(const CUDAEvent* event) {
  return on_device([&] { event->synchronize(); });
}

bool event_elapsed(const CUDAEvent* from, const CUDAEvent* to, float* milliseconds) {
  return on_device([&] { *milliseconds = from->elapsed_time(*to); });
}

void event_destroy(CUDAEvent* event) { delete event; }

// ---- graphs --------------------------------------------------------------------------------------------------------

bool pool_create(GraphPool* out) {
  return on_device([&] {
    const auto [first, second] = at::cuda::graph_pool_handle();
    *out = {{first, second}};
  });
}

bool graph_create(CUDAGraph** out) {
  return on_device([&] { *out = new CUDAGraph(); });
}

// Thread-local mode: CUDA calls of other threads (a watchdog, a loader) do not invalidate the capture.
bool graph_capture_begin(CUDAGraph* graph, const GraphPool* pool) {
  return on_device([&] { graph->capture_begin({pool->id[0], pool->id[1]}, cudaStreamCaptureModeThreadLocal); });
}

bool graph_capture_end(CUDAGraph* graph) {
  return on_device([&] { graph->capture_end(); });
}

bool graph_replay(CUDAGraph* graph) {
  return on_device([&] { graph->replay(); });
}

// Frees the graph and returns its memory to its pool. Destroying the graph does the same but cannot report an error.
bool graph_reset(CUDAGraph* graph) {
  return on_device([&] { graph->reset(); });
}

void graph_destroy(CUDAGraph* graph) { delete graph; }

// ---- memory and devices --------------------------------------------------------------------------------------------

bool empty_cache() {
  return on_device([&] { c10::cuda::CUDACachingAllocator::emptyCache(); });
}

bool memory_stats(int64_t device, MemoryStats* out) {
  return on_device([&] {
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(index(device));
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto &allocated = stats.allocated_bytes[all], &reserved = stats.reserved_bytes[all];
    *out = {allocated.current, allocated.peak, reserved.current, reserved.peak};
  });
}

bool reset_peak_memory_stats(int64_t device) {
  return on_device([&] { c10::cuda::CUDACachingAllocator::resetPeakStats(index(device)); });
}

bool device_properties(int64_t device, DeviceProperties* out) {
  return on_device([&] {
    // From CUDA itself: libtorch's header for it needs CUDA's C++ library, which no wheel of torch contains.
    cudaDeviceProp properties;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index(device)));
    *out = {};
    std::strncpy(out->name, properties.name, sizeof(out->name) - 1);
    out->multiprocessors = properties.multiProcessorCount;
    out->total_memory = static_cast<int64_t>(properties.totalGlobalMem);
    out->major = properties.major;
    out->minor = properties.minor;
  });
}

const char* last_error() { return occlude::last_error.c_str(); }

}  // namespace functions

#define FUNCTIONS(X)                                                                                          \
  X(last_error) X(current_device) X(set_device) X(stream_current) X(stream_set_current) X(stream_from_pool)   \
  X(stream_external) X(stream_synchronize) X(stream_is_capturing) X(record_stream) X(synchronize)             \
  X(event_create) X(event_record) X(event_block) X(event_query) X(event_synchronize) X(event_elapsed)         \
  X(event_destroy) X(pool_create) X(graph_create) X(graph_capture_begin) X(graph_capture_end) X(graph_replay) \
  X(graph_reset) X(graph_destroy) X(empty_cache) X(memory_stats) X(reset_peak_memory_stats)                   \
  X(device_properties)

#define MEMBER(name) decltype(&functions::name) name;
#define VALUE(name) functions::name,

struct CudaFns {
  uint64_t version;  // digest of the sources that it was compiled from
  uint64_t size;     // of this structure, in bytes
  FUNCTIONS(MEMBER)
};

constexpr CudaFns table = {OCCLUDE_CUDA_VERSION, sizeof(CudaFns), FUNCTIONS(VALUE)};

}  // namespace

extern "C" __attribute__((visibility("default"))) const void* occlude_cuda_functions() { return &table; }
