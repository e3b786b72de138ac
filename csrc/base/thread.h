#pragma once

#include <functional>
#include <thread>

namespace torch_ext {

/// Starts a thread that the system shows under `name`, which has at most 15
/// characters. The thread gets no signals: those are for the application's
/// threads.
/// Errors: IoError ("pthread_create").
std::thread start_thread(const char* name, std::function<void()> body);

}  // namespace torch_ext
