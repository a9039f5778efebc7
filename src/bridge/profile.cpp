// libtorch's profiler: its operations and the program's scopes (record.cpp) as a Chrome trace, with the kernels of a
// GPU if CUPTI is permitted, or as NVTX ranges for Nsight Systems.

#include "bridge.h"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <set>
#include <unordered_set>

namespace {

using occlude::guarded;
using torch::autograd::profiler::ActivityType;
using torch::autograd::profiler::ProfilerConfig;
using torch::autograd::profiler::ProfilerState;

const std::unordered_set<at::RecordScope> all_scopes;  // an empty set means all

}  // namespace

extern "C" {

bool occlude_trace_begin(bool cuda) {
  return guarded([&] {
    std::set<ActivityType> activities = {ActivityType::CPU};
    if (cuda) activities.insert(ActivityType::CUDA);
    const ProfilerConfig config(ProfilerState::KINETO);
    torch::autograd::profiler::prepareProfiler(config, activities);
    torch::autograd::profiler::enableProfiler(config, activities, all_scopes);
  });
}

// Writes the trace to `path`, or discards it if `path` is null.
bool occlude_trace_end(const char* path) {
  return guarded([&] {
    const auto result = torch::autograd::profiler::disableProfiler();
    if (path != nullptr) result->save(path);
  });
}

bool occlude_nvtx_begin() {
  return guarded([] {
    torch::autograd::profiler::enableProfiler(ProfilerConfig(ProfilerState::NVTX), {}, all_scopes);
  });
}

bool occlude_nvtx_end() {
  return guarded([] { torch::autograd::profiler::disableProfiler(); });
}

}  // extern "C"
