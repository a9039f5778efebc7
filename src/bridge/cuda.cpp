// The CUDA half of the bridge: streams, events, graphs, memory. A shared object of its own that the program opens after
// libtorch_cuda, so that the program needs no CUDA library; it exports one function, which returns a table of the rest.
// `Table` and the structures in it are mirrored, member by member, in cuda/table.rs.

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
  int64_t id;  // libtorch's own number, which tells its pools from streams of others
  int64_t device;
  void* raw;  // cudaStream_t
};

struct Device {
  char name[256];
  int64_t multiprocessors, memory, major, minor;
};

struct Memory {
  int64_t allocated, peak_allocated, reserved, peak_reserved;  // bytes
};

struct Pool {
  uint64_t id[2];
};

namespace half {

// Every function but those that free begins here: libtorch's own words for a missing device vary from call to call.
template <class Body>
bool on_device(Body body) {
  return occlude::guarded([&] {
    if (c10::cuda::device_count() == 0) throw std::runtime_error("no CUDA here: libtorch finds no usable device");
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    body();
  });
}

c10::DeviceIndex index(int64_t device) {
  const int64_t there = c10::cuda::device_count();
  if (device < 0 || device >= there) {
    throw std::runtime_error("device " + std::to_string(device) + " is asked for, and there are " +
                             std::to_string(there));
  }
  return static_cast<c10::DeviceIndex>(device);
}

Stream told(const CUDAStream& stream) { return {stream.id(), stream.device_index(), stream.stream()}; }

CUDAStream meant(const Stream* stream) {
  return CUDAStream::unpack3(stream->id, static_cast<c10::DeviceIndex>(stream->device), c10::DeviceType::CUDA);
}

// ---- streams -------------------------------------------------------------------------------------------------------

bool device_current(int64_t* out) {
  return on_device([&] { *out = c10::cuda::current_device(); });
}

bool device_make_current(int64_t device) {
  return on_device([&] { c10::cuda::set_device(index(device)); });
}

bool stream_current(int64_t device, Stream* out) {
  return on_device([&] { *out = told(c10::cuda::getCurrentCUDAStream(index(device))); });
}

bool stream_make_current(const Stream* stream) {
  return on_device([&] { c10::cuda::setCurrentCUDAStream(meant(stream)); });
}

bool stream_from_pool(int64_t device, bool urgent, Stream* out) {
  return on_device([&] { *out = told(c10::cuda::getStreamFromPool(urgent, index(device))); });
}

bool stream_external(void* raw, int64_t device, Stream* out) {
  return on_device([&] {
    *out = told(c10::cuda::getStreamFromExternal(static_cast<cudaStream_t>(raw), index(device)));
  });
}

bool stream_synchronize(const Stream* stream) {
  return on_device([&] { meant(stream).synchronize(); });
}

bool stream_capturing(const Stream* stream, bool* capturing) {
  return on_device([&] {
    cudaStreamCaptureStatus status;
    C10_CUDA_CHECK(cudaStreamIsCapturing(meant(stream).stream(), &status));
    *capturing = status != cudaStreamCaptureStatusNone;
  });
}

bool record_stream(const at::Tensor* tensor, const Stream* stream) {
  return on_device([&] { tensor->record_stream(meant(stream).unwrap()); });
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
  return on_device([&] { event->record(meant(stream)); });
}

bool event_block(CUDAEvent* event, const Stream* stream) {
  return on_device([&] { event->block(meant(stream)); });
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

bool pool_create(Pool* out) {
  return on_device([&] {
    const auto [first, second] = at::cuda::graph_pool_handle();
    *out = {{first, second}};
  });
}

bool graph_create(CUDAGraph** out) {
  return on_device([&] { *out = new CUDAGraph(); });
}

// Thread-local: what other threads ask of CUDA meanwhile (a watchdog, a loader) does not spoil the capture.
bool graph_begin(CUDAGraph* graph, const Pool* pool) {
  return on_device([&] { graph->capture_begin({pool->id[0], pool->id[1]}, cudaStreamCaptureModeThreadLocal); });
}

bool graph_end(CUDAGraph* graph) {
  return on_device([&] { graph->capture_end(); });
}

bool graph_replay(CUDAGraph* graph) {
  return on_device([&] { graph->replay(); });
}

// Frees the graph and gives its memory back to its pool; a graph that is only destroyed does the same, but cannot tell
// how it failed.
bool graph_reset(CUDAGraph* graph) {
  return on_device([&] { graph->reset(); });
}

void graph_destroy(CUDAGraph* graph) { delete graph; }

// ---- memory and devices --------------------------------------------------------------------------------------------

bool empty_cache() {
  return on_device([&] { c10::cuda::CUDACachingAllocator::emptyCache(); });
}

bool memory_stats(int64_t device, Memory* out) {
  return on_device([&] {
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(index(device));
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto &used = stats.allocated_bytes[all], &held = stats.reserved_bytes[all];
    *out = {used.current, used.peak, held.current, held.peak};
  });
}

bool memory_reset_peak(int64_t device) {
  return on_device([&] { c10::cuda::CUDACachingAllocator::resetPeakStats(index(device)); });
}

bool device_properties(int64_t device, Device* out) {
  return on_device([&] {
    // Asked of CUDA itself: libtorch's own header for it wants CUDA's C++ library, which no wheel of torch brings.
    cudaDeviceProp found;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&found, index(device)));
    *out = {};
    std::strncpy(out->name, found.name, sizeof(out->name) - 1);
    out->multiprocessors = found.multiProcessorCount;
    out->memory = static_cast<int64_t>(found.totalGlobalMem);
    out->major = found.major;
    out->minor = found.minor;
  });
}

const char* reason() { return occlude::reason.c_str(); }

}  // namespace half

#define FUNCTIONS(X) \
  X(reason) X(device_current) X(device_make_current) X(stream_current) X(stream_make_current)                    \
  X(stream_from_pool) X(stream_external) X(stream_synchronize) X(stream_capturing) X(record_stream)              \
  X(synchronize) X(event_create) X(event_record) X(event_block) X(event_query) X(event_synchronize)              \
  X(event_elapsed) X(event_destroy) X(pool_create) X(graph_create) X(graph_begin) X(graph_end) X(graph_replay)   \
  X(graph_reset) X(graph_destroy) X(empty_cache) X(memory_stats) X(memory_reset_peak) X(device_properties)

#define MEMBER(name) decltype(&half::name) name;
#define VALUE(name) half::name,

struct Table {
  uint64_t version;  // of the sources that it was compiled from
  uint64_t size;     // of this structure, in bytes
  FUNCTIONS(MEMBER)
};

constexpr Table table = {OCCLUDE_CUDA_VERSION, sizeof(Table), FUNCTIONS(VALUE)};

}  // namespace

extern "C" __attribute__((visibility("default"))) const void* occlude_cuda_table() { return &table; }
