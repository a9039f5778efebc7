// Names and times of libtorch's operations.

#include "bridge.h"

#include <ATen/record_function.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Span {
  std::string name;
  uint64_t thread, start, end;  // nanoseconds of the steady clock; end is 0 until the span has ended
};

// The callbacks have no context of their own, so there is one list of spans for the process.
std::mutex lock;
std::vector<Span> spans;
uint64_t generation = 0;  // of the list: a span that began in an earlier one is not ended in this one
at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;

uint64_t now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(since).count());
}

struct SpanContext : at::ObserverContext {
  uint64_t generation;
  size_t index;
  SpanContext(uint64_t generation, size_t index) : generation(generation), index(index) {}
};

std::unique_ptr<at::ObserverContext> begin(const at::RecordFunction& function) {
  std::string name = function.name();
  const char* overload = function.overload_name();
  if (overload != nullptr && *overload != '\0') name.append(".").append(overload);
  const std::lock_guard<std::mutex> guard(lock);
  spans.push_back({std::move(name), at::RecordFunction::currentThreadId(), now(), 0});
  return std::make_unique<SpanContext>(generation, spans.size() - 1);
}

void end(const at::RecordFunction&, at::ObserverContext* context) {
  const auto* span = static_cast<SpanContext*>(context);
  const uint64_t time = now();
  const std::lock_guard<std::mutex> guard(lock);
  if (span != nullptr && span->generation == generation) spans[span->index].end = time;
}

}  // namespace

extern "C" {

// Starts to record the operations of this thread and of the backward passes that it starts.
bool occlude_record_start() {
  return occlude::guarded([&] {
    {
      const std::lock_guard<std::mutex> guard(lock);
      spans.clear();
      ++generation;
    }
    handle = at::addThreadLocalCallback(at::RecordFunctionCallback(begin, end));
  });
}

// Stops on the same thread, and visits the spans that have ended, in the order of their beginning.
void occlude_record_stop(void (*visit)(void* context, const char* name, uint64_t thread, uint64_t start, uint64_t end),
                         void* context) {
  at::removeCallback(handle);
  std::vector<Span> recorded;
  {
    const std::lock_guard<std::mutex> guard(lock);
    recorded.swap(spans);
    ++generation;
  }
  for (const auto& span : recorded) {
    if (span.end != 0) visit(context, span.name.c_str(), span.thread, span.start, span.end);
  }
}

// Begins a span of the program. Returns null if nothing records.
void* occlude_scope_begin(const char* name) {
  auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE);
  if (!callbacks.has_value()) return nullptr;
  auto* function = new at::RecordFunction(std::move(*callbacks));
  function->before(std::string_view(name));
  return function;
}

void occlude_scope_end(void* function) { delete static_cast<at::RecordFunction*>(function); }
}
