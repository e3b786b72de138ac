#pragma once

#include <functional>
#include <thread>

namespace torch_ext {

/// A thread that the system shows under `name`, of 15 characters at most. It
/// gets no signals: those are for the application's threads.
/// Errors: IoError ("pthread_create").
std::thread start_thread(const char* name, std::function<void()> body);

}  // namespace torch_ext
