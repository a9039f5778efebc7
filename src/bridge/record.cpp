// What libtorch runs, noted as it begins and ends.

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
  uint64_t thread, start, end;  // nanoseconds of the steady clock; no end: it has not come
};

// The callbacks carry no context of their own, hence one notebook for the process.
std::mutex lock;
std::vector<Span> spans;
uint64_t turn = 0;  // counts notebooks: what began in an earlier one is not ended in this one
at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;

uint64_t now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(since).count());
}

struct Begun : at::ObserverContext {
  uint64_t turn;
  size_t index;
  Begun(uint64_t turn, size_t index) : turn(turn), index(index) {}
};

std::unique_ptr<at::ObserverContext> begin(const at::RecordFunction& function) {
  std::string name = function.name();
  const char* overload = function.overload_name();
  if (overload != nullptr && *overload != '\0') name.append(".").append(overload);
  const std::lock_guard<std::mutex> guard(lock);
  spans.push_back({std::move(name), at::RecordFunction::currentThreadId(), now(), 0});
  return std::make_unique<Begun>(turn, spans.size() - 1);
}

void end(const at::RecordFunction&, at::ObserverContext* context) {
  const auto* begun = static_cast<Begun*>(context);
  const uint64_t time = now();
  const std::lock_guard<std::mutex> guard(lock);
  if (begun != nullptr && begun->turn == turn) spans[begun->index].end = time;
}

}  // namespace

extern "C" {

// Notes what this thread runs from now on, and the backward passes that it starts.
bool occlude_record_start() {
  return occlude::guarded([&] {
    {
      const std::lock_guard<std::mutex> guard(lock);
      spans.clear();
      ++turn;
    }
    handle = at::addThreadLocalCallback(at::RecordFunctionCallback(begin, end));
  });
}

// Ends that, on the same thread, and hands over what has ended by now, in the order in which it began.
void occlude_record_stop(void (*each)(void* context, const char* name, uint64_t thread, uint64_t start, uint64_t end),
                         void* context) {
  at::removeCallback(handle);
  std::vector<Span> noted;
  {
    const std::lock_guard<std::mutex> guard(lock);
    noted.swap(spans);
    ++turn;
  }
  for (const auto& span : noted) {
    if (span.end != 0) each(context, span.name.c_str(), span.thread, span.start, span.end);
  }
}

// A span of the caller's own. Null where nobody notes it.
void* occlude_scope_begin(const char* name) {
  auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE);
  if (!callbacks.has_value()) return nullptr;
  auto* function = new at::RecordFunction(std::move(*callbacks));
  function->before(std::string_view(name));
  return function;
}

void occlude_scope_end(void* function) { delete static_cast<at::RecordFunction*>(function); }
}
