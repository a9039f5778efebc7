// How the C functions of the bridge fail: no exception crosses the boundary, each returns false and leaves its reason,
// for the thread that called, in occlude_reason().
#pragma once

#include <c10/util/Exception.h>

#include <string>

namespace occlude {

inline thread_local std::string reason;

template <class Body>
bool guarded(Body body) {
  try {
    body();
    return true;
  } catch (const c10::Error& error) {
    reason = error.what_without_backtrace();
  } catch (const std::exception& error) {
    reason = error.what();
  } catch (...) {
    reason = "an unknown exception";
  }
  return false;
}

}  // namespace occlude
