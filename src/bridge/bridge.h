// Error handling of the bridge's C functions: no exception crosses the boundary. A function that fails returns false
// and leaves its error, per thread, in occlude_last_error().
#pragma once

#include <c10/util/Exception.h>

#include <string>

namespace occlude {

inline thread_local std::string last_error;

template <class Body>
bool guarded(Body body) {
  try {
    body();
    return true;
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an unknown exception";
  }
  return false;
}

}  // namespace occlude
